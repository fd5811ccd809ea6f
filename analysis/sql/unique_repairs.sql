-- question: Which failures does only one fixer repair, and which does none?
-- reads: trials, predictions
-- parameter share = 0.5: a fixer repairs a sample when more than this share of its OK seeds do [fraction]
-- column subject: subject
-- column fixer: registry name of the approach
-- column n_wrong: test samples the original gets wrong [samples]
-- column n_repaired: failures that the fixer repairs; higher is better [samples]
-- column n_unique: of these, failures that no other fixer repairs [samples]
-- column unique_rate: n_unique / n_wrong [fraction]
-- column n_repaired_by_any: failures of the subject that at least one fixer repairs [samples]
-- column n_never: failures of the subject that no fixer repairs; lower is better [samples]
WITH judged AS MATERIALIZED (
    SELECT *, dense_rank() OVER (ORDER BY subject, fixer) AS cell
    FROM whole
),
fixers AS (
    SELECT cell, subject, fixer, count(*) AS n_seeds, max(n_wrong) AS n_wrong
    FROM judged
    GROUP BY cell, subject, fixer
),
-- Cells are numbered: there are millions of changes, and carrying names along would take most of the time.
tallied AS (
    SELECT j.cell, p.sample_id, count(*) AS repairs
    FROM changes AS p
    JOIN judged AS j USING (trial_id)
    WHERE p.repaired
    GROUP BY j.cell, p.sample_id
),
sets AS (
    SELECT f.subject, f.fixer, t.sample_id
    FROM tallied AS t
    JOIN fixers AS f USING (cell)
    WHERE t.repairs > $share * f.n_seeds
),
shared AS (
    SELECT *, count(*) OVER (PARTITION BY subject, sample_id) AS n_fixers
    FROM sets
),
reached AS (
    SELECT subject, count(DISTINCT sample_id) AS n_repaired_by_any
    FROM sets
    GROUP BY subject
)
SELECT
    f.subject,
    f.fixer,
    f.n_wrong,
    count(s.sample_id) AS n_repaired,
    count(*) FILTER (s.n_fixers = 1) AS n_unique,
    n_unique / nullif(f.n_wrong, 0) AS unique_rate,
    coalesce(any_value(r.n_repaired_by_any), 0) AS n_repaired_by_any,
    f.n_wrong - coalesce(any_value(r.n_repaired_by_any), 0) AS n_never
FROM fixers AS f
LEFT JOIN shared AS s ON s.subject = f.subject AND s.fixer = f.fixer
LEFT JOIN reached AS r ON r.subject = f.subject
GROUP BY f.subject, f.fixer, f.n_wrong
ORDER BY f.subject, n_unique DESC, f.fixer;
