-- question: How large is the study, when was it run and on what?
-- reads: trials
-- column study: name of the study, or the names of several
-- column n_trials: trials, adaptation included [trials]
-- column n_fixers: different fixers, also those of which there is only adaptation
-- column n_seeds: different seeds of the final trials
-- column first_day: day of the first trial, UTC
-- column last_day: day of the last trial, UTC
-- column busy_seconds: fixing and evaluating, summed over all trials [seconds]
-- column fixstudy_versions: versions of this package
-- column torch_versions: versions of torch
-- column devices: CPU or GPUs
-- column n_hosts: nodes that ran trials
-- column attacks: settings of the attack as JSON
SELECT
    string_agg(DISTINCT study, ', ' ORDER BY study) AS study,
    count(*) AS n_trials,
    count(DISTINCT fixer) AS n_fixers,
    count(DISTINCT seed) FILTER (stage = 'final') AS n_seeds,
    strftime(min(started_at), '%Y-%m-%d') AS first_day,
    strftime(max(started_at), '%Y-%m-%d') AS last_day,
    sum(coalesce(fix_seconds, 0) + coalesce(evaluate_seconds, 0)) AS busy_seconds,
    string_agg(DISTINCT fixstudy_version, '; ' ORDER BY fixstudy_version) AS fixstudy_versions,
    string_agg(DISTINCT torch_version, '; ' ORDER BY torch_version) AS torch_versions,
    string_agg(DISTINCT device, '; ' ORDER BY device) AS devices,
    count(DISTINCT host) AS n_hosts,
    string_agg(DISTINCT attack, '; ' ORDER BY attack) AS attacks
FROM trials;
