-- question: Which test images did every final trial repair or break?
-- reads: trials, predictions
-- column run: the trial, as its row (from 1) in the answer of the query `runs`
-- column sample_id: position in the subject's test split
-- column repaired: 1 if repaired, 0 if broken
WITH numbered AS (
    SELECT trial_id, row_number() OVER (ORDER BY subject, fixer, seed, trial_id) AS run FROM selected
)
SELECT run, sample_id, repaired::TINYINT AS repaired
FROM changes
JOIN numbered USING (trial_id)
ORDER BY run, sample_id;
