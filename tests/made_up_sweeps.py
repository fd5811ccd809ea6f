"""Sweeps without Ray: a made-up landscape takes the place of the trials, and chance the place of the cluster."""

import hashlib
import random

from hypothesis import strategies as st

from orchestrator.study.objectives import Figures
from orchestrator.study.schema import Adaptation, FixerEntry, Study
from orchestrator.sweeps.sweep import Setup

ORDERS = st.randoms(use_true_random=False)
SEARCHES = st.sampled_from(
    [
        {"search": "grid"},
        {"search": "random"},
        {"search": "asha"},
        {"search": "asha", "reduction": 2, "objective": {"weighted": {"repair_rate": 1, "negative_flip_rate": -2}}},
        {"search": "grid", "objective": "pareto"},
    ]
)
SUGGESTED = [
    {"search": "optuna"},
    {"search": "optuna", "objective": "pareto", "parallel": 3},
    {"search": "optuna", "objective": "pareto", "sampler": "nsga2"},
]


def setup(name="arachne", *, seed=0, params=None, **adapt):
    entry = FixerEntry(name=name, params=params or {}, adapt=Adaptation(**adapt))
    return Setup(Study(study="t", subjects=["digits"], fixers=[entry], seeds=[seed]), entry, "digits", "fingerprint")


def figures_of(spec):
    """Figures that depend on nothing but the trial; one in ten fails, one in ten is CORRUPTED."""
    numbers = hashlib.sha256(spec.trial_id.encode()).digest()
    if numbers[0] < 25:
        return Figures("FAILURE")
    return Figures("CORRUPTED" if numbers[0] > 230 else "OK", *(n / 255 for n in numbers[1:4]), 3.0, 1.0)


def run(sweep, chance=None, *, workers=4, stop_after=None, judge=figures_of):
    """Run a sweep on so many workers, which finish in random order; may be interrupted with trials in flight."""
    chance, flying, finished = chance or random.Random(0), [], 0
    while stop_after is None or finished < stop_after:
        while sweep.is_ready and len(flying) < workers:
            flying.append(sweep.ask())
        if not flying:
            assert sweep.is_finished
            break
        spec = flying.pop(chance.randrange(len(flying)))
        sweep.tell(spec.trial_id, judge(spec))
        finished += 1
    return sweep


def trials(sweep):
    return [spec.trial_id for spec in sweep.trials]
