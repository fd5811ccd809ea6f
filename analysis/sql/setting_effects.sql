-- question: What is one setting worth, everything else and the seed being equal (a grid, an ablation)?
-- reads: trials
-- column fixer: registry name of the approach
-- column subject: subject
-- column parameter: hyper-parameter with more than one value among final trials
-- column value: the value looked at, as JSON
-- column instead_of: its value in the configuration that does best on valid, as JSON
-- column n_seeds: different seeds of the pairs; a difference of one seed may be chance
-- column n_pairs: pairs of trials that are OK, of one seed, and differ in nothing else; in a grid several per seed [pairs]
-- column repair_rate: mean RR with this value - mean RR with the other; below 0 it repairs less [fraction]
-- column repair_rate_low: smallest difference over the pairs [fraction]
-- column repair_rate_high: largest difference over the pairs [fraction]
-- column negative_flip_rate: mean difference of NFR; above 0 it breaks more [fraction]
-- column accuracy: mean difference of accuracy; below 0 it is worse [fraction]
WITH judged AS MATERIALIZED (
    SELECT fixer, subject, seed, params, repair_rate, negative_flip_rate, accuracy_fixed
    FROM latest
    WHERE stage = 'final' AND outcome = 'OK'
        AND repair_rate IS NOT NULL AND negative_flip_rate IS NOT NULL AND accuracy_fixed IS NOT NULL
),
-- JSON is taken apart once per configuration and not once per trial, and only where there are two to compare.
compared AS (
    SELECT DISTINCT fixer, subject, params
    FROM judged
    QUALIFY count(*) OVER (PARTITION BY fixer, subject) > 1
),
exploded AS (
    SELECT fixer, subject, params, entry.key AS parameter, entry.value::VARCHAR AS value
    FROM compared, json_each(params) AS entry
),
varying AS (
    SELECT fixer, subject, parameter
    FROM exploded
    GROUP BY fixer, subject, parameter
    HAVING min(value) <> max(value)
),
settings AS MATERIALIZED (
    SELECT *, json_merge_patch(params, json_object(parameter, NULL))::VARCHAR AS others
    FROM exploded
    SEMI JOIN varying USING (fixer, subject, parameter)
),
chosen AS (
    SELECT DISTINCT fixer, subject, entry.key AS parameter, entry.value::VARCHAR AS instead_of
    FROM (SELECT DISTINCT fixer, subject, params FROM selected SEMI JOIN varying USING (fixer, subject)) AS choice,
        json_each(params) AS entry
),
pairs AS (
    SELECT this.fixer, this.subject, this.parameter, this.value, chosen.instead_of, this.params, other.params AS instead
    FROM settings AS this
    JOIN chosen USING (fixer, subject, parameter)
    JOIN settings AS other
        ON other.fixer = this.fixer AND other.subject = this.subject AND other.parameter = this.parameter
        AND other.others = this.others AND other.value = chosen.instead_of
    WHERE this.value <> chosen.instead_of
)
SELECT
    pairs.fixer, pairs.subject, pairs.parameter, pairs.value, pairs.instead_of,
    count(DISTINCT this.seed) AS n_seeds,
    count(*) AS n_pairs,
    avg(this.repair_rate - other.repair_rate ORDER BY this.seed) AS repair_rate,
    min(this.repair_rate - other.repair_rate) AS repair_rate_low,
    max(this.repair_rate - other.repair_rate) AS repair_rate_high,
    avg(this.negative_flip_rate - other.negative_flip_rate ORDER BY this.seed) AS negative_flip_rate,
    avg(this.accuracy_fixed - other.accuracy_fixed ORDER BY this.seed) AS accuracy
FROM pairs
JOIN judged AS this ON this.fixer = pairs.fixer AND this.subject = pairs.subject AND this.params = pairs.params
JOIN judged AS other
    ON other.fixer = pairs.fixer AND other.subject = pairs.subject AND other.params = pairs.instead
    AND other.seed = this.seed
GROUP BY ALL
ORDER BY pairs.fixer, pairs.subject, pairs.parameter, pairs.value;
