-- question: Which test samples are repaired by most fixers, broken by most, or never repaired?
-- reads: trials, predictions
-- parameter per_kind = 12: samples per subject and kind
-- column subject: subject
-- column subject_fingerprint: of the subject's data, splits and original
-- column kind: repaired, broken or never repaired
-- column position: 1 is the clearest example of its kind
-- column sample_id: position in the subject's test split
-- column label: true class
-- column original: class the original model predicts
-- column n_trials: trials that are OK and have all predictions [trials]
-- column n_repaired: of these, trials that repair the sample [trials]
-- column n_broken: of these, trials that break it [trials]
-- column fixers: fixers with at least one such trial, in alphabetical order
WITH judged AS MATERIALIZED (
    SELECT
        trial_id, subject, fixer, subject_fingerprint,
        count(*) OVER (PARTITION BY subject) AS n_trials,
        dense_rank() OVER (ORDER BY subject) AS subject_number,
        dense_rank() OVER (ORDER BY fixer) AS fixer_number
    FROM whole
),
-- Names come last: there are millions of flips, and carrying names along would take most of the time.
flipped AS MATERIALIZED (
    SELECT
        -- What was wrong can only be repaired, what was right only broken.
        j.subject_number, j.fixer_number, p.sample_id, p.label, p.original, count(*) AS n
    FROM changes AS p
    JOIN judged AS j USING (trial_id)
    GROUP BY j.subject_number, j.fixer_number, p.sample_id, p.label, p.original
),
-- Every trial of an original has the same failures, so one of them tells which samples nobody repairs.
failing AS (
    SELECT j.subject_number, p.sample_id, p.label, p.original
    FROM predictions AS p
    JOIN (
        SELECT subject_number, min(trial_id) AS trial_id
        FROM judged
        GROUP BY subject_number
    ) AS j USING (trial_id)
    WHERE p.original <> p.label
),
chosen AS (
    SELECT
        subject_number, sample_id, label, original,
        CASE WHEN original <> label THEN sum(n)::BIGINT ELSE 0 END AS n_repaired,
        CASE WHEN original = label THEN sum(n)::BIGINT ELSE 0 END AS n_broken,
        CASE WHEN original = label THEN 'broken' WHEN n_repaired > 0 THEN 'repaired' ELSE 'never repaired' END AS kind,
        row_number() OVER (PARTITION BY subject_number, kind ORDER BY sum(n) DESC, sample_id) AS position
    FROM (
        SELECT subject_number, sample_id, label, original, n FROM flipped
        UNION ALL
        SELECT *, 0 FROM failing
    )
    GROUP BY subject_number, sample_id, label, original
    QUALIFY position <= $per_kind
),
credited AS (
    SELECT subject_number, sample_id, label, original, list(fixer ORDER BY fixer) AS fixers
    FROM flipped
    SEMI JOIN chosen USING (subject_number, sample_id, label, original)
    JOIN (SELECT DISTINCT fixer_number, fixer FROM judged) USING (fixer_number)
    GROUP BY subject_number, sample_id, label, original
)
SELECT
    s.subject, s.subject_fingerprint, c.kind, c.position, c.sample_id, c.label, c.original, s.n_trials, c.n_repaired, c.n_broken,
    coalesce(f.fixers, []) AS fixers
FROM chosen AS c
JOIN (SELECT DISTINCT subject_number, subject, subject_fingerprint, n_trials FROM judged) AS s USING (subject_number)
LEFT JOIN credited AS f USING (subject_number, sample_id, label, original)
ORDER BY s.subject, c.kind, c.position;
