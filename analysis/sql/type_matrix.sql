-- question: What does tuning on one failure type do to the others, and to what was right?
-- reads: type_trials, type_matrix
-- column subject: subject whose failures were divided
-- column grouping: how they were divided
-- column seed: of grouping, division and tuning
-- column type: failure type that the model was tuned on, from 1
-- column type_of_test: failure type that it is judged on; C for what the original gets right; All for both
-- column accuracy: of the tuned model; before it was 0 on types and 1 on C; higher is better [fraction]
-- column n: samples that judge [samples]
SELECT subject, grouping, seed, type, type_of_test, accuracy, n
FROM type_accuracies
WHERE repair = 'matrix'
ORDER BY subject, grouping, seed, type, try_cast(type_of_test AS INTEGER) NULLS LAST, type_of_test DESC;
