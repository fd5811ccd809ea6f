"""SQL from anyone reads the study and nothing else, writes nothing, and ends."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from synthetic_study import write_study

import analysis
from analysis.contract.errors import QueryError, ResultsError
from analysis.warehouse.answers import to_json
from analysis.warehouse.sandbox import Sandbox, check_statement

SECRET = "the-contents-of-another-file"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study, and beside it a file that must stay unread and a folder that must stay empty."""
    root = tmp_path_factory.mktemp("security")
    study = write_study(root / "study", subjects=("digits",), fixers=("care",), n_test=20, adapt=0)
    (root / "secret.txt").write_text(SECRET)
    (root / "secret.csv").write_text(f"a\n{SECRET}\n")
    (root / "secret.json").write_text(f'{{"a": "{SECRET}"}}')
    (root / "out").mkdir()
    duckdb.connect(str(root / "other.duckdb")).close()
    return root, study


@pytest.fixture(scope="module")
def sandbox(place):
    with Sandbox(place[1].folder) as sandbox:
        yield sandbox


def snapshot(root):
    """Every file below a folder with its content and time of change."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


READS = [
    "SELECT * FROM read_text('{root}/secret.txt')",
    "SELECT * FROM read_blob('{root}/secret.txt')",
    "SELECT * FROM read_csv('{root}/secret.csv')",
    "SELECT * FROM read_csv_auto('{root}/secret.csv')",
    "SELECT * FROM sniff_csv('{root}/secret.csv')",
    "SELECT * FROM read_json('{root}/secret.json')",
    "SELECT * FROM read_json_auto('{root}/secret.json')",
    "SELECT * FROM read_ndjson_objects('{root}/secret.json')",
    "SELECT * FROM read_duckdb('{root}/other.duckdb')",
    "SELECT * FROM '{root}/secret.csv'",
    'SELECT * FROM "{root}/secret.csv"',
    "FROM '{root}/secret.json'",
    "SELECT (SELECT content FROM read_text('{root}/secret.txt'))",
    "WITH a AS (SELECT * FROM read_text('{root}/secret.txt')) SELECT * FROM a",
    "SELECT 1 WHERE EXISTS (FROM read_text('{root}/secret.txt'))",
    "SELECT * FROM trials, LATERAL (SELECT * FROM read_text('{root}/secret.txt'))",
    "SELECT 1 UNION ALL SELECT content FROM read_text('{root}/secret.txt')",
    "SELECT * FROM query('SELECT * FROM read_text(''{root}/secret.txt'')')",
    "SELECT * FROM query_table('{root}/secret.csv')",
    "SELECT * FROM query_table(['trials', '{root}/secret.csv'])",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{root}/secret.txt'')'))",
    "SELECT * FROM glob('{root}/*')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_parquet('{root}/study/trials/*.parquet')",
    "SELECT * FROM parquet_scan('{root}/study/trials/*.parquet')",
    "SELECT * FROM parquet_metadata('{root}/study/trials/*.parquet')",
    "SELECT * FROM parquet_kv_metadata('{root}/study/trials/*.parquet')",
    "SELECT * FROM parquet_schema('{root}/study/trials/*.parquet')",
    "SELECT * FROM 'https://example.org/data.parquet'",
    "SELECT * FROM read_csv('https://example.org/data.csv')",
    "SELECT * FROM 's3://bucket/data.parquet'",
    "DESCRIBE '{root}/secret.csv'",
    "SUMMARIZE '{root}/secret.csv'",
    "DESCRIBE SELECT * FROM read_csv('{root}/secret.csv')",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM sys",
    "SELECT * FROM os.environ",
]

ENVIRONMENT = [
    "SELECT getenv('HOME')",
    "SELECT current_setting('home_directory')",
    "SELECT current_setting('secret_directory')",
    "SHOW secret_directory",
    "FROM (SHOW allowed_paths)",
    "SELECT json_serialize_plan('select current_setting(''secret_directory'')', optimize := true)",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM which_secret('s3://bucket', 's3')",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM pragma_user_agent()",
    "SELECT * FROM pragma_database_size()",
    "SELECT getvariable('x')",
    "SELECT * FROM pg_settings",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM pragma_database_list",
    'SELECT * FROM "duckdb_schemas"',
]

WRITES = [
    "COPY trials TO '{root}/out/x.csv'",
    "COPY (SELECT 1) TO '{root}/study/trials/x.parquet'",
    "COPY trials FROM '{root}/secret.csv'",
    "EXPORT DATABASE '{root}/out/dump'",
    "IMPORT DATABASE '{root}/out/dump'",
    "ATTACH '{root}/other.duckdb'",
    "ATTACH '{root}/out/new.duckdb' AS new",
    "ATTACH ':memory:' AS m",
    "DETACH memory",
    "USE memory",
    "COPY FROM DATABASE memory TO other",
    "INSTALL httpfs",
    "FORCE INSTALL httpfs FROM 'https://example.org'",
    "LOAD httpfs",
    "LOAD '{root}/out/evil.duckdb_extension'",
    "UPDATE EXTENSIONS",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET memory_limit = '100GB'",
    "SET GLOBAL threads = 64",
    "SET VARIABLE x = 1",
    "RESET memory_limit",
    "SET allowed_directories = ['/']",
    "SET log_query_path = '{root}/out/log'",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '{root}/out/profile.json'",
    "PRAGMA database_list",
    "PRAGMA import_database('{root}/out')",
    "CALL enable_logging(storage = 'file', storage_path = '{root}/out/log')",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{root}/out/log')",
    "SELECT write_log('x')",
    "SELECT * FROM force_checkpoint()",
    "CALL pragma_version()",
    "CREATE TABLE t AS SELECT 1",
    "CREATE OR REPLACE VIEW trials AS SELECT 1",
    "CREATE TEMP TABLE t (a INTEGER)",
    "CREATE MACRO f() AS TABLE SELECT * FROM read_text('{root}/secret.txt')",
    "CREATE SECRET s (TYPE s3)",
    "CREATE SCHEMA s",
    "CREATE SEQUENCE s",
    "DROP TABLE trials",
    "DROP VIEW cells",
    "DELETE FROM trials",
    "UPDATE trials SET outcome = 'OK'",
    "INSERT INTO trials SELECT * FROM trials",
    "MERGE INTO trials USING trials AS s ON false WHEN NOT MATCHED THEN INSERT VALUES (1)",
    "ALTER TABLE trials ADD COLUMN x INTEGER",
    "TRUNCATE trials",
    "WITH x AS (DELETE FROM trials RETURNING *) SELECT * FROM x",
    "WITH x AS (INSERT INTO plan VALUES (1, NULL) RETURNING *) SELECT * FROM x",
    "SELECT * FROM trials WHERE 1 = (WITH x AS (UPDATE plan SET planned = 1 RETURNING 1) SELECT count(*) FROM x)",
    "BEGIN",
    "COMMIT",
    "VACUUM",
    "ANALYZE",
    "CHECKPOINT",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DEALLOCATE p",
    "EXPLAIN ANALYZE COPY trials TO '{root}/out/x.csv'",
    "EXPLAIN SELECT 1",
    "PIVOT trials ON fixer USING count(*)",
]

SHAPES = [
    "",
    ";",
    "-- nothing",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY trials TO '{root}/out/x.csv'",
    "SELECT 1;; DROP TABLE trials",
    "SELECT 1 /* ; */ ; ATTACH '{root}/out/new.duckdb'",
    "SELEC 1",
    "SELECT * FROM nothing_of_that_name",
    "SELECT " + "(" * 3_000 + "1" + ")" * 3_000,
    "SELECT 1" + " + 1" * 50_000,
    "SELECT * FROM trials WHERE trial_id = ?",
    "SELECT $x",
]

ENDLESS = [
    "SELECT count(*) FROM range(1000000000000) AS a, range(1000000000000) AS b",
    "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) SELECT count(*) FROM t",
    "SELECT sum(length(repeat(i::VARCHAR, 10000000))) FROM range(1000000000) AS t(i)",
    "SELECT list_sum(list_transform(range(2000000000), lambda x: x + 1))",
    "SELECT sleep_ms(100000)",
    "SELECT pg_sleep(100)",
    "SELECT a.label FROM " + ", ".join(f"predictions AS {c}" for c in "abcdefghijkl") + " ORDER BY random()",
]

GREEDY = [
    "SELECT length(repeat('a', 100000000000))",
    "SELECT length(repeat(repeat('a', 1000000), 1000000))",
    "SELECT len(range(100000000000))",
    "SELECT array_agg(i) FROM range(100000000000) AS t(i)",
    "SELECT string_agg(repeat('a', 1000), '') FROM range(1000000000)",
    "SELECT * FROM range(10000000000)",
    "SELECT i, repeat('a', 1000) FROM range(100000000) AS t(i)",
    "SELECT count(DISTINCT (i, random())) FROM range(100000000000) AS t(i)",
    "SELECT lpad('', 2147483647, 'x') FROM range(100)",
]


@pytest.mark.parametrize("sql", READS + ENVIRONMENT + WRITES + SHAPES)
def test_hostile_statement(place, sandbox, sql):
    root, study = place
    before = snapshot(root)
    with pytest.raises(QueryError) as caught:
        sandbox.rows(sql.replace("{root}", str(root)), timeout=20)
    message = str(caught.value)
    assert SECRET not in message
    assert message.endswith(".")
    assert "\n" not in message
    assert snapshot(root) == before
    # The study is still there, unlocked for nobody.
    assert sandbox.rows("SELECT count(*) FROM trials").rows == [(len(study.trials),)]


@pytest.mark.parametrize("sql", ENDLESS)
def test_endless_statements_end(place, sandbox, sql):
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"ended after 0\.5 s|not allowed|memory"):
        sandbox.rows(sql, timeout=0.5)
    # Opening the results again after a kill isn't the statement's time.
    assert time.monotonic() - began < 60
    assert sandbox.rows("SELECT 1").rows == [(1,)]


@pytest.mark.parametrize("form", ["rows", "arrow"])
@pytest.mark.parametrize("sql", GREEDY)
def test_greedy_statements_are_ended_by_memory_or_time(place, form, sql):
    with Sandbox(place[1].folder, memory_limit="100MB", threads=1) as sandbox:
        with pytest.raises(QueryError, match=r"memory|ended after|larger than|more than|failed"):
            sandbox.ask(sql, form, timeout=1.5)
        assert sandbox.rows("SELECT 1").rows == [(1,)]


def test_a_process_outlives_mistakes_and_not_want_of_memory(place):
    with Sandbox(place[1].folder, memory_limit="100MB", threads=1) as sandbox:
        sandbox.rows("SELECT 1")
        first = sandbox._process.pid
        for mistake in ("SELEC 1", "SELECT nothing FROM trials", "DROP TABLE trials", "SELECT 'a'::INTEGER"):
            with pytest.raises(QueryError):
                sandbox.rows(mistake)
            assert sandbox.rows("SELECT count(*) > 0 FROM trials").rows == [(True,)]
        assert sandbox._process.pid == first, "a typing error at the prompt costs no new process"
        with pytest.raises(QueryError, match="memory"):
            sandbox.rows("SELECT list(i) FROM range(100000000) AS t(i)")
        assert sandbox.rows("SELECT 1").rows == [(1,)]
        assert sandbox._process.pid != first


@pytest.mark.parametrize("sql", READS + ENVIRONMENT + WRITES)
def test_an_untrusted_connection_alone_reaches_nothing(place, sql, tmp_path, monkeypatch):
    """The second wall stands without the first: no check of the statement here."""
    root, study = place
    monkeypatch.chdir(tmp_path)
    con = analysis.open(study.folder, untrusted=True)
    before = snapshot(root)
    try:
        answer = repr(con.execute(sql.replace("{root}", str(root))).fetchall())
    except (duckdb.Error, duckdb.InvalidInputException) as error:
        answer = str(error)
    assert SECRET not in answer
    assert snapshot(root) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
@pytest.mark.parametrize("limit", ["forbid_writing", "forbid_file_content"])
def test_the_process_alone_writes_nothing(place, tmp_path, limit):
    """The third wall stands without the others: even plain Python writes no byte there."""
    before = snapshot(place[0])
    victim = next((place[1].folder / "trials").iterdir())
    attacks = [
        f"open({str(tmp_path / 'new')!r}, 'w').write('x' * 10_000)",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.unlink({str(victim)!r})",
        f"os.rename({str(victim)!r}, {str(tmp_path / 'moved')!r})",
        f"os.truncate({str(victim)!r}, 0)",
        f"open({str(victim)!r}, 'w')",
    ]
    if limit == "forbid_file_content":
        attacks = attacks[:1]
    program = f"import os\nfrom analysis.warehouse.confinement import {limit}\nprint({limit}())\n" + "".join(
        f"try:\n    {attack}\nexcept OSError:\n    pass\nelse:\n    print('succeeded')\n" for attack in attacks
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if done.stdout.startswith("False"):
        pytest.skip("this kernel has no Landlock")
    assert "succeeded" not in done.stdout
    assert snapshot(place[0]) == before
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


@pytest.mark.parametrize("cannot_write", [True, False])
def test_large_predictions_are_answered_and_stay(place, tmp_path, cannot_write):
    """DuckDB reads large files itself only where it cannot write them, not even past its own temporary file."""
    target = next((place[1].folder / "predictions").iterdir())
    before = snapshot(place[0])
    program = f"""
