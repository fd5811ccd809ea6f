-- question: How busy were the nodes and GPUs while the study ran?
-- reads: trials
-- column place: node, or node and GPU
-- column hour: start of the interval, of 48 equal ones from the first trial to the last [hours]
-- column hours: length of the interval [hours]
-- column running: trials that ran at once, on average [trials]
-- column busy_share: for a GPU the part of it that was given to trials; for a node running, over the most that ever ran there at once [fraction]
WITH ran AS (
    SELECT
        coalesce(host, '?') || coalesce(' GPU ' || gpu, '') AS place,
        gpu IS NOT NULL AS is_gpu,
        CASE WHEN gpu IS NOT NULL THEN coalesce(gpu_share, 1.0) ELSE 1.0 END AS part,
        epoch(started_at) AS begun,
        epoch(started_at) + fix_seconds + coalesce(evaluate_seconds, 0) AS ended
    FROM trials
    WHERE started_at IS NOT NULL AND fix_seconds > 0
),
span AS (
    SELECT min(begun) AS origin, (max(ended) - min(begun)) / 48 AS step FROM ran
),
-- An end counts before a begin at the same moment.
events AS (
    SELECT place, begun AS moment, 1 AS change FROM ran
    UNION ALL
    SELECT place, ended, -1 FROM ran
),
crowd AS (
    SELECT place, sum(change) OVER (PARTITION BY place ORDER BY moment, change ROWS UNBOUNDED PRECEDING) AS at_once
    FROM events
),
most AS (
    SELECT place, max(at_once) AS at_once FROM crowd GROUP BY place
),
intervals AS (
    SELECT p.place, i.n, s.origin + i.n * s.step AS begun, s.origin + (i.n + 1) * s.step AS ended, s.step
    FROM span AS s, range(48) AS i(n), (SELECT DISTINCT place FROM ran) AS p
)
SELECT
    i.place,
    i.n * i.step / 3600 AS hour,
    i.step / 3600 AS hours,
    -- The filter, because least() and greatest() pass over the nulls of an interval in which nothing ran.
    coalesce(sum(least(r.ended, i.ended) - greatest(r.begun, i.begun)) FILTER (r.part IS NOT NULL), 0)
    / i.step AS running,
    coalesce(sum((least(r.ended, i.ended) - greatest(r.begun, i.begun)) * r.part), 0)
    / i.step
    / CASE WHEN any_value(r.is_gpu) THEN 1 ELSE m.at_once END AS busy_share
FROM intervals AS i
INNER JOIN most AS m USING (place)
LEFT JOIN ran AS r ON r.place = i.place AND r.begun < i.ended AND r.ended > i.begun
GROUP BY i.place, i.n, i.step, m.at_once
ORDER BY i.place, i.n;
