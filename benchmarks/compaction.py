"""What storing costs per trial as a study grows: write, merge, resume, status.

    python benchmarks/compaction.py [--trials 100 1000 10000] [--predictions 100] [--merge-every 512]

Files are merged while they are written, as in a study. Printed are milliseconds of CPU per trial (wall seconds in
brackets) of all writes with merging, of the last merge, and of asking which trials are done, for two columns of all
rows, and for the status: both right before the last merge, when it is slowest, and after it. Fails when a trial costs
more than 1.2 times as much at the largest size as at the next smaller one.
"""

import argparse
import contextlib
import io
import resource
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from analysis.terminal.commands import status_command
from orchestrator.storage.store import Store

LIMIT = 1.2


class Costs:
    """CPU and wall seconds by name."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def of_step(self, name: str) -> Iterator[None]:
        """Measure a block."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.of[name] = time.process_time() - cpu, time.perf_counter() - wall


def trial(number: int, predictions: int) -> tuple[dict[str, object], dict[str, object]]:
    """A row and its predictions; ids are spread like hashes."""
    labels = np.arange(predictions) % 10
    fixed = np.where(np.arange(predictions) % 31 == number % 31, (labels + 1) % 10, labels)
    row = {
        "trial_id": f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}",
        "study": "scale",
        "stage": "final",
        "outcome": "OK",
        "subject": f"subject-{number % 5}",
        "fixer": f"fixer_{number // 5 % 16:02}",
        "seed": number,
        "fix_seconds": 1.0,
        "repair_rate": 0.5,
    }
    ids = np.arange(predictions)
    columns = {"sample_id": ids, "label": labels, "group": [None] * predictions, "original": labels, "fixed": fixed}
    return row, columns


def measure(trials: int, predictions: int, merge_every: int) -> dict[str, tuple[float, float]]:
    """Costs of a study of so many trials."""
    costs = Costs()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.create()
        with costs.of_step("write"):
            for number in range(trials):
                row, columns = trial(number, predictions)
                store.write_trial(row, columns, {"step": [1], "metric": ["loss"], "value": [0.5], "seconds": [0.1]})
                if (number + 1) % merge_every == 0:
                    store.compact(also_small=False)
        for when in ("before", "after"):
            with costs.of_step(f"done {when}"):
                assert len(store.done()) == trials
            with costs.of_step(f"rows {when}"):
                assert len(store.rows(["outcome", "seed"])) == trials
            with costs.of_step(f"status {when}"), contextlib.redirect_stdout(io.StringIO()):
                status_command(folder, "json")
            if when == "before":
                with costs.of_step("last merge"):
                    store.compact(least_files=1)
    return costs.of


def main() -> None:
    """Measure each size, print, and judge the growth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--predictions", type=int, default=100)
    parser.add_argument("--merge-every", type=int, default=512)
    arguments = parser.parse_args()
    measure(20, arguments.predictions, 8)
    per_trial = []
    for trials in arguments.trials:
        costs = measure(trials, arguments.predictions, arguments.merge_every)
        total = sum(cpu for cpu, _ in costs.values()) / trials
        per_trial.append(total)
        steps = "   ".join(f"{name} {cpu / trials * 1e3:.3f} ({wall:.2f} s)" for name, (cpu, wall) in costs.items())
        print(f"{trials:6} trials: {total * 1e3:.3f} ms   {steps}", flush=True)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if len(per_trial) > 1 and per_trial[-1] > LIMIT * per_trial[-2]:
        sys.exit(f"A trial costs {per_trial[-1] / per_trial[-2]:.2f} times as much as in a smaller study.")


if __name__ == "__main__":
    main()
