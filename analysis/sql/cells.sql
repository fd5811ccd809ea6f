-- question: What became of every fixer on every subject?
-- reads: trials
-- column subject: name of the subject
-- column fixer: registry name of the approach
-- column abbreviation: the study's abbreviation of the approach
-- column level: model, layer or neuron
-- column params: selected hyper-parameters, as JSON
-- column stage: final, or adapt where no final trial was run
-- column n_ok: seeds that are OK; the figures are means over these
-- column n_corrupted: seeds that finished and lost too much accuracy
-- column n_failure: seeds that didn't finish
-- column n_unadaptable: seeds whose requirements weren't met
-- column outcome: the most frequent outcome of the seeds, the worse of two that are equally frequent
-- column reason_code: most frequent reason of the seeds with this outcome, or with the commonest other one where it is OK
-- column reason: the same as a sentence, of one of these seeds
-- column accuracy_original: accuracy of the original model on test [fraction]
-- column accuracy_fixed: accuracy of the fixed model on test; higher is better [fraction]
-- column repair_rate: RR, share of the failures that are repaired; higher is better [fraction]
-- column negative_flip_rate: NFR, share of all test samples that get broken; lower is better [fraction]
-- column asr_original: attack success rate against the original; lower is better [fraction]
-- column asr_fixed: attack success rate against the fixed model; lower is better [fraction]
-- column aaod_original: AAOD of the original model; lower is fairer [fraction]
-- column aaod_fixed: AAOD of the fixed model; lower is fairer [fraction]
-- column n_test: denominator of NFR and accuracy [samples]
-- column n_wrong: denominator of RR: test samples that the original gets wrong [samples]
-- column n_attacked: denominator of ASR: attacked samples, those of the seed with fewest [samples]
SELECT
    subject, fixer, abbreviation, level, params, stage, n_ok, n_corrupted, n_failure, n_unadaptable, outcome,
    reason_code, reason, accuracy_original, accuracy_fixed, repair_rate, negative_flip_rate, asr_original, asr_fixed,
    aaod_original, aaod_fixed, n_test, n_wrong, n_attacked
FROM cells
ORDER BY subject, fixer;
