"""What scheduling, evaluating and storing cost per trial, against bare Ray Tune in the same run.

    python benchmarks/overhead.py [--trials 200] [--repeats 2]

Both sides run class trainables with reused actors on the same Ray, one core a trial, and both import torch in their
workers. Ours also loads a subject, evaluates the fixed model on valid and test and writes three Parquet files a trial;
bare Tune returns a number. Printed are wall seconds per trial from the start of scheduling to the last row (workers'
start included, loading the subject and the tidying at the end not) and from the first finished trial to the last, the
ratios, and how often the subject was loaded for the workers of the node. Fails when the first ratio is above the limit
or the subject was loaded twice.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray import tune

from orchestrator.driver.observer import StudyObserver
from orchestrator.driver.run import run_study

STUDY = """
study: overhead
subjects: [digits]
plugins: [{plugin}]
fixers: [does_nothing]
seeds: {trials}
attack: none
keep_models: none
"""


class Bare(tune.Trainable):
    """The same shape as ours, with nothing inside."""

    def setup(self, config):
        """Import what any trainable of this field imports."""
        import torch

        torch.set_num_threads(1)

    def reset_config(self, new_config):
        """Reuse the actor."""
        return True

    def step(self):
        """One trial."""
        return {"done": True, "outcome": "OK"}


class Clock(tune.Callback):
    """Times at which trials end."""

    def __init__(self):
        self.ends = []

    def __getstate__(self):
        return {}

    def on_trial_complete(self, iteration, trials, trial, **info):
        """Note the time."""
        self.ends.append(time.perf_counter())


def bare(trials):
    """Wall seconds per trial of bare Tune: (whole run, steady state)."""
    clock, started = Clock(), time.perf_counter()
    # Tune prints its tables whatever its verbosity is.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        tune.Tuner(
            tune.with_resources(Bare, {"cpu": 1}),
            param_space={"seed": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[clock],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    return per_trial(started, clock.ends, trials)


def ours(trials):
    """Wall seconds per trial of a study: (whole run, steady state), and how often the subject was loaded."""
    ends = []

    class Clocks(StudyObserver):
        def event(self, sentence):
            if sentence.startswith("running"):
                ends.append(time.perf_counter())

        def row(self, *args):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(__file__).resolve().parents[1] / "examples" / "misbehaving_fixers.py"
        study = Path(folder, "study.yaml")
        study.write_text(STUDY.format(plugin=plugin, trials=trials))
        summary = run_study(study, results=f"{folder}/results", display=Clocks())
    assert summary.outcomes == {"OK": trials}, summary
    # Loading the subject, and training its original the first time, isn't scheduling: the clock starts after it.
    return per_trial(ends[0], ends[1:], trials), summary.subject_loads


def per_trial(started, ends, trials):
    """Seconds per trial over the whole run, and from the first end to the last."""
    return (ends[-1] - started) / trials, (ends[-1] - ends[0]) / (trials - 1)


def main():
    """Run both in turn, print the smallest figures, and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.3, help="largest ratio over the whole run")
    arguments = parser.parse_args()
    trials = arguments.trials
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    mine, theirs = [], []
    for _ in range(arguments.repeats):
        theirs.append(bare(trials))
        figures, loads = ours(trials)
        mine.append(figures)
    print(f"{trials} trials, seconds per trial   whole run   first to last")
    (a, b), (c, d) = (map(min, zip(*figures, strict=True)) for figures in (mine, theirs))
    print(f"fixstudy                        {a:9.4f}   {b:9.4f}")
    print(f"bare Ray Tune                   {c:9.4f}   {d:9.4f}")
    print(f"ratio                           {a / c:9.2f}   {b / d:9.2f}")
    print(f"times the subject was loaded: {loads}")
    return int(a / c > arguments.limit or max(loads.values()) > 1)


if __name__ == "__main__":
    sys.exit(main())