import duckdb
from analysis.warehouse import connection
from analysis.warehouse.confinement import forbid_writing
confined = {cannot_write} and forbid_writing()
connection.IN_MEMORY_ROWS = 0
con = connection.open_confined({str(place[1].folder)!r}, cannot_write=confined)
print(confined == {cannot_write}, con.sql("SELECT count(*) FROM predictions").fetchall(), end=" ")
for target in ({str(target)!r}, {str(tmp_path / "new.parquet")!r}):
    for option in ("", ", USE_TMP_FILE false"):
        try:
            con.execute(f"COPY (SELECT 1 AS a) TO '{{target}}' (FORMAT parquet{{option}})")
            print("written")
        except duckdb.Error:
            print("refused", end=" ")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if done.stdout.startswith("False"):
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.split(" ", 1)[1].strip() == "[(20,)]" + " refused" * 4
    assert snapshot(place[0]) == before
    assert not list(tmp_path.iterdir())


def test_the_process_has_no_secrets_in_its_environment(place, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with Sandbox(place[1].folder) as sandbox:
        sandbox.rows("SELECT 1")
        environment = Path(f"/proc/{sandbox._process.pid}/environ")
        if not environment.exists():
            pytest.skip("no /proc here")
        assert SECRET.encode() not in environment.read_bytes()


GOOD = [
    "SELECT 1",
    "select fixer, count(*) from trials group by all;",
    "FROM trials",
    "TABLE trials",
    "WITH x AS (SELECT * FROM trials) SELECT * FROM x",
    "SELECT * FROM trials JOIN predictions USING (trial_id) LIMIT 3",
    "SELECT count(*) FROM changes",
    "SELECT * FROM cells, tallies, fairness",
    "DESCRIBE trials",
    "SUMMARIZE subjects",
    "SHOW TABLES",
    "SHOW trials",
    "SELECT table_name FROM information_schema.tables",
    "SELECT unnest([1, 2]), range(3)",
    "SELECT * FROM range(3), generate_series(1, 2), unnest([1])",
    "SELECT * FROM trials, json_each(params)",
    "VALUES (1), (2)",
    "SELECT ';' AS semicolon -- a comment; with one",
    "SELECT log(10), ln(2), now() > '2020-01-01'",
    "SELECT max(started_at) FROM trials",
    'SELECT "group" FROM predictions LIMIT 1',
    "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < 5) SELECT * FROM t",
]


@pytest.mark.parametrize("sql", GOOD)
def test_ordinary_questions_are_answered(sandbox, sql):
    assert sandbox.rows(sql).columns


def test_query_returns_arrow(place):
    table = analysis.query(place[1].folder, "SELECT trial_id, max(started_at) AS t FROM trials GROUP BY 1 ORDER BY 1")
    assert table.column("trial_id").to_pylist() == sorted(row["trial_id"] for row in place[1].trials)
    assert str(table.schema.field("t").type) == "timestamp[us, tz=UTC]"


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(ResultsError, match="no results folder"):
        analysis.query(tmp_path / "nowhere", "SELECT 1")


def test_a_sandbox_survives_errors_of_results(place, tmp_path):
    study = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=20, adapt=0)
    path = next((study.folder / "predictions").iterdir())
    with Sandbox(study.folder) as sandbox:
        assert sandbox.rows("SELECT count(*) FROM trials").rows == [(2,)]
        content = path.read_bytes()
        path.write_bytes(b"damaged")
        with pytest.raises(ResultsError, match="damaged"):
            sandbox.rows("SELECT count(*) FROM predictions")
        path.write_bytes(content)
        assert sandbox.rows("SELECT count(*) FROM predictions").rows == [(20,)]


