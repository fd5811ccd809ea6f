"""How near the order of our trials comes to the best there is: the study's whole plan on 1 to 256 GPUs.

    python benchmarks/makespan.py [--gpus 1 2 4 8 ...]

The plan is the study's: 16 fixers, 5 subjects, 3 seeds, with its published times of fixing, one GPU a trial. Cells for
which no time is published (CORRUPTED, FAILURE, UNADAPTABLE) take none here. The queue is the one that hands out trials
in a real run; only the clock is simulated. Printed are makespans over the lower bound max(longest trial, total / GPUs)
for three states of knowledge: times known (every cell has run before, or `fixstudy profile` has run it), times guessed
from the level of the fixer and the size of the subject (a first run), and nothing (the order of the study file).
"""

import argparse
import heapq
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from analysis.published.published import import_published
from orchestrator.planning.cost import CostModel
from orchestrator.planning.plan import Cell, Plan
from orchestrator.planning.queue import TrialQueue
from orchestrator.storage.store import Store
from orchestrator.study.schema import FixerEntry, Study
from orchestrator.study.trials import TrialSpec

SEEDS = 3
GPUS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SIZES = {
    "mnist": (54_000 + 5_000, 62e3),
    "utkface": (17_778 + 1_976, 24e6),
    "cifar10": (45_000 + 5_000, 15e6),
    "cifar10s": (45_000 + 10_000, 11e6),
    "imagenet": (1_200_000 + 25_000, 8e6),
}
"""Training and repair samples, and about how many weights: what the guess knows of a subject."""


@dataclass(frozen=True)
class PublishedStudy:
    """The trials of the study that have a published time."""

    cells: tuple[Cell, ...]
    known: CostModel
    guessed: CostModel

    @property
    def specs(self) -> list[TrialSpec]:
        """All trials."""
        return [spec for cell in self.cells for spec in cell.final]

    def ratio(self, gpus: int, cost: Callable[[TrialSpec], float]) -> float:
        """Makespan over its lower bound when trials are ordered by ``cost``."""
        study = Study(study="published", subjects=list(SIZES), fixers=[cell.entry for cell in self.cells])
        queue = TrialQueue(study, Plan(self.cells, frozenset()), {}, {}, cost)
        return makespan(queue, self.known, gpus) / lower_bound(map(self.known, self.specs), gpus)


def makespan(queue: TrialQueue, seconds: Callable[[TrialSpec], float], lanes: int) -> float:
    """Seconds until the last trial of a queue ends; the queue is empty afterwards.

    Args:
        queue: decides which trial is next whenever a lane is free.
        seconds: what a trial really takes; the queue orders by what it expects.
        lanes: trials that run at once, at least one.
    """
    now = 0.0
    flying: list[tuple[float, str]] = []
    while True:
        while len(flying) < lanes and (spec := queue.next()) is not None:
            heapq.heappush(flying, (now + seconds(spec), spec.trial_id))
        if not flying:
            return now
        now, trial_id = heapq.heappop(flying)
        queue.finish(trial_id, None)


def lower_bound(seconds: Iterable[float], lanes: int) -> float:
    """Seconds that no order can beat: the longest trial, or all lanes busy to the end."""
    each = list(seconds)
    return max(max(each, default=0.0), sum(each) / lanes)


def published_study() -> PublishedStudy:
    """Read the published tables as a study that has run."""
    with tempfile.TemporaryDirectory() as folder:
        store, nothing = Store(import_published(Path(folder, "published"))), Store(Path(folder, "nothing"))
        rows = [row for row in store.rows(["fixer", "subject", "fix_seconds"]) if row["fix_seconds"] is not None]
        subjects = {
            name: SimpleNamespace(row={"n_train": samples, "n_repair": 0, "n_parameters": weights})
            for name, (samples, weights) in SIZES.items()
        }
        known, guessed = CostModel(store, subjects), CostModel(nothing, subjects)
    return PublishedStudy(tuple(cell(row["fixer"], row["subject"]) for row in rows), known, guessed)


def cell(fixer: str, subject: str) -> Cell:
    """One fixer on one subject with every seed."""
    specs = tuple(
        TrialSpec(f"{fixer}-{subject}-{seed}", "published", "final", subject, fixer, "{}", seed, subject, "")
        for seed in range(SEEDS)
    )
    return Cell(FixerEntry(name=fixer), subject, None, adapt=(), final=specs, n_final=SEEDS)


def table(study: PublishedStudy, gpus: Iterable[int]) -> str:
    """One line per number of GPUs, as Markdown."""
    seconds = [study.known(spec) for spec in study.specs]
    lines = ["| GPUs | at best | times known | guessed | file order |", "|---:|---:|---:|---:|---:|"]
    for n in gpus:
        ratios = [study.ratio(n, cost) for cost in (study.known, study.guessed, lambda spec: 0.0)]
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        lines.append(f"| {n} | {lower_bound(seconds, n) / 3600:,.0f} h | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and the worst ratio of all numbers of GPUs from 1 to 256."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    study = published_study()
    seconds = [study.known(spec) for spec in study.specs]
    print(f"{len(seconds)} trials, {sum(seconds) / 3600:,.0f} h in all, the longest {max(seconds) / 3600:,.0f} h\n")
    print(table(study, parser.parse_args().gpus))
    for name, cost in (("known", study.known), ("guessed", study.guessed), ("file order", lambda spec: 0.0)):
        ratios = {n: study.ratio(n, cost) for n in range(1, 257)}
        worst = max(ratios, key=ratios.__getitem__)
        above = [n for n, ratio in ratios.items() if ratio > 1.1]
        over = f"above 1.1 on {len(above)} of 256: {above[0]} to {above[-1]}" if above else "1.1 held on all 256"
        print(f"{name}: worst {ratios[worst]:.3f} on {worst} GPUs; {over}")


if __name__ == "__main__":
    main()
