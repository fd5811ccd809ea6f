-- question: What is in each failure type, and of what is there more than among all failures?
-- reads: failure_types, type_trials
-- parameter most_values = 200: metadata with more values than this is left out, such as a name of its own for each sample
-- column subject: subject whose failures were divided
-- column grouping: how they were divided
-- column seed: of the grouping
-- column type: failure type, from 1
-- column n_type: failures of the type [samples]
-- column aspect: what is said of them: label, prediction, label and prediction, or a metadata column
-- column value: which one
-- column n: failures of the type of which it is said [samples]
-- column share: n / n_type [fraction]
-- column lift: share / share among all failures; above 1 where the type has more of it than the others [times]
WITH failures AS (
    SELECT *, row_number() OVER () AS failure
    FROM latest_failure_types
),
facts AS (
    SELECT subject, grouping, seed, type, failure, 'label' AS aspect, coalesce(class_name, label::VARCHAR) AS value FROM failures
    UNION ALL
    SELECT subject, grouping, seed, type, failure, 'prediction', coalesce(prediction_name, prediction::VARCHAR) FROM failures
    UNION ALL
    SELECT
        subject, grouping, seed, type, failure, 'label and prediction',
        coalesce(class_name, label::VARCHAR) || ' taken for ' || coalesce(prediction_name, prediction::VARCHAR)
    FROM failures
    UNION ALL
    SELECT subject, grouping, seed, type, failure, entry.key, entry.value
    FROM (SELECT subject, grouping, seed, type, failure, unnest(map_entries(metadata)) AS entry FROM failures)
    QUALIFY count(DISTINCT entry.value) OVER (PARTITION BY subject, entry.key) <= $most_values
),
counts AS (
    SELECT
        subject, grouping, seed, type, aspect, value, count(*) AS n,
        sum(count(*)) OVER (PARTITION BY subject, grouping, seed, type, aspect) AS n_type,
        sum(count(*)) OVER (PARTITION BY subject, grouping, seed, aspect, value) AS n_value,
        sum(count(*)) OVER (PARTITION BY subject, grouping, seed, aspect) AS n_all
    FROM facts
    GROUP BY subject, grouping, seed, type, aspect, value
)
SELECT
    subject, grouping, seed, type, n_type::BIGINT AS n_type, aspect, value, n, n / n_type AS share,
    (n / n_type) / (n_value / n_all) AS lift
FROM counts
ORDER BY subject, grouping, seed, type, aspect, n DESC, value NULLS LAST;
