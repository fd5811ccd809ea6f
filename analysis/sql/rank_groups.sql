-- question: How do the fixers rank over all subjects, and does that hang on how failed cells are counted?
-- reads: trials
-- column metric: accuracy, repair_rate, negative_flip_rate, asr, aaod or fix_seconds
-- column policy: own: each over the subjects where it is OK; complete: only fixers OK on all; worst: not OK ties last
-- column fixer: registry name of the approach
-- column n_subjects: subjects in the mean; none whose original has no failure [subjects]
-- column n_missing: subjects where the fixer is not OK, of those with the metric and those where no fixer is OK [subjects]
-- column mean_rank: mean of the ranks within subjects, ties share the mean rank; lower is better
-- column mean_relative_rank: mean of rank / number of fixers ranked on the subject; lower is better [fraction]
-- column place: by mean_rank within metric and policy (own: by mean_relative_rank); 1 is best
WITH repairable AS (
    FROM cells
    QUALIFY max(n_wrong) OVER (PARTITION BY subject) IS DISTINCT FROM 0
),
long AS (
    -- cost: lower is better, for every metric. ASR and AAOD as their rise, since the originals differ.
    SELECT subject, fixer, metric, round(cost, 12) AS cost
    FROM (
        SELECT
            subject, fixer,
            -accuracy_fixed AS accuracy,
            -repair_rate AS repair_rate,
            negative_flip_rate,
            asr_fixed - asr_original AS asr,
            aaod_fixed - aaod_original AS aaod,
            fix_seconds
        FROM repairable
        WHERE outcome = 'OK'
    )
    UNPIVOT (cost FOR metric IN (accuracy, repair_rate, negative_flip_rate, asr, aaod, fix_seconds))
),
grid AS (
    SELECT s.metric, s.subject, f.fixer, long.cost
    FROM (
        SELECT DISTINCT metric, subject FROM long
        UNION ALL
        -- Where no fixer is OK all are missing alike, but for AAOD: nothing says whether the subject has groups.
        SELECT m.metric, n.subject
        FROM (SELECT DISTINCT metric FROM long WHERE metric <> 'aaod') AS m
        CROSS JOIN (SELECT subject FROM repairable GROUP BY subject HAVING count(*) FILTER (outcome = 'OK') = 0) AS n
    ) AS s
    CROSS JOIN (SELECT DISTINCT fixer FROM cells) AS f
    LEFT JOIN long USING (metric, subject, fixer)
),
coverage AS (
    SELECT *, count(*) FILTER (cost IS NULL) OVER (PARTITION BY metric, fixer) AS n_missing
    FROM grid
),
policies AS (
    SELECT 'own' AS policy, * FROM coverage WHERE cost IS NOT NULL
    UNION ALL
    SELECT 'complete' AS policy, * FROM coverage WHERE n_missing = 0
    UNION ALL
    SELECT 'worst' AS policy, * REPLACE (coalesce(cost, 'infinity'::DOUBLE) AS cost) FROM coverage
),
ranked AS (
    SELECT
        *,
        rank() OVER (PARTITION BY policy, metric, subject ORDER BY cost)
        + (count(*) OVER (PARTITION BY policy, metric, subject, cost) - 1) / 2 AS rank,
        count(*) OVER (PARTITION BY policy, metric, subject) AS n_ranked
    FROM policies
),
averaged AS (
    SELECT
        metric, policy, fixer,
        count(*) AS n_subjects,
        any_value(n_missing) AS n_missing,
        avg(rank ORDER BY subject) AS mean_rank,
        avg(rank / n_ranked ORDER BY subject) AS mean_relative_rank
    FROM ranked
    GROUP BY metric, policy, fixer
)
SELECT
    *,
    rank() OVER (
        PARTITION BY metric, policy
        ORDER BY round(CASE WHEN policy = 'own' THEN mean_relative_rank ELSE mean_rank END, 9)
    ) AS place
FROM averaged
ORDER BY metric, policy, place, fixer;
