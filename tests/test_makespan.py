import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.makespan import lower_bound, makespan
from orchestrator.planning.plan import Cell, Plan
from orchestrator.planning.queue import TrialQueue
from orchestrator.study.schema import FixerEntry, Study
from orchestrator.study.trials import TrialSpec

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "makespan.py"


@pytest.fixture(scope="module")
def published():
    """The study with its published times, as the benchmark has it."""
    spec = importlib.util.spec_from_file_location("benchmark_makespan", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.published_study()


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
    ended = makespan(queue_of(seconds, lambda spec: seconds[spec.seed]), lambda spec: seconds[spec.seed], lanes)
    bound = lower_bound(seconds, lanes)
    # A lane that ends last was busy until its last trial began, and so were all others.
    assert bound <= ended <= sum(seconds) / lanes + max(seconds)


def test_one_lane_takes_the_sum_and_many_the_longest():
    seconds = [5, 1, 3]
    for lanes, expected in ((1, 9), (2, 5), (3, 5), (50, 5)):
        assert makespan(queue_of(seconds, lambda s: seconds[s.seed]), lambda s: seconds[s.seed], lanes) == expected


def test_nothing_to_do_takes_no_time():
    assert makespan(queue_of([], lambda spec: 0.0), lambda spec: 0.0, 3) == lower_bound([], 3) == 0
