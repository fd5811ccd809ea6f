-- question: What did every final trial with the selected hyper-parameters give, seed by seed?
-- reads: trials
-- column subject: name of the subject
-- column fixer: registry name of the approach
-- column trial_id: the trial
-- column subject_fingerprint: of the subject's data, splits and original
-- column seed: seed of the fix
-- column outcome: OK, CORRUPTED, FAILURE or UNADAPTABLE
-- column reason_code: why, for machines; null when OK
-- column accuracy_fixed: accuracy of the fixed model on test; higher is better [fraction]
-- column repair_rate: RR, share of the failures that are repaired; higher is better [fraction]
-- column negative_flip_rate: NFR, share of all test samples that get broken; lower is better [fraction]
-- column asr_original: attack success rate against the original, on the samples of this trial; lower is better [fraction]
-- column asr_fixed: attack success rate against the fixed model, on the same; lower is better [fraction]
-- column aaod_fixed: AAOD of the fixed model; lower is fairer [fraction]
-- column n_test: test samples [samples]
-- column n_wrong: test samples that the original gets wrong [samples]
-- column n_repaired: of those, samples that the fixed model gets right [samples]
-- column n_broken: test samples that only the original gets right [samples]
-- column fix_seconds: time of the fix alone [seconds]
-- column evaluate_seconds: time of the evaluation [seconds]
-- column peak_host_bytes: largest resident memory while fixing [bytes]
-- column peak_device_bytes: largest device memory while fixing; null on a CPU [bytes]
-- column gpu_shared: whether it was given part of a GPU; others that use it lengthen its time
SELECT
    subject, fixer, trial_id, subject_fingerprint, seed, outcome, reason_code, accuracy_fixed, repair_rate,
    negative_flip_rate, asr_original, asr_fixed, aaod_fixed, n_test, n_wrong, n_repaired,
    n_broken, fix_seconds, evaluate_seconds, peak_host_bytes, peak_device_bytes, gpu_shared
FROM selected
ORDER BY subject, fixer, seed, trial_id;
