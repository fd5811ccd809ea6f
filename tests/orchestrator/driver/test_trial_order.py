import json
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from orchestrator.driver import study_run, tune
from orchestrator.driver.run import run_study
from orchestrator.driver.trial_order import InOrder
from orchestrator.storage.store import Store


@dataclass(eq=False)
class FakeTrial:
    name: int
    status: str = "PENDING"


def controller(processes):
    """Tune's, wrapped as a scheduler sees it; ``processes`` by trial are coming up, or wait for their resources."""
    manager = SimpleNamespace(is_actor_started=lambda process: process == "coming up")
    return SimpleNamespace(_tune_controller=SimpleNamespace(_trial_to_actor=processes, _actor_manager=manager))


NOTHING_STARTS = controller({})


def test_trials_start_in_the_order_they_came():
    order, trials = InOrder(), [FakeTrial(n) for n in range(50)]
    dice, started, running = random.Random(0), [], []
    waiting = iter(trials)
    while len(started) < len(trials):
        for new in (n for _, n in zip(range(dice.randrange(3)), waiting, strict=False)):
            order.on_trial_add(None, new)
        chosen = order.choose_trial_to_run(NOTHING_STARTS)
        assert chosen is order.choose_trial_to_run(NOTHING_STARTS), "asking changes nothing"
        if chosen is not None and dice.random() < 0.7:
            chosen.status = "RUNNING"
            started.append(chosen)
            running.append(chosen)
        if running and dice.random() < 0.5:
            running.pop(dice.randrange(len(running))).status = "TERMINATED"
    assert started == trials
    assert order.choose_trial_to_run(NOTHING_STARTS) is None


def test_a_free_process_leaves_alone_the_trials_for_which_others_are_coming_up():
    order, (first, second, third) = InOrder(), (trials := [FakeTrial(n) for n in range(3)])
    for trial in trials:
        order.on_trial_add(None, trial)
    assert order.choose_trial_to_run(controller({first: "coming up", second: "waiting"})) is second
    assert order.choose_trial_to_run(controller({first: "coming up", second: "coming up"})) is third
    second.status = "RUNNING"
    assert order.choose_trial_to_run(controller({first: "coming up"})) is third
    everything = controller(dict.fromkeys(trials, "coming up"))
    assert order.choose_trial_to_run(everything) is first, "better now than when its own process is there"


def test_finished_trials_are_not_looked_at_again():
    looked = []

    class Watched:
        @property
        def status(self):
            looked.append(self)
            return "TERMINATED"

    order = InOrder()
    for _ in range(100):
        order.on_trial_add(None, Watched())
    for _ in range(50):
        assert order.choose_trial_to_run(NOTHING_STARTS) is None
    assert len(looked) == 100


@pytest.mark.ray
@pytest.mark.slow
def test_waves_run_every_trial_once(study_file, tmp_path, monkeypatch, ray_address):
    monkeypatch.setattr(tune, "TRIALS_PER_WAVE", 2)
    monkeypatch.setattr(tune, "TRIALS_PER_LANE", 1)
    waves = []

    def counted(run, *args):
        before = len(run.rows)
        more = tune.run_wave(run, *args)
        waves.append(len(run.rows) - before)
        return more

    monkeypatch.setattr(study_run, "run_wave", counted)
    path = study_file("study: waves\nsubjects: [digits]\nfixers: [does_nothing]\nseeds: 5\nattack: none\n")
    summary = run_study(path, results=str(tmp_path / "results"))
    assert (summary.ran, summary.outcomes) == (5, {"OK": 5})
    assert waves == [2, 2, 1]


TELLS_ITS_PROCESS = """
import os
from fixers import Fixer

class TellsItsProcess(Fixer):
    name, abbreviation, level, reference = "tells_its_process", "PID", "neuron", "-"

    def fix(self, problem):
        problem.note(process=os.getpid())
        return problem.new_model()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_every_lane_works_where_trials_are_shorter_than_the_start_of_a_process(tmp_path, ray_address):
    (tmp_path / "plugin.py").write_text(TELLS_ITS_PROCESS)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"study: lanes\nplugins: ['{tmp_path}/plugin.py']\nsubjects: [digits]\nfixers: [tells_its_process]\n"
        "seeds: 150\nattack: none\nkeep_models: none\n"
    )
    summary = run_study(path, results=str(tmp_path / "results"))
    assert summary.outcomes == {"OK": 150}
    processes = [json.loads(row["notes"])["process"] for row in Store(tmp_path / "results").rows(["notes"])]
    assert len(set(processes)) == 2, "one process for each of the two cores, and none in vain"
    assert min(map(processes.count, set(processes))) >= 40
