-- question: What does each repair cost in broken samples, robustness and fairness?
-- reads: trials
-- parameter tolerance = 0.001: change that is too small to count as a repair or as harm [fraction]
-- column subject: subject
-- column fixer: registry name of the approach
-- column repair_rate: RR; higher is better [fraction]
-- column negative_flip_rate: NFR; lower is better [fraction]
-- column asr_rise: attack success rate, fixed - original; above 0 is worse; null where not measured [fraction]
-- column aaod_rise: AAOD, fixed - original; above 0 is less fair; null where not measured [fraction]
-- column asr_change: 100 (original - fixed) / original; higher is better [percent]
-- column aaod_change: 100 (original - fixed) / original; higher is better [percent]
-- column harmed: what got worse by more than the tolerance: NFR, ASR, AAOD
-- column class: a repairs and harms nothing; b harms one property; c two or three; d no measurable repair. The report also asks of a change that it exceeds half its interval, so its classes are more careful
WITH rises AS (
    SELECT
        subject, fixer, repair_rate, negative_flip_rate,
        asr_fixed - asr_original AS asr_rise,
        aaod_fixed - aaod_original AS aaod_rise,
        -100 * asr_rise / nullif(asr_original, 0) AS asr_change,
        -100 * aaod_rise / nullif(aaod_original, 0) AS aaod_change,
        list_filter(
            [
                CASE WHEN negative_flip_rate > $tolerance THEN 'NFR' END,
                CASE WHEN asr_rise > $tolerance THEN 'ASR' END,
                CASE WHEN aaod_rise > $tolerance THEN 'AAOD' END
            ],
            lambda harm: harm IS NOT NULL
        ) AS harmed
    FROM cells
    WHERE outcome = 'OK'
)
SELECT
    *,
    CASE
        WHEN coalesce(repair_rate, 0) <= $tolerance THEN 'd'
        WHEN len(harmed) = 0 THEN 'a'
        WHEN len(harmed) = 1 THEN 'b'
        ELSE 'c'
    END AS class
FROM rises
ORDER BY subject, class, repair_rate DESC NULLS LAST, fixer;
