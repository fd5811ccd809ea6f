-- question: What do trials take: time, memory and cores, by fixer and subject?
-- reads: trials
-- column fixer: registry name of the approach
-- column subject: subject
-- column n_trials: trials that ran, adaptations included [trials]
-- column seconds: fix and evaluation of the longest trial [seconds]
-- column peak_device_bytes: largest device memory while fixing; null on a CPU [bytes]
-- column peak_host_bytes: largest resident memory of a worker while fixing [bytes]
-- column peak_own_bytes: of that what other processes don't share, by which trials are packed [bytes]
-- column cores: cores busy while fixing, on average, of the busiest trial [cores]
-- column gpu_share: smallest part of a GPU that a trial was given; null on a CPU [fraction]
-- column n_out_of_memory: trials of which an attempt ran out of device memory [trials]
SELECT
    fixer,
    subject,
    count(*) AS n_trials,
    max(fix_seconds + coalesce(evaluate_seconds, 0)) AS seconds,
    max(peak_device_bytes) AS peak_device_bytes,
    max(peak_host_bytes) AS peak_host_bytes,
    max(peak_own_bytes) AS peak_own_bytes,
    max(cores) AS cores,
    min(gpu_share) AS gpu_share,
    count(*) FILTER (attempt_log LIKE '%"error": "OutOfMemoryError:%') AS n_out_of_memory
FROM trials
WHERE fix_seconds IS NOT NULL
GROUP BY fixer, subject
ORDER BY seconds DESC, fixer, subject;
