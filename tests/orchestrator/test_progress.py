"""What is told while a study runs."""

import io

from rich.console import Console

from orchestrator import progress
from orchestrator.progress import StudyDisplay, duration


def test_what_never_ran_says_nothing_of_the_time_left(monkeypatch):
    clock = iter([100.0, 101.0, 200.0, 200.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    display = StudyDisplay("mine", Console(file=text))
    display.planned(10, 0, list)
    display.row("a", "UNADAPTABLE", "dense_chain")
    assert "left" not in text.getvalue()
    display.row("b", "OK", None)
    assert text.getvalue().splitlines()[-1] == "mine: 2/10 trials done, about 13 min 20 s left", "8 trials of 100 s"


def test_durations_are_for_people():
    assert [duration(s) for s in (0.4, 59, 61, 7320)] == ["0 s", "59 s", "1 min 1 s", "2 h 2 min"]
