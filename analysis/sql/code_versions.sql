-- question: Which code of every fixer do the trials come from?
-- reads: trials
-- column fixer: registry name of the approach
-- column code_versions: hashes of its code; more than one means that figures of different code stand side by side
-- column n_versions: how many
SELECT
    fixer,
    string_agg(DISTINCT code_version, ', ' ORDER BY code_version) AS code_versions,
    count(DISTINCT code_version) AS n_versions
FROM trials
WHERE code_version IS NOT NULL
GROUP BY fixer
ORDER BY fixer;
