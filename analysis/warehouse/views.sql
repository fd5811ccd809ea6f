-- What most questions start from. Over `trials`, `predictions`, `subjects`. Means are taken in a fixed order: the same
-- results give the same figures to the last bit, and equal choices are not told apart by rounding.

-- The newest row of every stage, fixer, subject, parameters and seed. Older ones are of earlier code or data, and so of
-- earlier runs: clocks of nodes differ, and jump.
CREATE OR REPLACE VIEW latest AS
FROM trials
QUALIFY row_number() OVER (
    PARTITION BY stage, fixer, subject, params, seed
    ORDER BY run DESC NULLS LAST, started_at DESC NULLS LAST, trial_id
) = 1;

-- Final trials with one choice of parameters per fixer and subject: the best on valid. Test plays no part in it.
CREATE OR REPLACE VIEW selected AS
WITH choice AS (
    SELECT fixer, subject, params, avg(accuracy_valid_fixed ORDER BY trial_id) AS accuracy_valid
    FROM latest
    WHERE stage = 'final'
    GROUP BY fixer, subject, params
    QUALIFY row_number() OVER (PARTITION BY fixer, subject ORDER BY accuracy_valid DESC NULLS LAST, params) = 1
)
FROM latest
SEMI JOIN choice USING (fixer, subject, params)
WHERE stage = 'final';

-- One row per fixer and subject over the seeds of `selected`, or over the trials of its adaptation where none of them
-- is OK and so no final trial was run. Figures are means over the seeds that are OK; outcome is the most frequent one,
-- the worse of two that are equally frequent. Reason and its code are of one trial: of the most frequent outcome that
-- isn't OK, with the most frequent code and of these the most frequent sentence.
CREATE OR REPLACE VIEW cells AS
WITH adaptations AS (
    FROM latest
    WHERE stage = 'adapt'
    QUALIFY count(*) FILTER (outcome = 'OK') OVER (PARTITION BY fixer, subject) = 0
),
judged AS (
    FROM selected
    UNION ALL
    FROM adaptations ANTI JOIN selected USING (fixer, subject)
),
reasons AS (
    SELECT subject, fixer, code, sentence
    FROM (
        SELECT
            subject, fixer, outcome, reason_code AS code, reason AS sentence,
            count(*) AS n,
            sum(count(*)) OVER (PARTITION BY subject, fixer, outcome) AS n_of_outcome,
            sum(count(*)) OVER (PARTITION BY subject, fixer, outcome, reason_code) AS n_of_code
        FROM judged
        WHERE outcome <> 'OK'
        GROUP BY subject, fixer, outcome, reason_code, reason
    )
    QUALIFY row_number() OVER (
        PARTITION BY subject, fixer
        ORDER BY
            n_of_outcome DESC, list_position(['FAILURE', 'CORRUPTED', 'UNADAPTABLE'], outcome) NULLS LAST,
            code IS NULL, n_of_code DESC, code, sentence IS NULL, n DESC, sentence
    ) = 1
)
SELECT
    subject,
    fixer,
    any_value(abbreviation) AS abbreviation,
    any_value(level) AS level,
    any_value(dataset) AS dataset,
    any_value(architecture) AS architecture,
    min(params) AS params,
    any_value(stage) AS stage,
    count(*) AS n_seeds,
    count(*) FILTER (outcome = 'OK') AS n_ok,
    count(*) FILTER (outcome = 'CORRUPTED') AS n_corrupted,
    count(*) FILTER (outcome = 'FAILURE') AS n_failure,
    count(*) FILTER (outcome = 'UNADAPTABLE') AS n_unadaptable,
    CASE greatest(n_failure, n_corrupted, n_unadaptable, n_ok)
        WHEN n_failure THEN 'FAILURE'
        WHEN n_corrupted THEN 'CORRUPTED'
        WHEN n_unadaptable THEN 'UNADAPTABLE'
        ELSE 'OK'
    END AS outcome,
    any_value(code) AS reason_code,
    any_value(sentence) AS reason,
    coalesce(avg(accuracy_original ORDER BY trial_id) FILTER (outcome = 'OK'), avg(accuracy_original ORDER BY trial_id)) AS accuracy_original,
    avg(accuracy_fixed ORDER BY trial_id) FILTER (outcome = 'OK') AS accuracy_fixed,
    avg(repair_rate ORDER BY trial_id) FILTER (outcome = 'OK') AS repair_rate,
    avg(negative_flip_rate ORDER BY trial_id) FILTER (outcome = 'OK') AS negative_flip_rate,
    avg(asr_original ORDER BY trial_id) FILTER (outcome = 'OK') AS asr_original,
    avg(asr_fixed ORDER BY trial_id) FILTER (outcome = 'OK') AS asr_fixed,
    avg(aaod_original ORDER BY trial_id) FILTER (outcome = 'OK') AS aaod_original,
    avg(aaod_fixed ORDER BY trial_id) FILTER (outcome = 'OK') AS aaod_fixed,
    max(n_test) AS n_test,
    max(n_wrong) AS n_wrong,
    avg(n_repaired ORDER BY trial_id) FILTER (outcome = 'OK') AS n_repaired,
    avg(n_broken ORDER BY trial_id) FILTER (outcome = 'OK') AS n_broken,
    min(n_attacked) FILTER (outcome = 'OK') AS n_attacked,
    median(fix_seconds) FILTER (outcome = 'OK') AS fix_seconds
