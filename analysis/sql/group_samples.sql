-- question: What does the original predict for every test sample, on subjects whose samples have groups?
-- reads: trials, predictions
-- column subject: subject that has groups
-- column sample_id: position in the subject's test split
-- column group: group of the sensitive attribute, 0 or 1
-- column label: true class
-- column original: class that the original predicts; below 0 is no class
WITH complete AS (
    -- Group, label and original prediction are the same in every trial of a subject, so one that is whole has them.
    SELECT subject, min(trial_id) AS trial_id
    FROM whole
    WHERE aaod_fixed IS NOT NULL
    GROUP BY subject
)
SELECT c.subject, p.sample_id, p."group", p.label, p.original
FROM predictions AS p
JOIN complete AS c USING (trial_id)
WHERE p."group" IS NOT NULL
ORDER BY c.subject, p.sample_id;
