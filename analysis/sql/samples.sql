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
    SELECT trial_id, subject, fixer, count(*) OVER (PARTITION BY subject) AS n_trials
    FROM selected
    WHERE outcome = 'OK' AND n_repaired IS NOT NULL
),
touched AS (
    SELECT
        j.subject, j.fixer, j.n_trials, p.sample_id, p.label, p.original,
        count(*) FILTER (p.fixed = p.label) AS n_repaired,
        count(*) FILTER (p.original = p.label) AS n_broken
    FROM predictions AS p
    JOIN judged AS j USING (trial_id)
    WHERE p.original <> p.label OR p.fixed <> p.label
    GROUP BY j.subject, j.fixer, j.n_trials, p.sample_id, p.label, p.original
),
samples AS (
    SELECT
        subject, n_trials, sample_id, label, original,
        sum(n_repaired)::BIGINT AS n_repaired,
        sum(n_broken)::BIGINT AS n_broken,
        coalesce(list(fixer ORDER BY fixer) FILTER (n_repaired + n_broken > 0), []) AS fixers,
        CASE
            WHEN original = label THEN 'broken'
            WHEN sum(n_repaired) > 0 THEN 'repaired'
            ELSE 'never repaired'
        END AS kind
    FROM touched
    GROUP BY subject, n_trials, sample_id, label, original
)
SELECT
    subject, kind,
    row_number() OVER (PARTITION BY subject, kind ORDER BY n_repaired + n_broken DESC, sample_id) AS position,
    sample_id, label, original, n_trials, n_repaired, n_broken, fixers
FROM samples
QUALIFY position <= $per_kind
ORDER BY subject, kind, position;