@pytest.mark.parametrize("sql", WRITES + READS[:12])
def test_the_statement_alone_is_refused(place, sql):
    """The first wall stands without the others."""
    with pytest.raises(QueryError):
        check_statement(sql.replace("{root}", str(place[0])))


def test_check_statement_names_the_tables():
    assert check_statement("SELECT * FROM trials JOIN (FROM Changes) USING (trial_id)") == {"trials", "changes"}


@pytest.mark.parametrize("limit", ["", "2", "two GB", "2 parsecs"])
def test_memory_limits_are_sizes(place, limit):
    with pytest.raises(QueryError, match="isn't a size"):
        analysis.query(place[1].folder, "SELECT 1", memory_limit=limit)


def test_a_statement_that_takes_long_to_check_is_refused_at_once(sandbox):
    """Checking takes no part in the time limit."""
    began = time.monotonic()
    with pytest.raises(QueryError, match="The SQL has 1,000,006 characters, of at most 65,536"):
        sandbox.rows("SELECT " + "+".join(["1"] * 500_000), timeout=0.5)
    assert time.monotonic() - began < 30
    assert sandbox.rows("SELECT 1").rows == [(1,)]


def test_what_is_no_text_is_a_sentence(sandbox):
    with pytest.raises(QueryError, match="isn't text in UTF-8"):
        sandbox.rows("SELECT '\udcff'")


def test_a_limit_for_ever_is_the_longest_there_is(sandbox):
    assert sandbox.rows("SELECT 1", timeout=float("inf")).rows == [(1,)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("map([date '2024-01-01'], [1])", {"2024-01-01": 1}),
        ("[map([1], [{'a': map([true], [2])}])]", [{"1": {"a": {"True": 2}}}]),
        ("[timestamptz '2024-01-01 00:00:00+00']", "['2024-01-01 00:00:00+00']"),
        ("{'at': timestamptz '2024-01-01 00:00:00+00'}", "{'at': '2024-01-01 00:00:00+00'}"),
    ],
)
def test_values_that_json_or_python_lack_are_shown(sandbox, value, expected):
    assert sandbox.rows(f"SELECT {value}").rows == [(expected,)]
    assert "2" in to_json(sandbox.rows(f"SELECT {value}"))
