"""SQL from anyone, answered by a process that can do nothing else.

Three walls, each enough for most attacks:

1. The statement: exactly one SELECT, over the study's views, with no function that reads files, settings or a clock.
2. The connection: locked, without access to anything but its memory and, read by read, the study's Parquet files.
3. The process: the kernel lets it write no file and limits its memory, and it is killed when the time is over. Both
   must come from outside: DuckDB's `memory_limit` doesn't count the strings that an expression builds, and no
   interrupt reaches an expression that is folded while planning.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal, Self

from analysis.contract.errors import QueryError, ResultsError
from analysis.contract.folder import first_line
from analysis.warehouse.answers import Rows, fetch, with_text_keys
from analysis.warehouse.confinement import forbid_file_content, forbid_writing, limit_memory
from analysis.warehouse.connection import study_tables

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Form = Literal["rows", "arrow"]
MAX_RESULT_BYTES: Final = 256 << 20
MAX_ROWS: Final = 1_000_000
"""Of an answer as plain values; an Arrow answer is limited by its bytes alone."""
_BATCH: Final = 10_000
_UNITS: Final = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What the interpreter, DuckDB and pyarrow need beside DuckDB's own buffers.
_BASE_BYTES: Final = 2 << 30

# A common table expression may also delete, insert or update.
_QUERY_NODES: Final = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
# Table functions that compute and don't reach outside.
_TABLE_FUNCTIONS: Final = {"generate_series", "json_each", "json_tree", "range", "repeat_row", "unnest"}
# Scalar functions that wait, write a log, or tell about the machine rather than the study.
_FORBIDDEN_FUNCTIONS: Final = {
    "current_query",
    "current_setting",
    "getenv",
    "getvariable",
    "json_execute_serialized_sql",
    # It answers with the plan, in which the optimizer has put the values of settings.
    "json_serialize_plan",
    "nextval",
    "pg_sleep",
    "sleep_ms",
    "write_log",
}
_CATALOG_SCHEMAS: Final = {"information_schema"}
_CATALOG_TABLES: Final = ("duckdb_", "pg_", "pragma_", "sqlite_")
"""How DuckDB's own views begin; they tell settings and paths of the machine."""
MAX_STATEMENT: Final = 64 << 10
"""Characters of a statement: checking takes no part in its time limit, and more than linear time."""


def query(
    results: str | Path, sql: str, *, timeout: float = 60.0, memory_limit: str = "2GB", threads: int | None = None
) -> "pa.Table":
    """Answer one SELECT over a study's views that may come from anyone.

    Args:
        results: the study's folder or URI.
        sql: one SELECT statement.
        timeout: seconds after which it is ended; opening the results isn't counted.
        memory_limit: what DuckDB may use; the process gets 2 GiB more for everything else.
        threads: cores to use; None for all.

    Raises:
        QueryError: the statement is refused, fails, needs too much memory or time, or answers more than 256 MiB.
        ResultsError: the results can't be read.
    """
    import pyarrow as pa

    with Sandbox(results, memory_limit=memory_limit, threads=threads) as sandbox:
        return pa.ipc.open_stream(sandbox.ask(sql, "arrow", timeout)).read_all()


class _SpentError(QueryError):
    """The statement failed and may have left its process in pieces: no memory, or a fault inside DuckDB."""


