-- question: How much does each fixer depend on its hyper-parameters?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column n_configurations: parameter sets tried in the adapt stage, with their full effort [configurations]
-- column n_ok: of these, OK with an accuracy on valid; the figures are over these [configurations]
-- column accuracy_valid_original: accuracy of the original on valid [fraction]
-- column best: highest accuracy on valid of a configuration; higher is better [fraction]
-- column median: accuracy on valid of the middle configuration [fraction]
-- column worst: lowest accuracy on valid [fraction]
-- column spread: best - worst; lower is less sensitive [fraction]
-- column share_harmful: configurations that lower accuracy on valid; lower is safer [fraction]
-- column best_params: parameters of the best configuration, as JSON
-- column n_short_rungs: trials of successive halving with a part of the effort, which enter no other figure [trials]
WITH full_effort AS (
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
),
short_rungs AS (
    SELECT subject, fixer, count(*) AS n_short_rungs
    FROM latest
    WHERE stage = 'adapt' AND short_rung
    GROUP BY subject, fixer
)
-- A sweep whose time was up early may have nothing but short rungs.
SELECT
    subject,
    fixer,
    coalesce(n_configurations, 0) AS n_configurations,
    coalesce(n_ok, 0) AS n_ok,
    accuracy_valid_original,
    best,
    median,
    worst,
    spread,
    share_harmful,
    best_params,
    coalesce(n_short_rungs, 0) AS n_short_rungs
FROM full_effort
FULL JOIN short_rungs USING (subject, fixer)
ORDER BY subject, spread DESC NULLS LAST, fixer;
