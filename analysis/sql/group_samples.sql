-- question: What does the original predict for every test sample, on subjects whose samples have groups?
-- reads: trials, predictions
-- column subject: subject that has groups
-- column sample_id: position in the subject's test split
-- column group: group of the sensitive attribute, 0 or 1
-- column label: true class
-- column original: class that the original predicts; below 0 is no class
WITH grouped AS (
    SELECT subject, trial_id, n_test, n_wrong FROM selected WHERE outcome = 'OK' AND aaod_fixed IS NOT NULL
),
counted AS (
    SELECT trial_id, count(*) AS n_test, count(*) FILTER (original <> label) AS n_wrong
    FROM predictions
    SEMI JOIN grouped USING (trial_id)
    GROUP BY trial_id
),
-- Group, label and original prediction are the same in every trial of a subject, so one that is complete has them.
complete AS (
    SELECT subject, min(trial_id) AS trial_id
    FROM grouped
    JOIN counted USING (trial_id, n_test, n_wrong)
    GROUP BY subject
)
SELECT c.subject, p.sample_id, p."group", p.label, p.original
FROM predictions AS p
JOIN complete AS c USING (trial_id)
WHERE p."group" IS NOT NULL
ORDER BY c.subject, p.sample_id;
