-- question: How much does each fixer depend on its hyper-parameters?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column n_configurations: parameter sets tried in the adapt stage [configurations]
-- column n_ok: of these, OK with an accuracy on valid; the figures are over these [configurations]
-- column accuracy_valid_original: accuracy of the original on valid [fraction]
-- column best: highest accuracy on valid of a configuration; higher is better [fraction]
-- column median: accuracy on valid of the middle configuration [fraction]
-- column worst: lowest accuracy on valid [fraction]
-- column spread: best - worst; lower is less sensitive [fraction]
-- column share_harmful: configurations that lower accuracy on valid; lower is safer [fraction]
-- column best_params: parameters of the best configuration, as JSON
WITH configurations AS (
    SELECT
        subject, fixer, params,
        avg(accuracy_valid_original) FILTER (outcome = 'OK') AS original,
        avg(accuracy_valid_fixed) FILTER (outcome = 'OK') AS fixed
    FROM latest
    WHERE stage = 'adapt'
    GROUP BY subject, fixer, params
)
SELECT
    subject,
    fixer,
    count(*) AS n_configurations,
    count(fixed) AS n_ok,
    avg(original) AS accuracy_valid_original,
    max(fixed) AS best,
    median(fixed) AS median,
    min(fixed) AS worst,
    best - worst AS spread,
    count(*) FILTER (fixed < original) / nullif(count(fixed), 0) AS share_harmful,
    arg_max(params, fixed ORDER BY params) AS best_params
FROM configurations
GROUP BY subject, fixer
ORDER BY subject, spread DESC NULLS LAST, fixer;
