-- question: Which trials are not OK, and why?
-- reads: trials
-- column stage: adapt or final
-- column fixer: registry name of the approach
-- column subject: subject
-- column outcome: CORRUPTED, FAILURE or UNADAPTABLE
-- column reason_code: why, for machines
-- column reason: why, as a sentence; of the trial in the last column
-- column phase: where a FAILURE happened: load, fix or evaluate
-- column n_trials: trials that ended so [trials]
-- column attempts: most attempts that one of them got [attempts]
-- column trial_id: one of them; its row has the traceback
SELECT
    stage, fixer, subject, outcome, reason_code,
    arg_min(reason, trial_id) AS reason,
    phase,
    count(*) AS n_trials,
    max(attempts) AS attempts,
    min(trial_id) AS trial_id
FROM latest
WHERE outcome <> 'OK'
GROUP BY stage, fixer, subject, outcome, reason_code, phase
ORDER BY outcome, fixer, subject, stage DESC, reason_code, phase;
