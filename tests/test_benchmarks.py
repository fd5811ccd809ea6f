"""Benchmarks still run: what they measure is measured by hand, on an idle machine."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "overhead": (["--trials", "4", "--repeats", "1", "--limit", "99"], "ratio"),
    "scale": (["4"], "A trial of 4 costs the driver 1.00 x one of 4."),
    "compaction": (["--trials", "20"], "20 trials:"),
    "analysis_scale": (["--rows", "1e5", "--limit", "60"], "(the report)"),
    "model_level": (["--repeats", "1"], "MODE: inner states"),
    "neuron_level": (["--repeats", "1", "--population", "4", "--generations", "1"], "whole repair, first version"),
    "makespan": (["--gpus", "1", "2"], "1.1 held on all 256"),
}
"""Arguments by name, and what is printed."""


def test_every_benchmark_is_run_here():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs(name):
    arguments, printed = SMALL[name]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed in done.stdout
