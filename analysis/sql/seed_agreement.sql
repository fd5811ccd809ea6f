-- question: Do different seeds of a fixer repair the same failures and break the same samples?
-- reads: trials, predictions
-- column subject: subject
-- column fixer: registry name of the approach
-- column n_ok: seeds that are OK and have all predictions; agreement needs at least two [trials]
-- column accuracy_spread: largest - smallest accuracy over the seeds; lower is steadier [fraction]
-- column repair_rate_spread: largest - smallest RR; lower is steadier [fraction]
-- column negative_flip_rate_spread: largest - smallest NFR; lower is steadier [fraction]
-- column repaired_by_any: failures that at least one seed repairs [samples]
-- column repaired_by_all: failures that every seed repairs [samples]
-- column repair_agreement: pooled Jaccard overlap of the seeds' repaired sets over all pairs; higher agrees [fraction]
-- column broken_by_any: samples that at least one seed breaks [samples]
-- column broken_by_all: samples that every seed breaks [samples]
-- column breakage_agreement: pooled Jaccard overlap of the seeds' broken sets over all pairs [fraction]
WITH judged AS MATERIALIZED (
    SELECT *, dense_rank() OVER (ORDER BY subject, fixer) AS cell
    FROM whole
),
fixers AS (
    SELECT
        j.cell, s.subject, s.fixer, count(*) AS n_ok,
        max(s.accuracy_fixed) - min(s.accuracy_fixed) AS accuracy_spread,
        max(s.repair_rate) - min(s.repair_rate) AS repair_rate_spread,
        max(s.negative_flip_rate) - min(s.negative_flip_rate) AS negative_flip_rate_spread
    FROM selected AS s
    JOIN judged AS j USING (trial_id)
    GROUP BY j.cell, s.subject, s.fixer
),
-- Cells are numbered: there are millions of changes, and carrying names along would take most of the time.
samples AS (
    SELECT
        j.cell, p.sample_id,
        count(*) FILTER (p.repaired) AS repairs,
        count(*) FILTER (p.broken) AS breaks
    FROM changes AS p
    JOIN judged AS j USING (trial_id)
    GROUP BY j.cell, p.sample_id
)
-- A sample repaired by k of n seeds is in the intersection of k (k - 1) / 2 pairs and in the union of all pairs but
-- those of the n - k others: the pooled ratio needs no pairs of seeds.
SELECT
    f.subject, f.fixer, f.n_ok, f.accuracy_spread, f.repair_rate_spread, f.negative_flip_rate_spread,
    count(*) FILTER (s.repairs > 0) AS repaired_by_any,
    count(*) FILTER (s.repairs = f.n_ok) AS repaired_by_all,
    sum(s.repairs * (s.repairs - 1))
    / nullif(sum(s.repairs * (2 * f.n_ok - s.repairs - 1)), 0) AS repair_agreement,
    count(*) FILTER (s.breaks > 0) AS broken_by_any,
    count(*) FILTER (s.breaks = f.n_ok) AS broken_by_all,
    sum(s.breaks * (s.breaks - 1))
    / nullif(sum(s.breaks * (2 * f.n_ok - s.breaks - 1)), 0) AS breakage_agreement
FROM fixers AS f
LEFT JOIN samples AS s USING (cell)
GROUP BY f.subject, f.fixer, f.n_ok, f.accuracy_spread, f.repair_rate_spread, f.negative_flip_rate_spread
ORDER BY f.subject, f.fixer;