@dataclass
class Sandbox:
    """A process that answers questions over one study, and is replaced by a new one when it had to be killed.

    Args:
        results: the study's folder or URI.
        memory_limit: what DuckDB may use.
        threads: cores to use; None for all.
    """

    results: str | Path
    memory_limit: str = "2GB"
    threads: int | None = None
    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process without waiting for it; does nothing while one runs."""
        if self._process is not None:
            return
        request = {
            "results": str(self.results),
            "memory_limit": self.memory_limit,
            "threads": self.threads,
            "bytes": _bytes(self.memory_limit) + _BASE_BYTES,
        }
        # The interpreter's own -P and -I would hide an uninstalled package, so the search path is handed over.
        program = f"import sys; sys.path[:] = {sys.path!r}; from analysis.warehouse.sandbox import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(str(self.results)),
        )
        _send(self._pipe("stdin"), request)

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def rows(self, sql: str, timeout: float = 60.0) -> Rows:
        """Answer one SELECT with plain values.

        Raises:
            QueryError: as for `query`.
            ResultsError: as for `query`.
        """
        answer = json.loads(self.ask(sql, "rows", timeout))
        return Rows(tuple(answer["columns"]), tuple(answer["types"]), [tuple(row) for row in answer["rows"]])

    def ask(self, sql: str, form: Form, timeout: float) -> bytes:
        """Answer one SELECT as an Arrow stream, or as JSON with columns, types and rows."""
        self.start()
        late = threading.Event()
        timer = threading.Timer(min(timeout, threading.TIMEOUT_MAX), self._kill, [late])
        try:
            _send(self._pipe("stdin"), {"sql": sql, "form": form})
            # The first answer says that the results are open: the time for that is nobody's SQL.
            self._receive()
            timer.start()
            return self._receive()
        except _SpentError:
            self.close()
            raise
        except (BrokenPipeError, EOFError):
            self.close()
            if late.is_set():
                raise QueryError(
                    f"The query was ended after {timeout:g} s; narrow it, or give it more time with --timeout."
                ) from None
            raise QueryError(
                f"The query's process died, most likely because it needed more memory than {self.memory_limit} and "
                "some; aggregate, or select fewer rows."
            ) from None
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()
            # The time may have run out just as the answer came: the next question needs a process of its own.
            if late.is_set():
                self.close()

    def _pipe(self, name: Literal["stdin", "stdout"]) -> IO[bytes]:
        pipe: IO[bytes] | None = getattr(self._process, name, None)
        if pipe is None:
            raise BrokenPipeError
        return pipe

    def _kill(self, late: threading.Event) -> None:
        late.set()
        if self._process is not None:
            self._process.kill()

    def _receive(self) -> bytes:
        pipe = self._pipe("stdout")
        header = json.loads(pipe.readline() or _end())
        if header["status"] == "query error":
            raise (_SpentError if header["spent"] else QueryError)(header["message"])
        if header["status"] == "results error":
            raise ResultsError(header["message"])
        payload = pipe.read(header["length"])
        return payload if len(payload) == header["length"] else _end()


def check_statement(sql: str) -> frozenset[str]:
    """Refuse everything but one SELECT over the study.

    Returns:
        The names of the tables and views that it reads, and of its common table expressions.

    Raises:
        QueryError: what is wrong with the statement, and what to do.
    """
    import duckdb

    if len(sql) > MAX_STATEMENT:
        raise QueryError(f"The SQL has {len(sql):,} characters, of at most {MAX_STATEMENT:,}; write a shorter one.")
    try:
        sql.encode()
    except UnicodeEncodeError:
        raise QueryError("The SQL isn't text in UTF-8; save it as such.") from None
    con = duckdb.connect(":memory:", config={"autoload_known_extensions": False, "autoinstall_known_extensions": False})
    try:
        statements = con.extract_statements(sql)
        if len(statements) != 1:
            raise QueryError(f"One SELECT statement at a time, please; this is {len(statements) or 'no'} statements.")
        if (kind := _kind(statements[0])) != "SELECT":
            raise QueryError(
                f"Only SELECT is allowed on results, and this is {kind}; results are never changed by SQL."
            )
        [(serialized,)] = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
        tree = json.loads(serialized)
    except duckdb.Error as error:
        raise QueryError(f"The SQL isn't understood: {first_line(error)}.") from error
    except RecursionError:
        raise QueryError("The SQL is nested too deeply; simplify it.") from None
    finally:
        con.close()
    if tree["error"]:
        raise QueryError(
            f"The SQL can't be checked ({tree.get('error_message', 'unknown form')}); write a plain SELECT."
        )
    return _check_tree(tree)


def _kind(statement: "duckdb.Statement") -> str:
    try:
        return str(statement.type.name).replace("_", " ")
    except ValueError:
        # DuckDB has statements that its Python client has no name for, such as UPDATE EXTENSIONS.
        return "something else"


def _check_tree(tree: dict[str, Any]) -> frozenset[str]:
    tables = set()
    for node in _nodes(tree):
        kind = node.get("type")
        if str(kind).endswith("_NODE") and kind not in _QUERY_NODES:
            what = str(kind).split("_")[0]
            raise QueryError(
                f"Only SELECT is allowed on results, and this has a {what}; results are never changed by SQL."
            )
        if kind == "TABLE_FUNCTION":
            name = str(node.get("function", {}).get("function_name", "")).lower()
            if name not in _TABLE_FUNCTIONS:
                raise QueryError(
                    f"The table function {name}() is not allowed here; query the views trials, predictions, curves, "
                    "subjects and test_samples."
                )
        elif node.get("class") == "FUNCTION" and str(node.get("function_name", "")).lower() in _FORBIDDEN_FUNCTIONS:
            raise QueryError(f"The function {node['function_name']}() is not allowed on results.")
        elif kind == "BASE_TABLE" and node.get("schema_name") not in {"", "main", *_CATALOG_SCHEMAS}:
            raise QueryError(f"The schema {node['schema_name']} is not part of a study.")
        elif kind in ("BASE_TABLE", "SHOW_REF"):
            name = str(node.get("table_name") or "")
            # SHOW tells settings as well, such as paths of the machine.
            if node.get("show_type") == "SHOW" and name.strip('"').lower() not in study_tables():
                raise QueryError(f"SHOW {name} is not allowed on results; DESCRIBE shows the columns of a view.")
            if name and not name.strip('"').replace("_", "").isalnum():
                raise QueryError(f"There is no table {name}; SQL on results can't read other files.")
            if name.strip('"').lower().startswith(_CATALOG_TABLES):
                raise QueryError(f"The table {name} is not part of a study.")
            tables.add(name.strip('"').lower())
    return frozenset(tables)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON document, without recursion."""
    stack = [tree]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def serve() -> None:
    """Be the process: answer one request a line until the input ends.

    Results are opened at the first request, and again when a later one needs another dataset.
    """
    from analysis.warehouse.connection import datasets_of, open_confined

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    settings = json.loads(requests.readline())
    limit_memory(settings.pop("bytes"))
    forbid_file_content()
    cannot_write = forbid_writing()
    con, opened = None, frozenset[str]()
    for line in requests:
        request = json.loads(line)
        try:
            tables = check_statement(request["sql"])
            needed = frozenset(datasets_of(tables)) | opened
            if con is None or needed != opened:
                con = open_confined(**settings, cannot_write=cannot_write, datasets=datasets_of(needed))
                opened = needed
            _send(answers, {"status": "ok", "length": 0})
            payload = _answer(con, request["sql"], request["form"])
        except QueryError as error:
            spent = isinstance(error, _SpentError)
            _send(answers, {"status": "query error", "message": str(error), "spent": spent})
        except ResultsError as error:
            _send(answers, {"status": "results error", "message": str(error)})
        else:
            _send(answers, {"status": "ok", "length": len(payload)}, payload)


