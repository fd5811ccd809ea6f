-- question: Which test images does every final trial predict otherwise than the original, on subjects with groups?
-- reads: trials, predictions
-- column run: the trial, as its row (from 1) in the answer of the query `runs`
-- column sample_id: position in the subject's test split
-- column group: group of the sensitive attribute, 0 or 1
-- column label: true class
-- column original: class that the original predicts; below 0 is no class
-- column fixed: class that the fixed model predicts; below 0 is no class
WITH numbered AS (
    SELECT trial_id, outcome, aaod_fixed, row_number() OVER (ORDER BY subject, fixer, seed, trial_id) AS run
    FROM selected
)
SELECT n.run, p.sample_id, p."group", p.label, p.original, p.fixed
FROM predictions AS p
JOIN numbered AS n USING (trial_id)
WHERE n.outcome = 'OK' AND n.aaod_fixed IS NOT NULL AND p."group" IS NOT NULL AND p.original <> p.fixed
ORDER BY n.run, p.sample_id;
