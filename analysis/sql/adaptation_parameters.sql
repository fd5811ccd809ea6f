-- question: Which hyper-parameter matters, and which value of it does best?
-- reads: trials
-- column fixer: registry name of the approach
-- column subject: subject
-- column parameter: hyper-parameter with more than one value in the adapt stage
-- column value: its value, as JSON
-- column n_trials: adapt trials with that value that are OK; short rungs of successive halving are left out [trials]
-- column accuracy_valid: mean accuracy on valid over these; higher is better [fraction]
-- column repair_rate_valid: mean RR on valid; higher is better [fraction]
-- column negative_flip_rate_valid: mean NFR on valid; lower is better [fraction]
-- column effect: best - worst mean accuracy over the values of this parameter; higher matters more [fraction]
WITH settings AS (
    SELECT
        fixer, subject, trial_id, entry.key AS parameter, entry.value::VARCHAR AS value,
        accuracy_valid_fixed, repair_rate_valid, negative_flip_rate_valid
    FROM latest, json_each(params) AS entry
    WHERE stage = 'adapt' AND short_rung IS NOT TRUE AND outcome = 'OK' AND accuracy_valid_fixed IS NOT NULL
),
averaged AS (
    SELECT
        fixer, subject, parameter, value,
        count(*) AS n_trials,
        avg(accuracy_valid_fixed ORDER BY trial_id) AS accuracy_valid,
        avg(repair_rate_valid ORDER BY trial_id) AS repair_rate_valid,
        avg(negative_flip_rate_valid ORDER BY trial_id) AS negative_flip_rate_valid
    FROM settings
    GROUP BY fixer, subject, parameter, value
)
SELECT
    *,
    max(accuracy_valid) OVER parameter - min(accuracy_valid) OVER parameter AS effect
FROM averaged
WINDOW parameter AS (PARTITION BY fixer, subject, parameter)
QUALIFY count(*) OVER parameter > 1
ORDER BY fixer, subject, effect DESC, parameter, accuracy_valid DESC, value;