def _answer(con: "duckdb.DuckDBPyConnection", sql: str, form: Form) -> bytes:
    import duckdb

    con.execute("BEGIN TRANSACTION READ ONLY")
    try:
        return _as_arrow(con, sql) if form == "arrow" else _as_rows(con, sql)
    except duckdb.OutOfMemoryException as error:
        raise _SpentError(f"The query needs more memory than it may use: {first_line(error)}.") from error
    except (duckdb.FatalException, duckdb.InternalException) as error:
        raise _SpentError(f"The query failed: {first_line(error)}.") from error
    except duckdb.Error as error:
        raise QueryError(f"The query failed: {first_line(error)}.") from error
    except MemoryError:
        raise _SpentError("The query needs more memory than it may use; aggregate, or select fewer rows.") from None
    finally:
        # What is spent may not even take this.
        with suppress(duckdb.Error):
            con.execute("ROLLBACK")


def _as_arrow(con: "duckdb.DuckDBPyConnection", sql: str) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    reader: pa.RecordBatchReader = con.execute(sql).to_arrow_reader(_BATCH)
    with pa.ipc.new_stream(sink, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            _check_size(sink.tell())
    return bytes(sink.getvalue())


def _as_rows(con: "duckdb.DuckDBPyConnection", sql: str) -> bytes:
    answer = fetch(con.sql(sql), MAX_ROWS + 1)
    if len(answer.rows) > MAX_ROWS:
        raise QueryError(f"The answer has more than {MAX_ROWS:,} rows; aggregate, add a LIMIT, or ask for Parquet.")
    if any(kind.endswith(")") or kind.endswith("]") for kind in answer.types):
        answer = replace(answer, rows=with_text_keys(answer.rows))
    payload = json.dumps(asdict(answer), default=str).encode()
    _check_size(len(payload))
    return payload


def _check_size(size: int) -> None:
    if size > MAX_RESULT_BYTES:
        raise QueryError(f"The answer is larger than {MAX_RESULT_BYTES >> 20} MiB; aggregate, or add a LIMIT.")


def _bytes(text: str) -> int:
    digits = text.upper().rstrip("GIKMB ")
    unit = text.upper().removeprefix(digits).strip()
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError):
        raise QueryError(f"The memory limit '{text}' isn't a size; write one such as 2GB.") from None


def _environment(results: str) -> dict[str, str]:
    """Only what a process needs, so that no secret lies in it; object stores need their credentials, though."""
    if "://" in results:
        return dict(os.environ)
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "SYSTEMROOT", "TMPDIR", "TEMP", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _send(pipe: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
    pipe.write(json.dumps(header).encode() + b"\n" + payload)
    pipe.flush()


def _end() -> bytes:
    raise EOFError
