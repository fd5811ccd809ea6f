"""Benchmarks still run: what they measure is measured by hand, on an idle machine."""

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.plan import Cell, Plan
from orchestrator.planning.queue import TrialQueue
from orchestrator.study.schema import FixerEntry, Study
from orchestrator.study.trials import TrialSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "overhead": (["--trials", "4", "--repeats", "1", "--limit", "99"], "ratio"),
    "scale": (["4", "8"], r"\n +4 .* MB\n +8 .* MB\nA trial of 8 costs the driver \d+\.\d\d x one of 4\."),
    "compaction": (["--trials", "20"], "20 trials:"),
    "analysis_scale": (["--rows", "1e5", "--limit", "60"], r"\(the report\)"),
    "model_level": (["--repeats", "1"], "MODE: inner states"),
    "neuron_level": (["--repeats", "1", "--population", "4", "--generations", "1"], "whole repair, first version"),
    "onnx_reach": (["mobilenet_v3_small"], r"mobilenet_v3_small, dynamo \| loads \| fixstudy"),
    "sample_gradients": ([], r"ms a sample, \d+\.\d times\npeak memory"),
    "makespan": (["--gpus", "1", "2"], "1.1 held on all 256"),
}
"""Arguments by name, and a pattern of what is printed."""


def imported(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


makespan = imported("makespan")


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
    scale = imported("scale")
    # The largest against the smallest, in whatever order they ran.
    sentences, holds = scale.judge({10_000: 0.012, 100: 0.010, 1_000: 0.5}, 0.9e9)
    assert holds
    assert sentences[0] == "A trial of 10,000 costs the driver 1.20 x one of 100."
    assert not scale.judge({10_000: 0.0121, 100: 0.010}, 0.9e9)[1]
    assert not scale.judge({10_000: 0.010, 100: 0.010}, 1.01e9)[1]


@pytest.fixture(scope="module")
def published():
    """The study with its published times, as the benchmark has it."""
    return makespan.published_study()


def queue_of(seconds, cost):
    specs = [TrialSpec(str(n), "t", "final", "digits", "arachne", "{}", n, "", "") for n in range(len(seconds))]
    cell = Cell(FixerEntry(name="arachne"), "digits", None, adapt=(), final=tuple(specs), n_final=len(specs))
    study = Study(study="t", subjects=["digits"], fixers=["arachne"])
    return TrialQueue(study, Plan((cell,), frozenset()), {}, {}, cost)


def test_the_study_on_1_to_256_gpus_comes_within_a_tenth_of_the_bound(published):
    assert len(published.specs) == 189
    assert max(published.ratio(gpus, published.known) for gpus in range(1, 257)) <= 1.1


def test_another_order_would_not(published):
    shuffled = random.Random(0).random
    assert max(published.ratio(gpus, lambda spec: shuffled()) for gpus in (8, 10, 12, 14)) > 1.1


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(1, 12))
def test_no_lane_idles_while_a_trial_waits(seconds, lanes):
    ended = makespan.makespan(
        queue_of(seconds, lambda spec: seconds[spec.seed]), lambda spec: seconds[spec.seed], lanes
    )
    bound = makespan.lower_bound(seconds, lanes)
    # A lane that ends last was busy until its last trial began, and so were all others.
    assert bound <= ended <= sum(seconds) / lanes + max(seconds)


def test_one_lane_takes_the_sum_and_many_the_longest():
    seconds = [5, 1, 3]
    for lanes, expected in ((1, 9), (2, 5), (3, 5), (50, 5)):
        assert (
            makespan.makespan(queue_of(seconds, lambda s: seconds[s.seed]), lambda s: seconds[s.seed], lanes)
            == expected
        )


def test_nothing_to_do_takes_no_time():
    assert makespan.makespan(queue_of([], lambda spec: 0.0), lambda spec: 0.0, 3) == makespan.lower_bound([], 3) == 0
