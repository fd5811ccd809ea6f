-- question: How far is the study?
-- reads: trials
-- column planned: trials of the plan; null when the folder doesn't say [trials]
-- column done: trials that have a row, of the plan where it lists them [trials]
-- column remaining: planned - done, 0 when more are done; null without a plan [trials]
-- column extra: rows of trials that are not in the plan: earlier code, data or settings [trials]
-- column n_ok: done and OK [trials]
-- column n_corrupted: done and CORRUPTED [trials]
-- column n_failure: done and FAILURE [trials]
-- column n_unadaptable: done and UNADAPTABLE [trials]
-- column trial_seconds: time of all these trials, load, fix and evaluate [seconds]
-- column first_start: start of the first trial [UTC]
-- column last_start: start of the latest trial [UTC]
WITH counted AS (
    SELECT t.*, p.planned, p.trial_ids IS NULL OR list_contains(p.trial_ids, t.trial_id) AS is_planned
    -- A trial that was repeated after a change of code or data is one trial of the plan.
    FROM latest AS t, plan AS p
)
SELECT
    (SELECT planned FROM plan) AS planned,
    count(*) FILTER (is_planned) AS done,
    -- least() passes over null, which the difference does not.
    (SELECT planned FROM plan) - least((SELECT planned FROM plan), count(*) FILTER (is_planned)) AS remaining,
    (SELECT count(*) FROM trials) - count(*) FILTER (is_planned) AS extra,
    count(*) FILTER (is_planned AND outcome = 'OK') AS n_ok,
    count(*) FILTER (is_planned AND outcome = 'CORRUPTED') AS n_corrupted,
    count(*) FILTER (is_planned AND outcome = 'FAILURE') AS n_failure,
    count(*) FILTER (is_planned AND outcome = 'UNADAPTABLE') AS n_unadaptable,
    sum(coalesce(load_seconds, 0) + coalesce(fix_seconds, 0) + coalesce(evaluate_seconds, 0) ORDER BY trial_id)
        AS trial_seconds,
    min(started_at)::TIMESTAMP AS first_start,
    max(started_at)::TIMESTAMP AS last_start
FROM counted;
