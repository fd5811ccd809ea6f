-- question: How distinct are the failure types of each way of dividing them: how much more does tuning on a type repair it than the others?
-- reads: type_trials, type_matrix
-- column subject: subject whose failures were divided
-- column grouping: how they were divided
-- column n_seeds: seeds with figures [seeds]
-- column independence: mean over types of M_ii - mean of M_ij over the other types j, then over seeds; higher is better, random types have 0 [fraction]
-- column spread_over_types: population standard deviation over the types of a seed, mean over seeds [fraction]
-- column spread_over_seeds: standard deviation of the seeds' means; null for one seed [fraction]
WITH newest AS (
    FROM type_accuracies
    WHERE repair = 'matrix'
),
of_types AS (
    SELECT
        subject, grouping, seed, type,
        max(accuracy) FILTER (type_of_test = type::VARCHAR) AS own,
        avg(accuracy ORDER BY type_of_test) FILTER (
            type_of_test <> type::VARCHAR AND try_cast(type_of_test AS INTEGER) IS NOT NULL
        ) AS others
    FROM newest
    GROUP BY subject, grouping, seed, type
),
-- A type of which nothing is learned isn't independent, whatever the others are.
of_seeds AS (
    SELECT
        subject, grouping, seed,
        avg(if(own = 0 AND others IS NOT NULL, 0, own - others) ORDER BY type) AS independence,
        stddev_pop(if(own = 0 AND others IS NOT NULL, 0, own - others)) AS spread
    FROM of_types
    GROUP BY subject, grouping, seed
)
SELECT
    subject, grouping, count(independence) AS n_seeds,
    avg(independence ORDER BY seed) AS independence,
    avg(spread ORDER BY seed) AS spread_over_types,
    stddev_samp(independence) AS spread_over_seeds
FROM of_seeds
GROUP BY subject, grouping
ORDER BY subject, independence DESC NULLS LAST, grouping;
