"""Benchmarks still run: what they measure is measured by hand, on an idle machine."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "overhead": (["--trials", "4", "--repeats", "1", "--limit", "99"], "ratio"),
    "scale": (["4", "8"], r"\n +4 .* MB\n +8 .* MB\nA trial of 8 costs the driver \d+\.\d\d x one of 4\."),
    "compaction": (["--trials", "20"], "20 trials:"),
    "analysis_scale": (["--rows", "1e5", "--limit", "60"], r"\(the report\)"),
    "model_level": (["--repeats", "1"], "MODE: inner states"),
    "neuron_level": (["--repeats", "1", "--population", "4", "--generations", "1"], "whole repair, first version"),
    "onnx_reach": (["mobilenet_v3_small"], r"mobilenet_v3_small, dynamo \| loads \| fixstudy"),
    "makespan": (["--gpus", "1", "2"], "1.1 held on all 256"),
}
"""Arguments by name, and a pattern of what is printed."""


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
    assert re.search(printed, done.stdout), done.stdout


def test_growth_of_cost_and_memory_fail_the_scale_benchmark():
    spec = importlib.util.spec_from_file_location("scale", BENCHMARKS / "scale.py")
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    # The largest against the smallest, in whatever order they ran.
    sentences, holds = scale.judge({10_000: 0.012, 100: 0.010, 1_000: 0.5}, 0.9e9)
    assert holds
    assert sentences[0] == "A trial of 10,000 costs the driver 1.20 x one of 100."
    assert not scale.judge({10_000: 0.0121, 100: 0.010}, 0.9e9)[1]
    assert not scale.judge({10_000: 0.010, 100: 0.010}, 1.01e9)[1]
