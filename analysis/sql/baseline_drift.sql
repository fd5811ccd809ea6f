-- question: Is the original model the same in all trials of a subject?
-- reads: trials, predictions
-- parameter tolerance = 0.000001: difference that is still rounding [fraction]
-- column subject: subject
-- column n_trials: trials that were evaluated [trials]
-- column n_fingerprints: different contents of data, splits or original weights; more than 1 is drift
-- column n_test_sizes: different sizes of the test split; more than 1 is drift
-- column n_references: different sets of samples, labels and original predictions; more than 1 is drift
-- column accuracy_lowest: lowest accuracy of the original in a trial row [fraction]
-- column accuracy_highest: highest accuracy of the original in a trial row [fraction]
-- column aaod_lowest: lowest AAOD of the original; null without groups [fraction]
-- column aaod_highest: highest AAOD of the original; null without groups [fraction]
-- column has_drifted: whether figures of this subject must not be compared
WITH marks AS (
    -- Equal for trials that were judged on the same samples, labels and original predictions.
    SELECT trial_id, sum(hash(sample_id, label, original)) AS mark
    FROM predictions
    GROUP BY trial_id
)
SELECT
    subject,
    count(*) AS n_trials,
    count(DISTINCT subject_fingerprint) AS n_fingerprints,
    count(DISTINCT n_test) AS n_test_sizes,
    count(DISTINCT mark) AS n_references,
    min(accuracy_original) AS accuracy_lowest,
    max(accuracy_original) AS accuracy_highest,
    min(aaod_original) AS aaod_lowest,
    max(aaod_original) AS aaod_highest,
    n_fingerprints > 1 OR n_test_sizes > 1 OR n_references > 1
    OR coalesce(accuracy_highest - accuracy_lowest > $tolerance, false)
    OR coalesce(aaod_highest - aaod_lowest > $tolerance, false) AS has_drifted
FROM latest
LEFT JOIN marks USING (trial_id)
WHERE accuracy_original IS NOT NULL
GROUP BY subject
ORDER BY subject;
