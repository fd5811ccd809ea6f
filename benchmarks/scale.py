"""What a trial costs around its fixing as a study grows: 100, 1,000 and 10,000 trials of a fixer that does nothing.

    python benchmarks/scale.py                  # 100 and 1,000 trials on 2 cores
    python benchmarks/scale.py 100 1000 10000   # the whole claim: 10,000 take about ten minutes on 2 cores
    python benchmarks/scale.py 1000 --seconds 1 --lanes 8     # against Ray's own figure, see below

Every size is a process of its own, so that its peak memory is its own. Printed are CPU seconds of the driver per trial
(other programs on the machine don't change them) for planning, scheduling, compacting and `fixstudy status` before and
after compaction, wall seconds per trial from the first row to the last, and the driver's peak memory. Fails when a
trial of the largest size costs the driver more than 1.2 x one of the smallest, or the driver takes 1 GB.

With `--seconds` the fixer waits as long and needs no core for it, so that `--lanes` may be more than there are cores,
up to about four a core. Ray names 715 s for 10,000 trials of one second on 16 cores, where 625 s would be the minimum:
1.14 x. Printed is the ratio in the second half of the study, when the workers of all lanes have started.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.driver.observer import StudyObserver

STUDY = """
study: scale
subjects: [digits]
plugins: ['{plugin}']
fixers: [{{name: does_nothing, params: {{seconds: {seconds}}}}}]
seeds: {trials}
attack: none
keep_models: none
pictures: false
"""
PHASES = ("plan", "schedule", "compact", "status", "status_compacted")
MOST_GROWTH = 1.2
MOST_BYTES = 1e9


class Clock:
    """CPU seconds and peak resident memory of this process by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    def timed(self, owner: Any, name: str, phase: str, before: Callable[[], None] = lambda: None) -> None:
        """Replace a function by one that is timed."""
        function = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                # Merging in the background is a part of scheduling, and counted there.
                return function(*args, **options)
            before()
            return self.call(phase, function, *args, **options)

        setattr(owner, name, wrapped)

    def call(self, phase: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function and add its time."""
        Path("/proc/self/clear_refs").write_text("5")
        begin = time.process_time()
        try:
            return function(*args, **options)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - begin
            self.peak_bytes[phase] = max(resident("VmHWM"), self.peak_bytes.get(phase, 0))


def resident(field: str) -> int:
    """A field of the process's status, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


class Rows(StudyObserver):
    """Times at which rows appear."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def row(self, *args: Any) -> None:
        """Note the time."""
        self.ends.append(time.monotonic())


def measure(trials: int, lanes: int | None, seconds: float) -> dict[str, float]:
    """Run one study in this process; figures per trial."""
    import ray

    from analysis.terminal.commands import status_command
    from orchestrator.driver import loaded, study_run
    from orchestrator.driver.run import run_study
    from orchestrator.storage.store import Store

    clock, rows = Clock(), Rows()

    with tempfile.TemporaryDirectory() as folder:

        def status(phase: str) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                # Once before, because importing DuckDB isn't a cost of a trial.
                status_command(f"{folder}/results", "json")
                clock.call(phase, status_command, f"{folder}/results", "json")

        clock.timed(loaded, "make_plan", "plan")
        clock.timed(study_run, "run_wave", "schedule")
        clock.timed(Store, "compact", "compact", before=lambda: status("status"))
        plugin = Path(__file__).resolve().parents[1] / "examples" / "misbehaving_fixers.py"
        study = Path(folder, "study.yaml")
        study.write_text(STUDY.format(plugin=plugin, trials=trials, seconds=seconds))
        if lanes:
            ray.init("local", num_cpus=lanes, include_dashboard=False, log_to_driver=False)
        summary = run_study(study, results=f"{folder}/results", display=rows)
        assert summary.outcomes == {"OK": trials}, summary
        status("status_compacted")
    figures = {phase: clock.seconds[phase] / trials for phase in PHASES}
    figures["wall"] = (rows.ends[-1] - rows.ends[0]) / (trials - 1)
    half = trials // 2
    figures["wall_later"] = (rows.ends[-1] - rows.ends[half]) / max(1, trials - 1 - half)
    return figures | {f"{phase}_bytes": peak for phase, peak in clock.peak_bytes.items()}


def main() -> int:
    """Run every size, print a table, and say whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--lanes", type=int, help="trials at once; default: the cores")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long every trial waits")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # Tune imports these two wherever they are installed, 45 MB of them. The tests need them; a study doesn't.
        sys.modules.update(mlflow=None, wandb=None)
        print(json.dumps(measure(arguments.sizes[0], arguments.lanes, arguments.seconds)))
        return 0
    print("trials   " + "".join(f"{phase:>18}" for phase in (*PHASES, "wall")) + "   peak by phase")
    print("         " + "".join(f"{'ms a trial':>18}" for _ in (*PHASES, "wall")))
    costs, peak = {}, 0.0
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--here", str(size), "--seconds", str(arguments.seconds)]
        command += ["--lanes", str(arguments.lanes)] if arguments.lanes else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        cells = "".join(f"{1000 * figures[phase]:>18.2f}" for phase in (*PHASES, "wall"))
        peaks = [figures[f"{phase}_bytes"] for phase in PHASES]
        print(f"{size:>6}   {cells}   {' '.join(f'{value / 1e6:,.0f}' for value in peaks)} MB", flush=True)
        costs[size] = sum(figures[phase] for phase in PHASES)
        if arguments.seconds:
            least = arguments.seconds / (arguments.lanes or os.cpu_count())
            ratio = figures["wall_later"] / least
            print(f"{ratio:.2f} x the minimum of {1000 * least:.1f} ms a trial, in the second half", flush=True)
        # `status` is a process of its own in real life.
        peak = max(peak, *(figures[f"{phase}_bytes"] for phase in ("plan", "schedule", "compact")))
    sentences, holds = judge(costs, peak)
    print("\n".join(sentences))
    return int(not holds)


def judge(costs: dict[int, float], peak: float) -> tuple[list[str], bool]:
    """What the figures say, and whether the limits hold.

    Args:
        costs: CPU seconds of the driver per trial, by number of trials.
        peak: bytes.
    """
    growth = costs[max(costs)] / costs[min(costs)]
    sentences = [
        f"A trial of {max(costs):,} costs the driver {growth:.2f} x one of {min(costs):,}.",
        f"The driver's peak is {peak / 1e6:,.0f} MB.",
    ]
    return sentences, growth <= MOST_GROWTH and peak <= MOST_BYTES


if __name__ == "__main__":
    sys.exit(main())
