-- question: How much does each fixer improve each subject, and what does it break?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column abbreviation: the study's abbreviation
-- column level: model, layer or neuron
-- column outcome: most frequent outcome of the seeds
-- column n_seeds: seeds run [trials]
-- column n_ok: seeds that are OK; the figures are means over these [trials]
-- column n_wrong: test samples the original gets wrong, the denominator of RR [samples]
-- column accuracy_original: accuracy of the original on test; higher is better [fraction]
-- column accuracy_fixed: accuracy of the fixed model on test; higher is better [fraction]
-- column relative_change: 100 (fixed - original) / original of accuracy; higher is better [percent]
-- column repair_rate: RR, repaired failures / failures; higher is better [fraction]
-- column negative_flip_rate: NFR, broken samples / all test samples; lower is better [fraction]
-- column rank: by accuracy within the subject, 1 is best, ties share the better rank; null unless OK
SELECT
    subject, fixer, abbreviation, level, outcome, n_seeds, n_ok, n_wrong,
    accuracy_original, accuracy_fixed,
    100 * (accuracy_fixed - accuracy_original) / nullif(accuracy_original, 0) AS relative_change,
    repair_rate, negative_flip_rate,
    CASE WHEN outcome = 'OK' THEN
        rank() OVER (PARTITION BY subject, outcome = 'OK' ORDER BY round(accuracy_fixed, 12) DESC NULLS LAST)
    END AS rank
FROM cells
ORDER BY subject, rank NULLS LAST, fixer;
