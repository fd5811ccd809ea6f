-- question: How busy were the nodes and GPUs while the study ran?
-- reads: trials
-- column place: node, or node and GPU
-- column hour: start of the interval, of 48 equal ones from the first trial to the last [hours]
-- column hours: length of the interval [hours]
-- column running: trials that ran at once, on average [trials]
-- column busy_share: for a GPU the part of it that was given to trials; for a node the cores that were given to trials over those it has, and for rows that don't say either, running over the most that ever ran there at once [fraction]
WITH ran AS (
    SELECT
        coalesce(host, '?') || coalesce(' GPU ' || gpu, '') AS place,
        gpu IS NOT NULL AS is_gpu,
        coalesce(gpu_share, 1.0) AS gpu_share,
        -- The one is of no use without the other.
        CASE WHEN cores_of_node > 0 THEN cores_given END AS cores_given,
        cores_of_node,
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
    SELECT place, begun AS moment, 1 AS change, coalesce(cores_given, 0) AS cores FROM ran
    UNION ALL
    SELECT place, ended, -1, -coalesce(cores_given, 0) FROM ran
),
crowd AS (
    SELECT place, sum(change) OVER so_far AS at_once, sum(cores) OVER so_far AS cores_at_once
    FROM events
    WINDOW so_far AS (PARTITION BY place ORDER BY moment, change, cores ROWS UNBOUNDED PRECEDING)
),
most AS (
    SELECT place, max(at_once) AS at_once, max(cores_at_once) AS cores_at_once FROM crowd GROUP BY place
),
parts AS (
    SELECT
        r.place, r.begun, r.ended,
        CASE
            WHEN r.is_gpu THEN r.gpu_share
            -- Several nodes of one name, as several on one machine have it, have more cores than each.
            WHEN r.cores_given IS NOT NULL THEN r.cores_given / greatest(r.cores_of_node, m.cores_at_once)
            ELSE 1.0 / m.at_once
        END AS part
    FROM ran AS r
    INNER JOIN most AS m USING (place)
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
    / i.step AS busy_share
FROM intervals AS i
LEFT JOIN parts AS r ON r.place = i.place AND r.begun < i.ended AND r.ended > i.begun
GROUP BY i.place, i.n, i.step
ORDER BY i.place, i.n;
