-- question: What became of each fixer on each subject?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column level: model, layer or neuron
-- column outcome: most frequent outcome of the seeds; of two that are equally frequent, the worse
-- column n_seeds: seeds run [trials]
-- column n_ok: seeds that are OK [trials]
-- column n_corrupted: seeds that ruined the accuracy [trials]
-- column n_failure: seeds that didn't finish [trials]
-- column n_unadaptable: seeds whose subject lacks what the fixer requires [trials]
-- column reason_code: most frequent reason of the seeds with this outcome, or with the commonest other one where it is OK
-- column reason: the same as a sentence, of one of these seeds
SELECT
    subject, fixer, level, outcome, n_seeds, n_ok, n_corrupted, n_failure, n_unadaptable, reason_code, reason
FROM cells
ORDER BY subject, level DESC, fixer;
