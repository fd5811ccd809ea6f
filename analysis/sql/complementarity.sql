-- question: Which two fixers complement each other, and which do the same?
-- reads: trials, predictions
-- parameter share = 0.5: a fixer repairs (breaks) a sample when more than this share of its OK seeds do [fraction]
-- column subject: subject
-- column fixer_a: one fixer
-- column fixer_b: the other; each pair is here once
-- column n_wrong: test samples the original gets wrong [samples]
-- column repaired_a: failures that fixer_a repairs [samples]
-- column repaired_b: failures that fixer_b repairs [samples]
-- column repaired_both: failures that both repair [samples]
-- column repaired_either: failures that at least one repairs; higher is better [samples]
-- column repaired_either_rate: repaired_either / n_wrong; higher is better [fraction]
-- column gain: repaired_either minus the better of the two alone; higher complements more [samples]
-- column jaccard_repaired: overlap of the repaired sets, both / either; 1 is the same repairs [fraction]
-- column broken_both: samples that both break; lower is better [samples]
-- column broken_either: samples that at least one breaks; lower is better [samples]
-- column jaccard_broken: overlap of the broken sets, both / either; null when neither breaks anything [fraction]
-- column only_a_right: test samples right with fixer_a and wrong with fixer_b [samples]
-- column only_b_right: test samples right with fixer_b and wrong with fixer_a [samples]
-- column rank: by repaired_either, then fewest broken_either; 1 is the subject's best pair
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
    SELECT j.cell, p.sample_id, p.repaired, count(*) AS n
    FROM changes AS p
    JOIN judged AS j USING (trial_id)
    GROUP BY j.cell, p.sample_id, p.repaired
),
sets AS MATERIALIZED (
    SELECT f.subject, f.fixer, t.sample_id, t.repaired AS is_repaired, NOT t.repaired AS is_broken
    FROM tallied AS t
    JOIN fixers AS f USING (cell)
    WHERE t.n > $share * f.n_seeds
),
sizes AS (
    SELECT
        subject, fixer, n_wrong,
        count(*) FILTER (is_repaired) AS n_repaired,
        count(*) FILTER (is_broken) AS n_broken
    FROM fixers
    LEFT JOIN sets USING (subject, fixer)
    GROUP BY subject, fixer, n_wrong
),
shared AS (
    SELECT
        a.subject, a.fixer AS fixer_a, b.fixer AS fixer_b,
        count(*) FILTER (a.is_repaired AND b.is_repaired) AS repaired_both,
        count(*) FILTER (a.is_broken AND b.is_broken) AS broken_both
    FROM sets AS a
    JOIN sets AS b ON a.subject = b.subject AND a.sample_id = b.sample_id AND a.fixer < b.fixer
    GROUP BY a.subject, a.fixer, b.fixer
),
pairs AS (
    SELECT
        a.subject, a.fixer AS fixer_a, b.fixer AS fixer_b,
        a.n_wrong,
        a.n_repaired AS repaired_a,
        b.n_repaired AS repaired_b,
        coalesce(repaired_both, 0) AS repaired_both,
        repaired_a + repaired_b - coalesce(repaired_both, 0) AS repaired_either,
        repaired_either / nullif(a.n_wrong, 0) AS repaired_either_rate,
        repaired_either - greatest(repaired_a, repaired_b) AS gain,
        coalesce(repaired_both, 0) / nullif(repaired_either, 0) AS jaccard_repaired,
        coalesce(broken_both, 0) AS broken_both,
        a.n_broken + b.n_broken - coalesce(broken_both, 0) AS broken_either,
        coalesce(broken_both, 0) / nullif(broken_either, 0) AS jaccard_broken,
        repaired_a - coalesce(repaired_both, 0) + b.n_broken - coalesce(broken_both, 0) AS only_a_right,
        repaired_b - coalesce(repaired_both, 0) + a.n_broken - coalesce(broken_both, 0) AS only_b_right
    FROM sizes AS a
    JOIN sizes AS b ON a.subject = b.subject AND a.fixer < b.fixer
    LEFT JOIN shared AS s ON s.subject = a.subject AND s.fixer_a = a.fixer AND s.fixer_b = b.fixer
)
SELECT *, rank() OVER (PARTITION BY subject ORDER BY repaired_either DESC, broken_either) AS rank
FROM pairs
ORDER BY subject, rank, fixer_a, fixer_b;
