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
SELECT
    subject,
    fixer,
    count(*) AS n_configurations,
    count(accuracy_valid) AS n_ok,
    avg(accuracy_valid_original ORDER BY params) AS accuracy_valid_original,
    max(accuracy_valid) AS best,
    median(accuracy_valid) AS median,
    min(accuracy_valid) AS worst,
    best - worst AS spread,
    count(*) FILTER (gain < 0) / nullif(count(accuracy_valid), 0) AS share_harmful,
    arg_max(params, accuracy_valid ORDER BY params) AS best_params
FROM configurations
GROUP BY subject, fixer
ORDER BY subject, spread DESC NULLS LAST, fixer;
