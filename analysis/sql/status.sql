-- question: What is done of each fixer on each subject?
-- reads: trials
-- column stage: adapt or final
-- column fixer: registry name of the approach
-- column subject: subject
-- column n_trials: trials that have a row [trials]
-- column n_ok: of these, OK [trials]
-- column n_corrupted: of these, CORRUPTED [trials]
-- column n_failure: of these, FAILURE [trials]
-- column n_unadaptable: of these, UNADAPTABLE [trials]
-- column fix_seconds: mean time of a fix [seconds]
SELECT
    stage, fixer, subject,
    count(*) AS n_trials,
    count(*) FILTER (outcome = 'OK') AS n_ok,
    count(*) FILTER (outcome = 'CORRUPTED') AS n_corrupted,
    count(*) FILTER (outcome = 'FAILURE') AS n_failure,
    count(*) FILTER (outcome = 'UNADAPTABLE') AS n_unadaptable,
    avg(fix_seconds) AS fix_seconds
FROM latest
GROUP BY stage, fixer, subject
ORDER BY stage, fixer, subject;
