"""One fix under observation: its steps, its pace, and what it reaches for beside its problem."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fixers.apply import fix
from fixers.errors import DeadlineExceededError
from fixers.fixer import Fixer
from fixers.problem import RepairProblem
from fixers.testing.benches import DEVICE, Bench

OWN_FILES: Final = tuple(
    Path(folder).resolve()
    for folder in (
        sys.prefix, sys.base_prefix, Path(torch.__file__).parents[1], Path(__file__).parents[1],
        "/usr", "/lib", "/etc", "/proc", "/sys", "/dev",
    )
)  # fmt: skip
"""What libraries open by themselves: their own code, the system's, and its description of the machine."""
LOOKING_AROUND: Final = {
    "socket.connect", "subprocess.Popen", "os.system", "gc.get_objects", "gc.get_referrers",
}  # fmt: skip
_listeners: list[list[str]] = []


@dataclass
class Pace:
    """How often a fix asked whether its deadline had passed, and what it did between two such checks."""

    checks: int = 0
    batches: int = 0
    """Since the last check."""
    most_batches: int = 0

    def check(self, check_deadline: Callable[[], None], stop_at: int | None = None) -> None:
        """The deadline is checked; it has passed at the check ``stop_at``."""
        self.checks += 1
        self.most_batches, self.batches = max(self.most_batches, self.batches), 0
        if stop_at is not None and self.checks >= stop_at:
            raise DeadlineExceededError("The time limit of the fix has passed.")
        check_deadline()

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count the batches that go through models of a kind."""

        def count(module: nn.Module, inputs: object) -> None:
            self.batches += isinstance(module, type(model))

        handle = register_module_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Run:
    """What one fix gave."""

    fixed: nn.Module
    problem: RepairProblem
    steps: list[tuple[int, dict[str, float]]]
    pace: Pace
    reached: list[str]
    moved_global_generator: bool


def make_run(fixer: Fixer, bench: Bench, *, stop_at: int | None = None, **changes: Any) -> Run:
    """One fix; with ``stop_at``, its deadline passes when it checks the deadline for that time."""
    steps: list[tuple[int, dict[str, float]]] = []
    problem = bench.problem(on_progress=lambda step, figures: steps.append((step, dict(figures))), **changes)
    pace, check_deadline = Pace(), problem.check_deadline
    problem.check_deadline = lambda: pace.check(check_deadline, stop_at)  # type: ignore[method-assign]
    before = torch.get_rng_state()
    with pace.counting(bench.model), what_is_reached() as reached:
        fixed = fix(fixer, problem)
    # The end of a run is a check of our own.
    pace.check(lambda: None)
    return Run(fixed, problem, steps, pace, reached, not torch.equal(before, torch.get_rng_state()))


@contextmanager
def repeatable() -> Iterator[None]:
    """Have torch give the same bits each time, as far as it can."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    if DEVICE != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def what_is_reached() -> Iterator[list[str]]:
    """Files, connections, processes and foreign objects that are reached for meanwhile, by Python's audit events."""
    reached: list[str] = []
    _listeners.append(reached)
    try:
        yield reached
    finally:
        _listeners.pop()


@sys.addaudithook
def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listeners:
        return
    if event in LOOKING_AROUND:
        _listeners[-1].append(event)
    elif event == "open" and isinstance(arguments[0], str):
        path = Path(arguments[0]).resolve()
        # Tracebacks read the source of whoever is in them, and torch makes some without an error.
        if path.suffix != ".py" and not any(path.is_relative_to(folder) for folder in OWN_FILES):
            _listeners[-1].append(str(path))
