"""What is told while a study runs."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.cli import live_display
from orchestrator.cli.live_display import StudyDisplay, duration, node_names
from orchestrator.worker.monitor import RunningTrial


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live_display.time, "monotonic", clock)
    return clock


def test_what_never_ran_says_nothing_of_the_time_left(clock):
    text = io.StringIO()
    display = StudyDisplay("mine", Console(file=text))
    display.planned(10, 0, list)
    display.row("a", "UNADAPTABLE", "dense_chain", 10)
    assert "left" not in text.getvalue()
    clock.now = 200.0
    display.row("b", "OK", None, 10)
    assert text.getvalue().splitlines()[-1] == "mine: 2/10 trials done, about 13 min 20 s left", "8 trials of 100 s"


def test_the_first_few_of_many_say_nothing_of_the_time_left(clock):
    """The longest trials run first."""
    text = io.StringIO()
    display = StudyDisplay("mine", Console(file=text))
    display.planned(92, 4, list)
    for number in range(9):
        clock.now += 60.0
        display.row(str(number), "OK", None, 92)
        assert ("left" in text.getvalue()) == (number == 8), "9 of the 88 that run"


def test_the_plan_may_grow(clock):
    text = io.StringIO()
    display = StudyDisplay("mine", Console(file=text))
    display.planned(1, 0, list)
    for number in range(3):
        display.row(str(number), "FAILURE", "nan", max(1, number + 1))
    assert "mine: 3/3 trials done" in text.getvalue().splitlines()[-1]


def test_without_a_terminal_a_line_breaks_a_long_silence(clock):
    text = io.StringIO()
    display = StudyDisplay("mine", Console(file=text))
    flying = [trial("a", "apricot on [red]mnist, seed 0", "n", "h"), trial("b", "care on mnist", "n", "h")]
    display.planned(9, 4, lambda: flying)
    for clock.now in (110.0, 161.0, 170.0, 230.0):
        flying[0] = replace(flying[0], seconds=clock.now - 100)
        display.say_what_runs()
    assert text.getvalue().splitlines()[1:] == [
        "mine: 4/9 trials done; apricot on [red]mnist, seed 0 (fix) for 1 min 1 s and 1 more",
        "mine: 4/9 trials done; apricot on [red]mnist, seed 0 (fix) for 2 min 10 s and 1 more",
    ]


def test_durations_are_for_people():
    assert [duration(s) for s in (0.4, 59, 61, 7320)] == ["0 s", "59 s", "1 min 1 s", "2 h 2 min"]


def trial(trial, label, node, host):
    return RunningTrial(trial, label, "fix", node, 1, 0, host=host)


def rendered(display):
    text = io.StringIO()
    Console(file=text, width=120).print(display.render())
    return text.getvalue()


def test_one_node_is_not_named_and_several_are_with_their_fixers():
    display = StudyDisplay("mine", Console(file=io.StringIO()))
    flying = [
        trial("abcdef0123", "care on digits, seed 0", "n1", "gpu-1"),
        trial("bbcdef0123", "care on digits, seed 1", "n1", "gpu-1"),
    ]
    display.planned(10, 0, lambda: flying)
    assert "gpu-1" not in rendered(display)
    assert "abcdef01 " in rendered(display), "what `fixstudy stop --trial` asks for"
    flying.append(trial("cccdef0123", "arachne on [red]digits", "n2", "gpu-2"))
    assert "gpu-1: 2 care" in rendered(display)
    assert "gpu-2: 1 arachne" in rendered(display)
    assert "[red]digits" in rendered(display), "names are no markup"


def test_nodes_that_share_a_host_are_told_apart():
    flying = [trial("a", "care on d", "1" * 9, "h"), trial("b", "care on d", "2" * 9, "h")]
    assert node_names(flying) == {"1" * 9: "h (111111)", "2" * 9: "h (222222)"}


def test_the_dashboard_is_shown_when_it_is_on():
    text = io.StringIO()
    display = StudyDisplay("mine", Console(file=text))
    assert "dashboard" not in rendered(display)
    display.dashboard("http://127.0.0.1:8265")
    assert "http://127.0.0.1:8265" in rendered(display)
    assert "http://127.0.0.1:8265" in text.getvalue(), "also where there is no terminal"
