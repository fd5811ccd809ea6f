-- question: Which classes does each fixer repair, and at which classes' cost?
-- reads: trials, predictions
-- column subject: subject
-- column fixer: registry name of the approach
-- column class: true class
-- column n_ok: seeds that are OK and have all predictions; the figures are means over these [trials]
-- column n_test: test samples of the class [samples]
-- column n_wrong: of these, samples the original gets wrong [samples]
-- column n_repaired: of those, samples the fixed model gets right; higher is better [samples]
-- column n_broken: samples of the class that only the original gets right; lower is better [samples]
-- column repair_rate: n_repaired / n_wrong; higher is better; null without failures [fraction]
-- column negative_flip_rate: n_broken / n_test of the class; lower is better [fraction]
-- column recall_original: share of the class that the original gets right; higher is better [fraction]
-- column recall_fixed: share of the class that the fixed model gets right; higher is better [fraction]
WITH judged AS MATERIALIZED (
    FROM whole
),
fixers AS (
    SELECT subject, fixer, count(*) AS n_ok
    FROM judged
    GROUP BY subject, fixer
),
classes AS (
    -- Label and original prediction are the same in every trial of a subject, so one that is whole has them.
    SELECT j.subject, p.label, count(*) AS n_test, count(*) FILTER (p.original <> p.label) AS n_wrong
    FROM predictions AS p
    JOIN (SELECT subject, min(trial_id) AS trial_id FROM judged GROUP BY subject) AS j USING (trial_id)
    GROUP BY j.subject, p.label
),
changed AS (
    SELECT
        subject, fixer, label,
        count(*) FILTER (repaired) AS repairs,
        count(*) FILTER (broken) AS breaks
    FROM changes
    SEMI JOIN judged USING (trial_id)
    GROUP BY subject, fixer, label
)
SELECT
    f.subject, f.fixer, c.label AS class, f.n_ok, c.n_test, c.n_wrong,
    coalesce(h.repairs, 0) / f.n_ok AS n_repaired,
    coalesce(h.breaks, 0) / f.n_ok AS n_broken,
    n_repaired / nullif(c.n_wrong, 0) AS repair_rate,
    n_broken / c.n_test AS negative_flip_rate,
    1 - c.n_wrong / c.n_test AS recall_original,
    1 - (c.n_wrong - n_repaired + n_broken) / c.n_test AS recall_fixed
FROM fixers AS f
JOIN classes AS c USING (subject)
LEFT JOIN changed AS h ON h.subject = f.subject AND h.fixer = f.fixer AND h.label = c.label
ORDER BY f.subject, f.fixer, class;
