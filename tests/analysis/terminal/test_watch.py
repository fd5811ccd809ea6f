"""`fixstudy status`, once and watched."""

import io
import sys

import pytest

from analysis.terminal import commands
from orchestrator.storage.store import Store


@pytest.fixture
def results(tmp_path):
    store = Store(tmp_path / "results")
    store.create()

    def write(number, host, outcome="OK"):
        store.write_trial({
            "trial_id": f"t{number}", "study": "s", "stage": "final", "fixer": "care", "subject": "digits",
            "seed": number, "params": "{}", "code_version": "v", "subject_fingerprint": "f", "outcome": outcome,
            "host": host,
        })  # fmt: skip

    write(0, "node-a")
    return store, write


def test_nodes_are_shown_when_there_are_several(results, capsys):
    store, write = results
    commands.status_command(store.uri)
    assert "By node" not in capsys.readouterr().out
    write(1, "node-b", "FAILURE")
    commands.status_command(store.uri)
    text = capsys.readouterr().out
    assert "By node" in text
    assert "node-a" in text
    assert "node-b" in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watching_shows_news_in_place(results, monkeypatch):
    store, write = results
    screen, looks = Terminal(), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        write(len(looks), f"node-{len(looks)}")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("time.sleep", sleep)
    commands.watch_command(store.uri)
    text = screen.getvalue()
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1, "one screen of its own, left at the end"
    assert "\x1b[2J" not in text, "clearing is what flickers"
    assert "1 trials done" in text
    assert "3 trials done" in text.rpartition("\x1b[?1049l")[2], "what was seen last stays"
