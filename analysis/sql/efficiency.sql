-- question: How long does a fix take, how much memory does it need, and what does it repair per hour?
-- reads: trials
-- column subject: subject
-- column fixer: registry name of the approach
-- column n_timed: seeds whose fix ended by itself and has a time, OK or CORRUPTED; the figures are over these [trials]
-- column n_timeout: seeds ended by the time limit: their time is censored and in no figure here but the last [trials]
-- column fix_seconds_median: time of the fix alone; lower is better [seconds]
-- column fix_seconds_min: quickest seed [seconds]
-- column fix_seconds_max: slowest seed [seconds]
-- column evaluate_seconds_median: time of the evaluation, the study's cost and not the fixer's [seconds]
-- column peak_host_bytes: largest resident memory of the worker while fixing; lower is better [bytes]
-- column peak_device_bytes: largest device memory while fixing; null on a CPU; lower is better [bytes]
-- column repaired_per_hour: repaired failures per hour of fixing, over the seeds that are OK; higher is better [samples]
-- column censored_seconds: longest time of a seed that the limit ended; the fix takes at least as long [seconds]
WITH timed AS (
    SELECT *, coalesce(reason_code = 'timeout', false) AS is_censored
    FROM selected
    WHERE fix_seconds IS NOT NULL
)
SELECT
    subject,
    fixer,
    count(*) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS n_timed,
    count(*) FILTER (is_censored) AS n_timeout,
    median(fix_seconds) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS fix_seconds_median,
    min(fix_seconds) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS fix_seconds_min,
    max(fix_seconds) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS fix_seconds_max,
    median(evaluate_seconds) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS evaluate_seconds_median,
    max(peak_host_bytes) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS peak_host_bytes,
    max(peak_device_bytes) FILTER (NOT is_censored AND outcome IN ('OK', 'CORRUPTED')) AS peak_device_bytes,
    3600 * sum(coalesce(n_repaired, repair_rate * n_wrong)) FILTER (outcome = 'OK')
    / nullif(sum(fix_seconds) FILTER (outcome = 'OK'), 0) AS repaired_per_hour,
    max(fix_seconds) FILTER (is_censored) AS censored_seconds
FROM timed
GROUP BY subject, fixer
ORDER BY subject, fix_seconds_median NULLS LAST, fixer;
