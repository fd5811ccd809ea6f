"""The contracts of approaches and of subjects: for all there are, or for yours.

``pytest tests/conformance --fixer my_fixer.py`` tests the approaches of one file or module only, and
``pytest tests/conformance --subject my_subject.yaml`` a subject of your own.
"""

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import fixers
from fixers import DeadlineExceededError, Fixer, RepairProblem, TensorSplit, TrainingRecipe, registry
from fixers.requirements import SubjectFacts
from fixers.training.loop import train
from orchestrator.cli.options import subject_from
from orchestrator.subjects.catalogue import catalogue

HERE = Path(__file__).parent
PRESET = "quick"
BUDGETS = {
    "epochs": 3,
    "max_epochs": 10,
    "rounds": 2,
    "generations": 5,
    "iterations": 20,
    "probe_epochs": 5,
    "passing": 30,
}
"""The contract holds for any budget, so it is checked with a small one where an approach has these parameters."""
DEVICE = os.environ.get("FIXSTUDY_TEST_DEVICE", "cpu")
"""Set to cuda to hold the approaches to their contract on a GPU."""
EMBEDDED = ("digits", "digits-s")
LIMIT = 400
"""Samples of a subject of the catalogue, over all four splits."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fixer", action="append", default=[], help="File or module of an approach: test only this one.")
    parser.addoption("--subject", action="append", default=[], help="YAML file of a subject: test only this one.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        given = [subject_from(source) for source in metafunc.config.getoption("subject", default=[])]
        small = [dataclasses.replace(definition, limit=LIMIT) for definition in catalogue().values()]
        # Reading a whole dataset for a few samples of it takes seconds, in each process, and so do large networks.
        slow = [] if given else [pytest.mark.slow]
        metafunc.parametrize(
            "subject",
            [pytest.param(item, id=item.name, marks=[] if item.name in EMBEDDED else slow) for item in given or small],
            scope="session",
        )
    if "fixer" in metafunc.fixturenames:
        chosen = chosen_fixers(tuple(metafunc.config.getoption("fixer", default=[])))
        metafunc.parametrize("fixer", chosen, ids=[cls.name for cls in chosen], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Who gives an approach asks nothing about subjects, and the other way round."""
    given = [kind for kind in ("fixer", "subject") if config.getoption(kind, default=[])]
    if len(given) != 1:
        return
    [other] = {"fixer", "subject"} - {*given}
    left_out = [item for item in items if item.path.parent == HERE and other in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@cache
def chosen_fixers(sources: tuple[str, ...]) -> list[type[Fixer]]:
    """The approaches of some files or modules; all there are, when none is given."""
    before = set(fixers.all_fixers())
    for source in sources:
        registry.load(source)
    return [cls for name, cls in fixers.all_fixers().items() if not sources or name not in before]


class LeNet(nn.Module):
    """Two convolutions and three consecutive dense layers, ReLU only."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class ResidualNet(nn.Module):
    """A residual block with batch norm and dropout, and one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.relu(x + self.block(x)))


RECIPE = TrainingRecipe(optimizer="adam", learning_rate=5e-3, batch_size=32, epochs=12)


@dataclass
class Bench:
    """A small subject with a model that really fails; trained once per session."""

    model: nn.Module
    history: list[dict[str, torch.Tensor]]
    splits: dict[str, TensorSplit]

    def problem(self, **changes: Any) -> RepairProblem:
        arguments: dict[str, Any] = {
            **{name: self.splits[name] for name in ("train", "valid", "repair")},
            "recipe": RECIPE,
            "history": self.history,
            "fingerprint": "conformance",
            "device": DEVICE,
        }
        return RepairProblem(self.model, **{**arguments, **changes})

    def facts(self) -> SubjectFacts:
        return self.problem().facts


@dataclass
class Pace:
    """How often a fix asked whether its deadline had passed, and what it did between two such checks."""

    checks: int = 0
    batches: int = 0
    most_batches: int = 0

    def check(self, check_deadline: Callable[[], None], stop_at: int | None) -> None:
        self.checks += 1
        self.most_batches, self.batches = max(self.most_batches, self.batches), 0
        if stop_at is not None and self.checks >= stop_at:
            raise DeadlineExceededError("The time limit of the fix has passed.")
        check_deadline()


@dataclass
class Run:
    """What one fix gave."""

    fixed: nn.Module
    problem: RepairProblem
    steps: list[tuple[int, dict[str, float]]]
    pace: Pace
    reached: list[str] = field(default_factory=list)
    moved_global_generator: bool = False


