-- question: Which kinds of test samples, by what their dataset says of them, does each fixer repair and break?
-- reads: trials, predictions, test_samples
-- parameter most_values = 200: metadata with more values than this is left out, such as a name of its own for each sample
-- column subject: subject whose samples have metadata
-- column fixer: registry name of the approach
-- column metadata: what is said of the samples, such as tissue or age
-- column value: what is said of these; null where it isn't known
-- column n_ok: seeds that are OK and have all predictions; the figures are means over these [trials]
-- column n_test: test samples of this value [samples]
-- column n_wrong: of these, samples the original gets wrong [samples]
-- column n_repaired: of those, samples the fixed model gets right; higher is better [samples]
-- column n_broken: samples of this value that only the original gets right; lower is better [samples]
-- column repair_rate: n_repaired / n_wrong; higher is better; null without failures [fraction]
-- column negative_flip_rate: n_broken / n_test of the value; lower is better [fraction]
-- column accuracy_original: accuracy of the original on these samples; higher is better [fraction]
-- column accuracy_fixed: accuracy of the fixed model on these samples; higher is better [fraction]
WITH judged AS MATERIALIZED (
    FROM whole
),
fixers AS (
    SELECT subject, fixer, count(*) AS n_ok
    FROM judged
    GROUP BY subject, fixer
),
-- Label and original prediction are the same in every trial of a subject, so one that is whole has them.
subject_trials AS (
    SELECT subject, min(trial_id) AS trial_id, arg_min(subject_fingerprint, trial_id) AS subject_fingerprint
    FROM judged
    GROUP BY subject
),
facts AS MATERIALIZED (
    SELECT subject, trial_id, sample_id, entry.key AS metadata, entry.value AS value
    FROM (
        SELECT j.subject, j.trial_id, s.sample_id, unnest(map_entries(s.metadata)) AS entry
        FROM test_samples AS s
        JOIN subject_trials AS j USING (subject_fingerprint)
    )
    QUALIFY count(DISTINCT value) OVER (PARTITION BY subject, metadata) <= $most_values
),
kinds AS (
    SELECT f.subject, f.metadata, f.value, count(*) AS n_test, count(*) FILTER (p.original <> p.label) AS n_wrong
    FROM facts AS f
    JOIN predictions AS p USING (trial_id, sample_id)
    GROUP BY f.subject, f.metadata, f.value
),
changed AS (
    SELECT
        c.subject, c.fixer, f.metadata, f.value,
        count(*) FILTER (c.repaired) AS repairs,
        count(*) FILTER (c.broken) AS breaks
    FROM changes AS c
    SEMI JOIN judged USING (trial_id)
    JOIN facts AS f USING (subject, sample_id)
    GROUP BY c.subject, c.fixer, f.metadata, f.value
)
SELECT
    f.subject, f.fixer, k.metadata, k.value, f.n_ok, k.n_test, k.n_wrong,
    coalesce(h.repairs, 0) / f.n_ok AS n_repaired,
    coalesce(h.breaks, 0) / f.n_ok AS n_broken,
    n_repaired / nullif(k.n_wrong, 0) AS repair_rate,
    n_broken / k.n_test AS negative_flip_rate,
    1 - k.n_wrong / k.n_test AS accuracy_original,
    1 - (k.n_wrong - n_repaired + n_broken) / k.n_test AS accuracy_fixed
FROM fixers AS f
JOIN kinds AS k USING (subject)
LEFT JOIN changed AS h
    ON h.subject = f.subject AND h.fixer = f.fixer AND h.metadata = k.metadata AND h.value IS NOT DISTINCT FROM k.value
ORDER BY f.subject, f.fixer, k.metadata, try_cast(k.value AS DOUBLE) NULLS LAST, k.value NULLS LAST;
