"""What a person sees while a study runs: one live display, or plain lines where there is no terminal."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orchestrator.base.background import repeating
from orchestrator.base.units import duration
from orchestrator.driver.observer import StudyObserver
from orchestrator.worker.monitor import RunningTrial

SECONDS_BETWEEN_POLLS = 0.5
SECONDS_BETWEEN_LINES = 30.0
SECONDS_OF_SILENCE = 60.0
"""Without a terminal; after them a line says what is running."""
MOST_TRIALS_SHOWN = 12
FEWEST_OF_ALL = 10
"""One in so many trials must have ended before the time that is left is told."""
STYLES = {"OK": "green", "CORRUPTED": "yellow", "FAILURE": "red", "UNADAPTABLE": "dim"}


class StudyDisplay(StudyObserver):
    """Done, running and failed trials, and when the rest will be done.

    Args:
        title: name of the study.
        console: where to write; standard error when not given, so that it doesn't mix with piped output.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._title = title
        self._outcomes: Counter[str] = Counter()
        self._planned = 0
        self._before = 0
        self._began: float | None = None
        self._event = "reading the study"
        self._last_line = 0.0
        self._dashboard = ""
        self._running: Callable[[], list[RunningTrial]] = list
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(title, total=None, eta="")

    @contextmanager
    def shown(self) -> Iterator["StudyDisplay"]:
        """Show it until the block ends."""
        if not self._console.is_terminal:
            with repeating(self.say_what_runs, SECONDS_BETWEEN_POLLS, "display"):
                yield self
            return
        with (
            Live(self.render(), console=self._console, refresh_per_second=4, transient=True) as live,
            repeating(lambda: live.update(self.render()), SECONDS_BETWEEN_POLLS, "display"),
        ):
            yield self

    def event(self, sentence: str) -> None:
        """Something worth a line happened."""
        self._event = sentence
        if not self._console.is_terminal:
            self._say(f"{self._title}: {sentence}")

    def caution(self, sentence: str) -> None:
        """Whoever reads the figures of a subject must know this: it stays on the screen."""
        self._say(sentence)

    def dashboard(self, url: str) -> None:
        """Ray shows itself at this address."""
        self._dashboard = url
        if not self._console.is_terminal:
            self._say(f"{self._title}: Ray's dashboard is at {url}")

    def planned(self, planned: int, done_before: int, running: Callable[[], list[RunningTrial]]) -> None:
        """The plan is known: its trials, those that have a row already, and how to ask for the ones in flight."""
        self._planned, self._before, self._running = planned, done_before, running
        self._began = time.monotonic()
        if done_before:
            self.event(f"{done_before} of {planned} trials are done already")

    def ended(self) -> None:
        """No trial runs any more, and nobody is left to ask which ones do."""
        self._running = list

    def row(self, trial_id: str, outcome: str, reason_code: str | None, planned: int) -> None:
        """A trial has its row, and this is what is known of the plan by now."""
        self._outcomes[outcome] += 1
        self._planned = planned
        done = self._before + self._outcomes.total()
        bad = outcome in ("FAILURE", "CORRUPTED")
        silent = time.monotonic() - self._last_line
        if not self._console.is_terminal and (bad or silent > SECONDS_BETWEEN_LINES):
            latest = f"; trial {trial_id} is {outcome} ({reason_code})" if bad else ""
            self._say(f"{self._title}: {done}/{self._planned} trials done{self._eta()}{latest}")

    def say_what_runs(self) -> None:
        """A line for those who wait without a terminal, when there was none for a while."""
        now = time.monotonic()
        if self._began is None or now - self._last_line < SECONDS_OF_SILENCE:
            return
        flying = sorted(self._running(), key=lambda trial: -trial.seconds)
        if flying:
            oldest = flying[0]
            others = f" and {len(flying) - 1} more" if len(flying) > 1 else ""
            self._say(
                f"{self._title}: {self._before + self._outcomes.total()}/{self._planned} trials done{self._eta()}; "
                f"{oldest.label} ({oldest.phase}) for {duration(oldest.seconds)}{others}"
            )

    def render(self) -> RenderableType:
        """The display as it stands."""
        done = self._before + self._outcomes.total()
        self._bar.update(self._task, total=self._planned or None, completed=done, eta=self._eta().removeprefix(", "))
        counts = Text("  ").join(
            Text(f"{self._outcomes[name]} {name}", style=style)
            for name, style in STYLES.items()
            if self._outcomes[name]
        )
        parts: list[RenderableType] = (
            [self._bar, counts] if self._outcomes else [self._bar, Text(self._event, style="dim")]
        )
        flying = self._running()
        if flying:
            nodes = node_names(flying)
            if len(nodes) > 1:
                parts += [Text(line, style="bold") for line in by_node(flying, nodes)]
            table = Table.grid(padding=(0, 2))
            for trial in flying[:MOST_TRIALS_SHOWN]:
                figures = "  ".join(f"{name} {value:.4g}" for name, value in trial.figures.items())
                # As much of the id as `fixstudy stop --trial` needs.
                cells = [Text(trial.trial_id[:8], style="dim"), Text(trial.label), Text(trial.phase)]
                cells += [Text(f"{trial.seconds:.0f} s"), Text(f"step {trial.step}"), Text(figures)]
                table.add_row(*cells, *([Text(nodes[trial.node_id])] if len(nodes) > 1 else []))
            parts.append(table)
            if len(flying) > MOST_TRIALS_SHOWN:
                parts.append(Text(f"and {len(flying) - MOST_TRIALS_SHOWN} more", style="dim"))
        if self._dashboard:
            parts.append(Text(f"Ray's dashboard: {self._dashboard}", style="dim"))
        return Group(*parts)

    def _eta(self) -> str:
        done = self._outcomes.total()
        # What is UNADAPTABLE took no time, and says nothing of how long the rest takes.
        ran = done - self._outcomes["UNADAPTABLE"]
        left = self._planned - self._before - done
        # The longest trials come first, so the first few of many say little.
        if self._began is None or left <= 0 or ran * FEWEST_OF_ALL < ran + left:
            return ""
        return f", about {duration((time.monotonic() - self._began) / ran * left)} left"

    def _say(self, line: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        sys.stderr.flush()


def node_names(flying: Sequence[RunningTrial]) -> dict[str, str]:
    """A name for people of each node with trials in flight; with a part of its id where several share a host."""
    hosts = {trial.node_id: trial.host or "node" for trial in flying}
    names = Counter(hosts.values())
    return {
        node: host if names[host] == 1 else f"{host} ({node[:6]})"
        for node, host in sorted(hosts.items(), key=lambda item: (item[1], item[0]))
    }


def by_node(flying: Sequence[RunningTrial], nodes: Mapping[str, str]) -> list[str]:
    """A line per node: how many trials of which fixer are in flight there."""
    lines = []
    for node, name in nodes.items():
        fixers = Counter(trial.label.partition(" on ")[0] for trial in flying if trial.node_id == node)
        counts = ", ".join(f"{count} {fixer}" for fixer, count in sorted(fixers.items()))
        lines.append(f"{name}: {counts}")
    return lines
