-- question: How well is each way of dividing failures learned: how much of a type does a model get right that was tuned on it?
-- reads: type_trials, type_matrix
-- column subject: subject whose failures were divided
-- column grouping: how they were divided
-- column n_seeds: seeds with figures [seeds]
-- column n_types: types per seed, on average [types]
-- column learnability: mean over types, then over seeds, of the accuracy on the type tuned on; higher is better [fraction]
-- column spread_over_types: population standard deviation over the types of a seed, mean over seeds [fraction]
-- column spread_over_seeds: standard deviation of the seeds' means; null for one seed [fraction]
-- column accuracy_c: accuracy on what the original gets right, mean likewise; higher is better [fraction]
WITH newest AS (
    FROM type_accuracies
    WHERE repair = 'matrix'
),
of_seeds AS (
    SELECT
        subject, grouping, seed,
        count(*) FILTER (type_of_test = type::VARCHAR) AS n_types,
        avg(accuracy ORDER BY type) FILTER (type_of_test = type::VARCHAR) AS learnability,
        stddev_pop(accuracy) FILTER (type_of_test = type::VARCHAR) AS spread,
        avg(accuracy ORDER BY type) FILTER (type_of_test = 'C') AS accuracy_c
    FROM newest
    GROUP BY subject, grouping, seed
)
SELECT
    subject, grouping, count(*) AS n_seeds, avg(n_types) AS n_types,
    avg(learnability ORDER BY seed) AS learnability,
    avg(spread ORDER BY seed) AS spread_over_types,
    stddev_samp(learnability) AS spread_over_seeds,
    avg(accuracy_c ORDER BY seed) AS accuracy_c
FROM of_seeds
GROUP BY subject, grouping
ORDER BY subject, learnability DESC NULLS LAST, grouping;
