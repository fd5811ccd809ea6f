-- question: Do the results contradict themselves?
-- reads: trials, predictions, subjects
-- parameter rounding = 0.005: deviation allowed to rows with rates but no counts, as published tables have [fraction]
-- column severity: error: don't trust the figure; warning: comparisons with it are uneven
-- column check: what was checked
-- column subject: subject; null where it isn't about one
-- column fixer: registry name of the approach; null where it isn't about one
-- column trial_id: the trial; null where it isn't about one
-- column expected: what the rest of the results says; null where there is no number
-- column found: what stands there; null where there is no number
-- column detail: the finding as a sentence
WITH counted AS MATERIALIZED (
    SELECT * FROM tallies
),
fixers AS MATERIALIZED (
    SELECT subject, fixer, stage, n_seeds FROM cells
),
evaluated AS (
    SELECT
        *,
        -- Counts determine the rates; without them the rates are somebody's rounded figures.
        CASE WHEN n_repaired IS NULL THEN $rounding ELSE 0.000001 END AS tolerance
    FROM trials
    WHERE accuracy_fixed IS NOT NULL
),
stated AS (
    -- Trials of a sweep are judged on valid alone.
    SELECT *, CASE WHEN stage = 'adapt' THEN accuracy_valid_fixed ELSE accuracy_fixed END AS judged FROM trials
),
measured AS (
    SELECT * FROM evaluated WHERE n_repaired IS NOT NULL
),
compared AS (
    SELECT t.subject, t.fixer, t.trial_id, unnest([
        {'name': 'n_test', 'expected': c.n_test::DOUBLE, 'found': t.n_test::DOUBLE},
        {'name': 'n_wrong', 'expected': c.n_wrong, 'found': t.n_wrong},
        {'name': 'n_repaired', 'expected': c.n_repaired, 'found': t.n_repaired},
        {'name': 'n_broken', 'expected': c.n_broken, 'found': t.n_broken},
        {'name': 'accuracy_original', 'expected': c.accuracy_original, 'found': t.accuracy_original},
        {'name': 'accuracy_fixed', 'expected': c.accuracy_fixed, 'found': t.accuracy_fixed},
        {'name': 'repair_rate', 'expected': c.repair_rate, 'found': t.repair_rate},
        {'name': 'negative_flip_rate', 'expected': c.negative_flip_rate, 'found': t.negative_flip_rate}
    ]) AS pair
    FROM measured AS t
    JOIN counted AS c USING (trial_id)
    UNION ALL
    SELECT t.subject, t.fixer, t.trial_id, unnest([
        {'name': 'aaod_original', 'expected': f.aaod_original, 'found': t.aaod_original},
        {'name': 'aaod_fixed', 'expected': f.aaod_fixed, 'found': t.aaod_fixed}
    ]) AS pair
    FROM measured AS t
    JOIN fairness AS f USING (trial_id)
),
ranges AS (
    SELECT subject, fixer, trial_id, unnest([
        {'name': 'accuracy_original', 'found': accuracy_original},
        {'name': 'accuracy_fixed', 'found': accuracy_fixed},
        {'name': 'repair_rate', 'found': repair_rate},
        {'name': 'negative_flip_rate', 'found': negative_flip_rate},
        {'name': 'asr_original', 'found': asr_original},
        {'name': 'asr_fixed', 'found': asr_fixed},
        {'name': 'aaod_original', 'found': aaod_original},
        {'name': 'aaod_fixed', 'found': aaod_fixed}
    ]) AS pair
    FROM trials
),
findings AS (
    SELECT
        'error' AS severity, 'identity' AS "check", subject, fixer, trial_id,
        accuracy_original + coalesce(repair_rate, 0) * (1 - accuracy_original) - negative_flip_rate AS expected,
        accuracy_fixed AS found,
        'Accuracy, RR and NFR contradict each other: ACC must be ACC0 + RR (1 - ACC0) - NFR.' AS detail
    FROM evaluated
    WHERE abs(expected - found) > tolerance
    UNION ALL
    SELECT
        'error', 'range', subject, fixer, trial_id, NULL, pair.found,
        pair.name || ' is not a fraction between 0 and 1.'
    FROM ranges
    WHERE NOT (pair.found BETWEEN 0 AND 1)
    UNION ALL
    SELECT
        'error', 'counts', subject, fixer, trial_id, NULL, NULL,
        format('No predictions have these counts: {} tested, {} wrong, {} repaired, {} broken.', n_test, n_wrong, n_repaired, n_broken)
    FROM measured
    WHERE n_wrong > n_test OR n_repaired > n_wrong OR n_broken > n_test - n_wrong OR least(n_repaired, n_broken) < 0
    UNION ALL
    SELECT
        'error', 'predictions', subject, fixer, trial_id, n_test, NULL, 'The predictions of this trial are missing.'
    FROM measured
    ANTI JOIN counted USING (trial_id)
    UNION ALL
    SELECT
        'error', 'recomputed', subject, fixer, trial_id, pair.expected, pair.found,
        pair.name || ' of the trial''s row is not what its predictions give.'
    FROM compared
    WHERE abs(pair.expected - pair.found) > 0.000001 OR (pair.expected IS NULL) <> (pair.found IS NULL)
    UNION ALL
    SELECT
        'error', 'samples', t.subject, t.fixer, t.trial_id, NULL, NULL,
        'The predictions are not those of the samples 0 to n_test - 1.'
    FROM measured AS t
    JOIN counted AS c USING (trial_id)
    WHERE NOT c.is_complete
    UNION ALL
    SELECT
        'error', 'duplicate', any_value(subject), any_value(fixer), trial_id, 1, count(*), 'The trial has several rows.'
    FROM trials
    GROUP BY trial_id
    HAVING count(*) > 1
    UNION ALL
    SELECT
        'error', 'outcome', subject, fixer, trial_id, NULL, NULL,
        CASE
            WHEN outcome IS NULL OR outcome NOT IN ('OK', 'CORRUPTED', 'FAILURE', 'UNADAPTABLE')
            THEN format('The outcome is {} and must be OK, CORRUPTED, FAILURE or UNADAPTABLE.', coalesce(outcome, 'missing'))
            WHEN outcome = 'OK' AND judged IS NULL THEN 'The trial is OK and has no accuracy.'
            WHEN outcome = 'OK' THEN 'The trial belongs to a sweep, which must not see the test split, and has an accuracy there.'
            WHEN reason IS NULL OR reason_code IS NULL THEN format('The trial is {} and doesn''t say why.', outcome)
            ELSE format('The trial is {} and has an accuracy of a model that doesn''t exist.', outcome)
        END
    FROM stated
    WHERE
        outcome IS NULL OR outcome NOT IN ('OK', 'CORRUPTED', 'FAILURE', 'UNADAPTABLE')
        OR (outcome = 'OK' AND (judged IS NULL OR (stage = 'adapt' AND accuracy_fixed IS NOT NULL)))
        OR (outcome <> 'OK' AND (reason IS NULL OR reason_code IS NULL))
        OR (outcome IN ('FAILURE', 'UNADAPTABLE') AND judged IS NOT NULL)
    UNION ALL
    SELECT
        'error', 'baseline', subject, NULL, NULL, min(accuracy_original), max(accuracy_original),
        'Trials of the same subject start from originals of different accuracy.'
    FROM latest
    WHERE accuracy_original IS NOT NULL
    GROUP BY subject
    HAVING max(accuracy_original) - min(accuracy_original) > 0.000001
    UNION ALL
    SELECT
        'error', 'data', subject, NULL, NULL, 1, count(DISTINCT subject_fingerprint),
        'Its final trials ran on different data, splits or original weights, so its fixers can''t be compared.'
    FROM selected
    WHERE accuracy_original IS NOT NULL
    GROUP BY subject
    HAVING count(DISTINCT subject_fingerprint) > 1
    UNION ALL
    SELECT
        'warning', 'superseded', subject, fixer, NULL, count(DISTINCT (stage, params, seed)), count(*),
        'Some trials were repeated with other code or data; the newest counts.'
    FROM trials
    GROUP BY subject, fixer
    HAVING count(DISTINCT (stage, params, seed)) < count(DISTINCT trial_id)
    UNION ALL
    SELECT
        'warning', 'seeds', subject, fixer, NULL, (SELECT max(n_seeds) FROM fixers WHERE stage = 'final'), n_seeds,
        'The fixer has fewer seeds here than elsewhere in the study.'
    FROM fixers
    WHERE stage = 'final' AND n_seeds < (SELECT max(n_seeds) FROM fixers WHERE stage = 'final')
    UNION ALL
    SELECT
        'warning', 'missing cell', s.subject, f.fixer, NULL, NULL, NULL, 'The fixer has no result on this subject.'
    FROM (SELECT DISTINCT subject FROM fixers) AS s
    CROSS JOIN (SELECT DISTINCT fixer FROM fixers) AS f
    ANTI JOIN fixers AS c ON c.subject = s.subject AND c.fixer = f.fixer
)
SELECT * FROM findings
ORDER BY severity, "check", subject, fixer, trial_id, detail;
