-- question: What was run, and what came of it?
-- reads: trials
-- column trial_id: hash of what determines the trial
-- column stage: adapt or final
-- column subject: name of the subject
-- column fixer: registry name of the approach
-- column seed: seed of the fix
-- column outcome: OK, CORRUPTED, FAILURE or UNADAPTABLE
-- column reason_code: why, for machines; null when OK
-- column accuracy_fixed: accuracy of the fixed model on test; higher is better [fraction]
-- column repair_rate: RR; higher is better [fraction]
-- column negative_flip_rate: NFR; lower is better [fraction]
-- column asr_fixed: attack success rate against the fixed model; lower is better [fraction]
-- column aaod_fixed: AAOD of the fixed model; lower is fairer [fraction]
-- column accuracy_valid_fixed: accuracy of the fixed model on valid, which selects hyper-parameters [fraction]
-- column fix_seconds: time of the fix alone [seconds]
-- column attempts: attempts made, retries after out-of-memory included
-- column params: hyper-parameters, as JSON
-- column reason: why, as one sentence; null when OK
SELECT
    trial_id, stage, subject, fixer, seed, outcome, reason_code, accuracy_fixed, repair_rate, negative_flip_rate,
    asr_fixed, aaod_fixed, accuracy_valid_fixed, fix_seconds, attempts, params, reason
FROM trials
ORDER BY stage DESC, subject, fixer, params, seed, trial_id;
