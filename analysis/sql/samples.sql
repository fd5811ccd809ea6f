-- question: Which test samples are repaired by most fixers, broken by most, or never repaired?
-- reads: trials, predictions
-- parameter per_kind = 12: samples per subject and kind
-- column subject: subject
-- column kind: repaired, broken or never repaired
-- column position: 1 is the clearest example of its kind
-- column sample_id: position in the subject's test split
-- column label: true class
-- column original: class the original model predicts
-- column n_trials: trials that are OK [trials]
-- column n_repaired: of these, trials that repair the sample [trials]
-- column n_broken: of these, trials that break it [trials]
-- column fixers: fixers with at least one such trial, in alphabetical order
WITH judged AS (
    SELECT subject, min(trial_id) AS trial_id, count(*) AS n_trials
    FROM selected
    WHERE outcome = 'OK' AND n_repaired IS NOT NULL
    GROUP BY subject
),
changed AS (
    SELECT
        subject, sample_id,
        count(*) FILTER (repaired) AS n_repaired,
        count(*) FILTER (broken) AS n_broken,
        list_sort(list(DISTINCT fixer)) AS fixers
    FROM changes
    GROUP BY subject, sample_id
),
samples AS (
    -- The original's predictions are the same in every trial of a subject, so one trial has them.
    SELECT
        j.subject, p.sample_id, p.label, p.original, j.n_trials,
        coalesce(c.n_repaired, 0) AS n_repaired,
        coalesce(c.n_broken, 0) AS n_broken,
        coalesce(c.fixers, []) AS fixers,
        CASE
            WHEN c.n_repaired > 0 THEN 'repaired'
            WHEN c.n_broken > 0 THEN 'broken'
            ELSE 'never repaired'
        END AS kind
    FROM judged AS j
    JOIN predictions AS p USING (trial_id)
    LEFT JOIN changed AS c ON c.subject = j.subject AND c.sample_id = p.sample_id
    WHERE c.sample_id IS NOT NULL OR p.original <> p.label
)
SELECT
    subject, kind,
    row_number() OVER (PARTITION BY subject, kind ORDER BY n_repaired + n_broken DESC, sample_id) AS position,
    sample_id, label, original, n_trials, n_repaired, n_broken, fixers
FROM samples
QUALIFY position <= $per_kind
ORDER BY subject, kind, position;
