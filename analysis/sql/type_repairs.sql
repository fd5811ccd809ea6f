-- question: What does each way of repairing failure types do to them, and to what was right?
-- reads: type_trials, type_matrix
-- column subject: subject whose failures were divided
-- column grouping: how they were divided
-- column repair: matrix, another way of repair, or an approach that repairs all types at once
-- column type_of_test: failure type that is judged; C for what the original gets right; All for both
-- column accuracy: on a type, of the model that repairs it; on C and All, mean over the models; mean over seeds; higher is better [fraction]
-- column spread_over_seeds: standard deviation of the seeds' figures; null for one seed [fraction]
-- column n_seeds: seeds with figures [seeds]
-- column n_models: models of a seed that it is a mean over [models]
WITH of_seeds AS (
    SELECT subject, grouping, repair, type_of_test, seed, avg(accuracy ORDER BY type) AS accuracy, count(*) AS n_models
    FROM type_accuracies
    WHERE type IS NULL OR type_of_test IN ('C', 'All', type::VARCHAR)
    GROUP BY subject, grouping, repair, type_of_test, seed
)
SELECT
    subject, grouping, repair, type_of_test,
    avg(accuracy ORDER BY seed) AS accuracy,
    stddev_samp(accuracy) AS spread_over_seeds,
    count(*) AS n_seeds,
    max(n_models) AS n_models
FROM of_seeds
GROUP BY subject, grouping, repair, type_of_test
ORDER BY subject, grouping, repair, try_cast(type_of_test AS INTEGER) NULLS LAST, type_of_test DESC;
