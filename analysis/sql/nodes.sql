-- question: Which node ran what, and when did it last begin a trial?
-- reads: trials
-- column host: name of the node
-- column n_trials: trials that it ran [trials]
-- column n_fixers: fixers that it ran [fixers]
-- column n_failure: of the trials, FAILURE [trials]
-- column trial_seconds: time of its trials, load, fix and evaluate [seconds]
-- column last_start: start of its latest trial [UTC]
SELECT
    host,
    count(*) AS n_trials,
    count(DISTINCT fixer) AS n_fixers,
    count(*) FILTER (outcome = 'FAILURE') AS n_failure,
    sum(coalesce(load_seconds, 0) + coalesce(fix_seconds, 0) + coalesce(evaluate_seconds, 0)) AS trial_seconds,
    max(started_at)::TIMESTAMP AS last_start
FROM trials
WHERE host IS NOT NULL
GROUP BY host
ORDER BY host;
