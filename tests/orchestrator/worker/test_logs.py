"""What a trial said last, kept with its row, and `fixstudy logs`."""

import ast
import json
import logging
import subprocess
import sys
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest

import analysis
from analysis.terminal.trial_story import choose, describe, find_trial
from orchestrator.cli import main
from orchestrator.storage.store import Store
from orchestrator.worker.logtail import CHARACTERS, LINES, LogTail, StreamFile, last_lines, read_streams

ROW = {
    "trial_id": "abc123",
    "fixer": "arachne",
    "subject": "digits",
    "seed": 3,
    "stage": "final",
    "outcome": "FAILURE",
    "reason_code": "exception",
    "reason": "ValueError during fix: no",
    "phase": "fix",
    "host": "node-7",
    "notes": '{"layer": "fc3"}',
    "attempts": 2,
    "attempt_log": json.dumps(
        [
            {"phase": "fix", "micro_batch": 512, "seconds": 1.0, "error": "OutOfMemoryError: 2 GiB"},
            {"phase": "fix", "micro_batch": 128, "seconds": 2.5, "error": "ValueError: no"},
        ]
    ),
    "traceback": "Traceback (most recent call last):\n  line\nValueError: no\n",
    "log_tail": "epoch 1\n\x1b[31mred\x1b[0m\tand tabs",
}


@pytest.fixture
def results(tmp_path):
    store = Store(tmp_path / "results")
    store.create()
    store.write_trial(ROW)
    store.write_trial({"trial_id": "abd999", "outcome": "OK", "fixer": "care", "subject": "digits", "seed": 0})
    return store


SPEAKS = """
import logging, sys, warnings
from orchestrator.worker.logtail import LogTail

def speak():
    print("printed")
    sys.stderr.write("to standard error\\n")
    logging.getLogger("orchestrator.test").warning("logged %d", 7)
    warnings.warn("warned")

heard = []
for _ in range(2):
    tail = LogTail()
    with tail.listening():
        speak()
    heard.append(tail.text())
print("after the trial")
logging.getLogger("orchestrator.test").warning("later")
sys.stdout.write(repr(heard))
"""


def test_everything_that_is_said_is_heard_by_its_trial_and_goes_where_it_went_before():
    done = subprocess.run([sys.executable, "-c", SPEAKS], capture_output=True, text=True, check=True)
    heard = ast.literal_eval(done.stdout.splitlines()[-1])
    for text in heard:
        # The second trial of a process gets its own warning, which Python would show once.
        for said in ("printed", "to standard error", "WARNING orchestrator.test: logged 7", "UserWarning: warned"):
            assert text.count(said) == 1
        assert "after the trial" not in text
        assert "later" not in text
    assert done.stdout.count("printed\n") == 2
    assert done.stderr.count("to standard error") == 2


def test_an_exception_ends_the_listening():
    before = sys.stdout, sys.stderr, list(logging.getLogger().handlers)
    with pytest.raises(KeyError), LogTail().listening():
        raise KeyError
    assert (sys.stdout, sys.stderr, logging.getLogger().handlers) == before


def test_a_tail_is_bounded_and_the_end_is_what_stays():
    tail = LogTail()
    for number in range(100_000):
        tail.write(f"line {number}\n")
    lines = tail.text().splitlines()
    assert lines == [f"line {number}" for number in range(100_000 - LINES, 100_000)]
    tail.write("x" * 10 * CHARACTERS + "end")
    assert len(tail._text) <= 4 * CHARACTERS
    assert tail.text().endswith("xend")
    assert len(tail.text()) == CHARACTERS
    assert len(tail.text(10)) == 10


def test_of_a_progress_bar_the_last_state_is_kept():
    assert last_lines(" 1%\r 2%\r100%\ndone\n") == "100%\ndone"
    assert last_lines(" \n\n") is None


def test_the_streams_of_a_dead_worker_are_read_from_where_its_trial_began(tmp_path):
    out, err = tmp_path / "worker.out", tmp_path / "worker.err"
    out.write_text("an earlier trial\n:job_id:01000000\nits own\n")
    err.write_text("Fatal Python error: Segmentation fault\n")
    files = (StreamFile(str(out), len("an earlier trial\n")), StreamFile(str(err), 0), StreamFile("/nowhere", 0))
    assert read_streams(files) == "its own\nFatal Python error: Segmentation fault"
    assert read_streams(()) is None


def test_logs_tells_all(results):
    text = describe(find_trial(results.uri, "abc123"))
    for said in ("arachne on digits, seed 3", "FAILURE (exception)", "node-7", "no", "layer", "1. fix, micro-batch 512",
                 "2. fix, micro-batch 128, 2.5 s: ValueError: no", "Traceback (most recent", "epoch 1"):  # fmt: skip
        assert said in text
    assert "\x1b" not in text, "data must not drive the terminal"


def test_the_beginning_of_an_id_is_enough_where_it_is_clear(results):
    assert find_trial(results.uri, "abd")["fixer"] == "care"
    with pytest.raises(analysis.UserError, match=r"2 trials of .* begin with 'ab': abc123, abd999"):
        find_trial(results.uri, "ab")
    with pytest.raises(analysis.UserError, match=r"has no trial 'abc124'; the nearest are abc123"):
        find_trial(results.uri, "abc124")
    assert choose("ab", ["ab", "abc"], "r") == "ab"


def test_the_command(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fixstudy", "logs", results.uri, "abc", "--format", "json"])
    main()
    assert json.loads(capsys.readouterr().out)["log_tail"] == ROW["log_tail"]
    monkeypatch.setattr(sys, "argv", ["fixstudy", "logs", results.uri, "zzz"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


ESCAPE = "\x1b]0;taken\x07\x1b[2J"


def test_nothing_in_a_row_or_a_name_steers_the_terminal(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path / "results")
    store.create()
    texts = {name: f"{ESCAPE}{name}" for name in ("fixer", "subject", "stage", "reason", "host", "traceback")}
    attempts = json.dumps([{"phase": ESCAPE, "micro_batch": 1, "seconds": 1.0, "error": ESCAPE}])
    store.write_trial(ROW | texts | {"attempt_log": attempts, "notes": json.dumps({ESCAPE: ESCAPE})})
    for arguments, code in ((["logs", store.uri, "abc"], 0), (["logs", store.uri, f"abc{ESCAPE}"], 2)):
        monkeypatch.setattr(sys, "argv", ["fixstudy", *arguments])
        with pytest.raises(SystemExit) if code else nullcontext():
            main()
        said = "".join(capsys.readouterr())
        assert "taken" in said
        assert all(character.isprintable() or character == "\n" for character in said)


def test_rows_of_before_there_was_a_log_are_read_and_compacted(results):
    path = results.local_path / "trials/abd999.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["log_tail"]), path)
    assert find_trial(results.uri, "abd999")["log_tail"] is None
    assert "Last lines" not in describe(find_trial(results.uri, "abd999"))
    results.compact(least_files=1)
    assert find_trial(results.uri, "abd999")["log_tail"] is None
    assert find_trial(results.uri, "abc123")["log_tail"] == ROW["log_tail"]
