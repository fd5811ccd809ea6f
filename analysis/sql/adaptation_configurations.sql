-- question: What did each set of hyper-parameters of a sweep give, on valid?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column abbreviation: the study's abbreviation of the approach
-- column level: model, layer or neuron
-- column params: the set, as JSON; short rungs of successive halving are no sets and left out
-- column is_chosen: whether the final trials run with it
-- column gain: accuracy on valid - that of the original; below 0 it harms [fraction]
-- column accuracy_valid: accuracy on valid; null where the trial isn't OK; higher is better [fraction]
-- column repair_rate_valid: RR on valid; higher is better [fraction]
-- column negative_flip_rate_valid: NFR on valid; lower is better [fraction]
-- column fix_seconds: time of the fix [seconds]
SELECT
    c.subject, c.fixer, c.abbreviation, c.level, c.params, s.params IS NOT NULL AS is_chosen,
    c.gain, c.accuracy_valid, c.repair_rate_valid, c.negative_flip_rate_valid, c.fix_seconds
FROM configurations AS c
LEFT JOIN (SELECT DISTINCT subject, fixer, params FROM selected) AS s USING (subject, fixer, params)
ORDER BY c.subject, c.fixer, c.gain DESC NULLS LAST, c.params;