@pytest.fixture(scope="session", autouse=True)
def repeatable() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    if DEVICE != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def benches() -> list[Bench]:
    data = load_digits()
    images = torch.tensor(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    parts = zip(("train", "valid", "repair"), order[:570].split((150, 120, 300)), strict=True)
    splits = {name: TensorSplit(images[rows], labels[rows]) for name, rows in parts}
    return [_bench(LeNet, splits), _bench(ResidualNet, splits)]


def _bench(make: Callable[[], nn.Module], splits: dict[str, TensorSplit]) -> Bench:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        bench = Bench(model, [], splits)
        problem = bench.problem(history=[], device="cpu")
        train(
            model,
            splits["train"],
            problem,
            epochs=RECIPE.epochs,
            generator=torch.Generator().manual_seed(0),
            after_epoch=lambda epoch, loss: bench.history.append(copy.deepcopy(model.state_dict())),
        )
    return bench


@pytest.fixture(scope="session")
def bench(fixer: type[Fixer], benches: list[Bench]) -> Bench:
    """The first of the small subjects to which the approach applies."""
    for candidate in benches:
        if fixer.unmet(candidate.facts()) is None:
            return candidate
    pytest.fail(f"{fixer.name} applies to neither a LeNet nor a residual network with batch norm; loosen requirements.")


@pytest.fixture(scope="session")
def instance(fixer: type[Fixer]) -> Fixer:
    """The approach with its quick preset, which every approach has, and less of everything that takes time."""
    assert PRESET in fixer.presets, f"{fixer.name} needs a preset '{PRESET}' that takes seconds on a small subject"
    quick, infos = fixer.build({}, PRESET), fixer.parameter_infos()
    less = {name: min(value, getattr(quick, name)) for name, value in BUDGETS.items() if name in infos}
    return fixer.build({name: max(value, infos[name].low or 0) for name, value in less.items()}, PRESET)


@pytest.fixture(scope="session")
def run(fixer: type[Fixer], instance: Fixer, bench: Bench) -> Run:
    """One fix, shared by the tests that only look at its result."""
    return make_run(instance, bench)


@pytest.fixture(scope="session")
def again(fixer: type[Fixer], instance: Fixer, bench: Bench, run: Run) -> Run:
    """The same fix once more, from another state of torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        repeated = make_run(instance, bench)
        repeated.moved_global_generator = not torch.equal(before, torch.get_rng_state())
    return repeated


def make_run(instance: Fixer, bench: Bench, *, stop_at: int | None = None, **changes: Any) -> Run:
    """One fix; with ``stop_at``, its deadline passes when it checks the deadline for that time."""
    steps: list[tuple[int, dict[str, float]]] = []
    problem = bench.problem(on_progress=lambda step, figures: steps.append((step, dict(figures))), **changes)
    pace, check_deadline = Pace(), problem.check_deadline

    def count(module: nn.Module, inputs: object) -> None:
        pace.batches += isinstance(module, type(bench.model))

    problem.check_deadline = lambda: pace.check(check_deadline, stop_at)  # type: ignore[method-assign]
    counting = register_module_forward_pre_hook(count)
    try:
        with what_is_reached() as reached:
            fixed = fixers.fix(instance, problem)
    finally:
        counting.remove()
    pace.check(lambda: None, None)
    return Run(fixed, problem, steps, pace, reached)


OWN_FILES = tuple(
    Path(folder).resolve()
    for folder in (sys.prefix, sys.base_prefix, *fixers.__path__, "/usr", "/lib", "/etc", "/proc", "/sys", "/dev")
)
"""What libraries open by themselves: their own code, the system's, and its description of the machine."""
LOOKING_AROUND = {"socket.connect", "subprocess.Popen", "os.system", "gc.get_objects", "gc.get_referrers"}
_listeners: list[list[str]] = []


@sys.addaudithook
def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listeners:
        return
    if event in LOOKING_AROUND:
        _listeners[-1].append(event)
    elif event == "open" and isinstance(arguments[0], str):
        path = Path(arguments[0]).resolve()
        if not any(path.is_relative_to(folder) for folder in OWN_FILES):
            _listeners[-1].append(f"open {path}")


@contextmanager
def what_is_reached() -> Iterator[list[str]]:
    """Files, connections, processes and foreign objects that are reached for meanwhile, by Python's audit events."""
    reached: list[str] = []
    _listeners.append(reached)
    try:
        yield reached
    finally:
        _listeners.pop()