FROM judged
LEFT JOIN reasons USING (subject, fixer)
GROUP BY subject, fixer;

-- One row per set of hyper-parameters that a sweep tried, judged on valid. How much a fixer depends on them is how much
-- `gain` differs between its rows. What successive halving ran with a part of the effort is left out: it is worse for
-- want of effort, not for its hyper-parameters.
CREATE OR REPLACE VIEW configurations AS
SELECT
    subject,
    fixer,
    any_value(abbreviation) AS abbreviation,
    any_value(level) AS level,
    params,
    count(*) AS n_trials,
    count(*) FILTER (outcome = 'OK') AS n_ok,
    avg(accuracy_valid_original ORDER BY trial_id) FILTER (outcome = 'OK') AS accuracy_valid_original,
    avg(accuracy_valid_fixed ORDER BY trial_id) FILTER (outcome = 'OK') AS accuracy_valid,
    avg(repair_rate_valid ORDER BY trial_id) FILTER (outcome = 'OK') AS repair_rate_valid,
    avg(negative_flip_rate_valid ORDER BY trial_id) FILTER (outcome = 'OK') AS negative_flip_rate_valid,
    avg(accuracy_valid_fixed - accuracy_valid_original ORDER BY trial_id) FILTER (outcome = 'OK') AS gain,
    median(fix_seconds) FILTER (outcome = 'OK') AS fix_seconds
FROM latest
WHERE stage = 'adapt' AND short_rung IS NOT TRUE
GROUP BY subject, fixer, params;

-- The predictions that a fix changed from wrong to right or from right to wrong, of the trials in `selected` that are OK.
CREATE OR REPLACE VIEW changes AS
SELECT
    s.subject, s.fixer, s.seed, p.trial_id, p.sample_id, p.label, p."group", p.original,
    p.fixed = p.label AS repaired,
    p.original = p.label AS broken
FROM predictions AS p
JOIN (SELECT trial_id, subject, fixer, seed FROM selected WHERE outcome = 'OK') AS s USING (trial_id)
WHERE p.original <> p.fixed AND (p.fixed = p.label OR p.original = p.label);

-- The trials in `selected` that are OK and have as many predictions as test samples. What is asked of the predictions is
-- asked of these trials: one that lacks some would pass for one that changes less. Of a subject whose data were changed
-- in between, only the trials on the data that most of them ran on, the newer of two: the same number is another sample
-- in other data.
CREATE OR REPLACE VIEW whole AS
SELECT trial_id, subject, fixer, seed, subject_fingerprint, n_test, n_wrong, aaod_fixed
FROM (
    SELECT
        *,
        count(*) OVER alike AS n_alike,
        max(run) OVER alike AS last_run,
        max(started_at) OVER alike AS last_start
    FROM selected
    SEMI JOIN (SELECT trial_id, count(*) AS n_test FROM predictions GROUP BY trial_id) USING (trial_id, n_test)
    WHERE outcome = 'OK'
    WINDOW alike AS (PARTITION BY subject, subject_fingerprint)
)
QUALIFY rank() OVER (
    PARTITION BY subject
    ORDER BY n_alike DESC, last_run DESC NULLS LAST, last_start DESC NULLS LAST, subject_fingerprint
) = 1;

-- Counts and rates of every trial from its predictions alone, to be held against the trial's own row.
CREATE OR REPLACE VIEW tallies AS
SELECT
    trial_id, n_test, n_wrong, n_repaired,
    n_test - n_wrong - n_right_after + n_repaired AS n_broken,
    (n_test - n_wrong) / n_test AS accuracy_original,
    n_right_after / n_test AS accuracy_fixed,
    n_repaired / nullif(n_wrong, 0) AS repair_rate,
    (n_test - n_wrong - n_right_after + n_repaired) / n_test AS negative_flip_rate,
    -- That none is there twice shows where trials of a subject are compared, in the query `baseline_drift`.
    first_sample = 0 AND last_sample = n_test - 1 AS is_complete
