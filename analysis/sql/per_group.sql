-- question: Do both groups of the sensitive attribute gain alike?
-- reads: trials, predictions, subjects
-- column subject: subject that has groups
-- column fixer: registry name of the approach
-- column group: group of the sensitive attribute, 0 or 1
-- column sensitive_attribute: what the groups are
-- column n_ok: seeds that are OK and have all predictions; the figures are means over these [trials]
-- column n_test: test samples of the group [samples]
-- column n_wrong: of these, samples the original gets wrong [samples]
-- column n_repaired: of those, samples the fixed model gets right; higher is better [samples]
-- column n_broken: samples of the group that only the original gets right; lower is better [samples]
-- column repair_rate: n_repaired / n_wrong; higher is better; null without failures [fraction]
-- column negative_flip_rate: n_broken / n_test of the group; lower is better [fraction]
-- column accuracy_original: accuracy of the original on the group; higher is better [fraction]
-- column accuracy_fixed: accuracy of the fixed model on the group; higher is better [fraction]
WITH judged AS MATERIALIZED (
    FROM whole
),
fixers AS (
    SELECT subject, fixer, count(*) AS n_ok, min(subject_fingerprint) AS fingerprint
    FROM judged
    WHERE aaod_fixed IS NOT NULL
    GROUP BY subject, fixer
),
groups AS (
    -- Group, label and original prediction are the same in every trial of a subject, so one that is whole has them.
    SELECT j.subject, p."group", count(*) AS n_test, count(*) FILTER (p.original <> p.label) AS n_wrong
    FROM predictions AS p
    JOIN (SELECT subject, min(trial_id) AS trial_id FROM judged GROUP BY subject) AS j USING (trial_id)
    WHERE p."group" IS NOT NULL
    GROUP BY j.subject, p."group"
),
changed AS (
    SELECT
        subject, fixer, "group",
        count(*) FILTER (repaired) AS repairs,
        count(*) FILTER (broken) AS breaks
    FROM changes
    SEMI JOIN judged USING (trial_id)
    WHERE "group" IS NOT NULL
    GROUP BY subject, fixer, "group"
)
SELECT
    f.subject, f.fixer, g."group", s.sensitive_attribute, f.n_ok, g.n_test, g.n_wrong,
    coalesce(h.repairs, 0) / f.n_ok AS n_repaired,
    coalesce(h.breaks, 0) / f.n_ok AS n_broken,
    n_repaired / nullif(g.n_wrong, 0) AS repair_rate,
    n_broken / g.n_test AS negative_flip_rate,
    1 - g.n_wrong / g.n_test AS accuracy_original,
    1 - (g.n_wrong - n_repaired + n_broken) / g.n_test AS accuracy_fixed
FROM fixers AS f
JOIN groups AS g USING (subject)
LEFT JOIN changed AS h ON h.subject = f.subject AND h.fixer = f.fixer AND h."group" = g."group"
LEFT JOIN subjects AS s ON s.fingerprint = f.fingerprint
ORDER BY f.subject, f.fixer, g."group";
