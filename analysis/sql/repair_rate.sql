-- question: What share of the failures does each fixer repair, and how sure is that?
-- reads: trials
-- parameter z = 1.959964: half width of the interval in standard errors; 1.959964 for 95 %
-- column subject: subject
-- column fixer: registry name of the approach
-- column n_seeds: seeds run [trials]
-- column n_ok: seeds that are OK; the figures are means over these [trials]
-- column n_wrong: test samples the original gets wrong, the denominator [samples]
-- column n_repaired: repaired failures, mean over seeds; higher is better [samples]
-- column repair_rate: RR, repaired failures / failures, mean over seeds; higher is better [fraction]
-- column low: lower end of Wilson's interval of the mean over the n_wrong failures; of several seeds the report's interval covers what they differ as well [fraction]
-- column high: upper end [fraction]
-- column lowest_seed: RR of the worst seed [fraction]
-- column highest_seed: RR of the best seed [fraction]
WITH spread AS (
    SELECT subject, fixer, min(repair_rate) AS lowest_seed, max(repair_rate) AS highest_seed
    FROM selected
    WHERE outcome = 'OK'
    GROUP BY subject, fixer
),
wilson AS (
    -- Seeds see the same failures, so they don't add to the n of the interval.
    SELECT
        *,
        n_wrong + $z ** 2 AS n,
        (repair_rate * n_wrong + $z ** 2 / 2) / n AS centre,
        $z / n * sqrt(n_wrong * repair_rate * (1 - repair_rate) + $z ** 2 / 4) AS half
    FROM cells
)
SELECT
    subject, fixer, n_seeds, n_ok, n_wrong, n_repaired, repair_rate,
    greatest(centre - half, 0) AS low,
    least(centre + half, 1) AS high,
    lowest_seed, highest_seed
FROM wilson
LEFT JOIN spread USING (subject, fixer)
ORDER BY subject, repair_rate DESC NULLS LAST, fixer;