FROM (
    -- Three times count_if takes three quarters of the time of the four filters that say the same. A prediction that is
    -- missing isn't right.
    SELECT
        trial_id,
        count(*) AS n_test,
        count(*) - coalesce(count_if(original = label), 0)::BIGINT AS n_wrong,
        coalesce(count_if(fixed = label), 0)::BIGINT AS n_right_after,
        coalesce(count_if(original <> label AND fixed = label), 0)::BIGINT AS n_repaired,
        min(sample_id) AS first_sample,
        max(sample_id) AS last_sample
    FROM predictions
    GROUP BY trial_id
);

-- AAOD of every trial whose samples have groups, from its predictions alone. One-vs-rest over the subject's classes; a
-- rate with an empty denominator is 0. A prediction below 0 is no class. A trial with an empty group has no row.
CREATE OR REPLACE VIEW fairness AS
WITH combinations AS (
    SELECT trial_id, "group", label, original, fixed, count(*) AS n
    FROM predictions
    WHERE "group" IS NOT NULL
    GROUP BY trial_id, "group", label, original, fixed
),
margins AS (
    SELECT
        trial_id, "group", label AS class, n AS positives,
        n * (original = label)::INTEGER AS hits_original, n * (fixed = label)::INTEGER AS hits_fixed,
        0 AS named_original, 0 AS named_fixed
    FROM combinations
    UNION ALL
    SELECT trial_id, "group", original, 0, 0, 0, n, 0 FROM combinations
    UNION ALL
    SELECT trial_id, "group", fixed, 0, 0, 0, 0, n FROM combinations
),
counts AS (
    SELECT
        trial_id, "group", class,
        sum(positives) AS positives,
        sum(hits_original) AS hits_original,
        sum(hits_fixed) AS hits_fixed,
        sum(named_original) AS named_original,
        sum(named_fixed) AS named_fixed,
        sum(sum(positives)) OVER (PARTITION BY trial_id, "group") - sum(positives) AS negatives
    FROM margins
    GROUP BY trial_id, "group", class
),
rates AS (
    SELECT
        trial_id, class,
        2 * "group" - 1 AS sign,
        coalesce(hits_original / nullif(positives, 0), 0) AS tpr_original,
        coalesce(hits_fixed / nullif(positives, 0), 0) AS tpr_fixed,
        coalesce((named_original - hits_original) / nullif(negatives, 0), 0) AS fpr_original,
        coalesce((named_fixed - hits_fixed) / nullif(negatives, 0), 0) AS fpr_fixed
    FROM counts
    WHERE class >= 0
),
gaps AS (
    SELECT
        trial_id,
        abs(sum(sign * tpr_original)) + abs(sum(sign * fpr_original)) AS original,
        abs(sum(sign * tpr_fixed)) + abs(sum(sign * fpr_fixed)) AS fixed,
        min(sign) AS first_group, max(sign) AS last_group
    FROM rates
    GROUP BY trial_id, class
)
SELECT
    g.trial_id,
    0.5 * sum(g.original) / any_value(s.n_classes) AS aaod_original,
    0.5 * sum(g.fixed) / any_value(s.n_classes) AS aaod_fixed
FROM gaps AS g
JOIN trials AS t USING (trial_id)
JOIN subjects AS s ON s.fingerprint = t.subject_fingerprint
GROUP BY g.trial_id
HAVING min(first_group) < max(last_group);

-- The grouping that the newest type trials of a subject are of, by grouping and seed; older ones are of other data or code.
CREATE OR REPLACE VIEW type_keys AS
SELECT subject, grouping, seed, grouping_key
FROM type_trials
QUALIFY row_number() OVER (
    PARTITION BY subject, grouping, seed
    ORDER BY run DESC NULLS LAST, started_at DESC NULLS LAST, trial_id
) = 1;

-- Type trials of these groupings, and the newest of those that differ in settings only.
CREATE OR REPLACE VIEW latest_type_trials AS
FROM type_trials
SEMI JOIN type_keys USING (subject, grouping, seed, grouping_key)
QUALIFY row_number() OVER (
    PARTITION BY subject, grouping, seed, type, repair, outcome = 'UNADAPTABLE'
    ORDER BY run DESC NULLS LAST, started_at DESC NULLS LAST, trial_id
) = 1;

-- Failures in the types of these groupings.
CREATE OR REPLACE VIEW latest_failure_types AS
FROM failure_types SEMI JOIN type_keys USING (subject, grouping, seed, grouping_key);

-- What the newest model of every repair and type gets right of every type, of what was right (C) and of both (All).
CREATE OR REPLACE VIEW type_accuracies AS
SELECT t.subject, t.grouping, t.seed, t.type, t.repair, m.type_of_test, m.accuracy, m.n
FROM latest_type_trials AS t
JOIN type_matrix AS m USING (trial_id);
