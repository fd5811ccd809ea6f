"""What scheduling, evaluating and storing cost per trial, against bare Ray Tune in the same run.

    python benchmarks/overhead.py [--trials 200] [--repeats 2]

All sides run class trainables with reused actors on the same Ray, one core a trial, and import torch in their workers.
Bare Tune returns a number. Bare Tune with the same work also judges the fixed model on valid and test and writes a
trial's three Parquet files, as a script with a loop in it would: what a study adds to that is the plan, the watchdog,
the monitor, the logs and the classes of outcome. Printed are wall seconds per trial over the whole run (workers' start
included) and from the first finished trial to the last, and the ratios; and how often the subject was read from its
files.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import ray
from ray import tune

from orchestrator import session
from orchestrator.run import run_study

PLUGIN = Path(__file__).resolve().parents[1] / "examples" / "misbehaving_fixers.py"

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


class SameWork(Bare):
    """What a trial of ours computes and writes, and nothing around it."""

    def setup(self, config, subject=None, folder=None):
        """Import the approaches and map the subject."""
        from fixers import registry
        from orchestrator.store import Store

        super().setup(config)
        registry.load(str(PLUGIN))
        registry.all_fixers()
        self._subject, self._baseline = ray.get(subject)
        self._store = Store(folder)

    def step(self):
        """One trial."""
        from orchestrator.study import TrialSpec
        from orchestrator.trial import TrialSettings, run_trial

        seed = self.config["seed"]
        spec = TrialSpec(f"{seed:016x}", "bare", "final", "digits", "does_nothing", "{}", seed, "", "")
        record = run_trial(spec, self._subject, self._baseline, TrialSettings(600.0, 0.1, None, keep_models=False))
        self._store.write_trial(record.row, record.predictions, record.curves)
        return {"done": True, "outcome": record.row["outcome"]}


class Clock(tune.Callback):
    """Times at which trials end."""

    def __init__(self):
        self.ends = []

    def __getstate__(self):
        return {}

    def on_trial_complete(self, iteration, trials, trial, **info):
        """Note the time."""
        self.ends.append(time.perf_counter())


def same_work(trials):
    """Wall seconds per trial of bare Tune with a trial's own work: (whole run, steady state)."""
    from orchestrator.loading import load
    from orchestrator.store import Store
    from orchestrator.subjects.catalogue import resolve

    with tempfile.TemporaryDirectory() as folder:
        store, originals = Store(folder), session.cache_dir() / "originals"
        store.create()
        loaded, _ = load(resolve("digits"), store=store, data_root=None, cache_dir=originals, keep_history=False)
        subject = ray.put(loaded)
        return bare(trials, tune.with_parameters(SameWork, subject=subject, folder=folder))


def bare(trials, trainable=Bare):
    """Wall seconds per trial of bare Tune: (whole run, steady state)."""
    clock, started = Clock(), time.perf_counter()
    # Tune prints its tables whatever its verbosity is.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
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

    class Display:
        def event(self, sentence):
            if sentence.startswith("running"):
                ends.append(time.perf_counter())

        def planned(self, *args):
            pass

        def row(self, *args):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder, "study.yaml")
        study.write_text(STUDY.format(plugin=PLUGIN, trials=trials))
        summary = run_study(study, results=f"{folder}/results", display=Display())
    assert summary.outcomes == {"OK": trials}, summary
    # Loading the subject, and training its original the first time, isn't scheduling: the clock starts after it.
    return per_trial(ends[0], ends[1:], trials), summary.subject_loads


def per_trial(started, ends, trials):
    """Seconds per trial over the whole run, and from the first end to the last."""
    return (ends[-1] - started) / trials, (ends[-1] - ends[0]) / (trials - 1)


def main():
    """Run both in turn, and print the smallest figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    trials = arguments.trials
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    sides = {"fixstudy": [], "bare Ray Tune": [], "bare Ray Tune, same work": []}
    for _ in range(arguments.repeats):
        sides["bare Ray Tune"].append(bare(trials))
        sides["bare Ray Tune, same work"].append(same_work(trials))
        figures, loads = ours(trials)
        sides["fixstudy"].append(figures)
    best = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in sides.items()}
    print(f"{trials} trials: seconds per trial   whole run  first to last    ours is x times that")
    for name, (whole, steady) in best.items():
        ratios = [mine / theirs for mine, theirs in zip(best["fixstudy"], (whole, steady), strict=True)]
        print(f"{name:30}   {whole:9.4f}  {steady:13.4f}   {ratios[0]:9.2f}  {ratios[1]:9.2f}")
    print(f"subject read from its files: {loads}")


if __name__ == "__main__":
    main()
