-- question: Which fixers are not beaten in both repairs and breakage?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column repair_rate: RR; higher is better [fraction]
-- column negative_flip_rate: NFR; lower is better [fraction]
-- column on_front: no other fixer is at least as good in both and better in one
-- column dominated_by: how many fixers are; lower is better [fixers]
WITH candidates AS (
    -- Sums over seeds leave digits that aren't information, and would break ties.
    SELECT subject, fixer, round(repair_rate, 12) AS repair_rate, round(negative_flip_rate, 12) AS negative_flip_rate
    FROM cells
    WHERE outcome = 'OK' AND repair_rate IS NOT NULL
)
SELECT
    a.subject, a.fixer, a.repair_rate, a.negative_flip_rate,
    count(b.fixer) = 0 AS on_front,
    count(b.fixer) AS dominated_by
FROM candidates AS a
LEFT JOIN candidates AS b
    ON a.subject = b.subject
    AND b.repair_rate >= a.repair_rate
    AND b.negative_flip_rate <= a.negative_flip_rate
    AND (b.repair_rate > a.repair_rate OR b.negative_flip_rate < a.negative_flip_rate)
GROUP BY a.subject, a.fixer, a.repair_rate, a.negative_flip_rate
ORDER BY a.subject, dominated_by, a.repair_rate DESC, a.fixer;
