import random
from types import SimpleNamespace

import pytest

from orchestrator import scheduler
from orchestrator.run import run_study
from orchestrator.trial_order import InOrder


def trial(name):
    return SimpleNamespace(name=name, status="PENDING")


def test_trials_start_in_the_order_they_came():
    order, trials = InOrder(), [trial(n) for n in range(50)]
    dice, started, running = random.Random(0), [], []
    waiting = iter(trials)
    while len(started) < len(trials):
        for new in (n for _, n in zip(range(dice.randrange(3)), waiting, strict=False)):
            order.on_trial_add(None, new)
        chosen = order.choose_trial_to_run(None)
        assert chosen is order.choose_trial_to_run(None), "asking changes nothing"
        if chosen is not None and dice.random() < 0.7:
            chosen.status = "RUNNING"
            started.append(chosen)
            running.append(chosen)
        if running and dice.random() < 0.5:
            running.pop(dice.randrange(len(running))).status = "TERMINATED"
    assert started == trials
    assert order.choose_trial_to_run(None) is None


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
        assert order.choose_trial_to_run(None) is None
    assert len(looked) == 100


@pytest.mark.ray
@pytest.mark.slow
def test_waves_run_every_trial_once(study_file, tmp_path, monkeypatch, ray_address):
    monkeypatch.setattr(scheduler, "TRIALS_PER_WAVE", 2)
    monkeypatch.setattr(scheduler, "TRIALS_PER_LANE", 1)
    waves, fit = [], scheduler.StudyRun._fit

    def counted(run, queue, context, resources, wave):
        before = queue.left
        more = fit(run, queue, context, resources, wave)
        waves.append(before - queue.left)
        return more

    monkeypatch.setattr(scheduler.StudyRun, "_fit", counted)
    path = study_file("study: waves\nsubjects: [digits]\nfixers: [does_nothing]\nseeds: 5\nattack: none\n")
    summary = run_study(path, results=str(tmp_path / "results"))
    assert (summary.ran, summary.outcomes) == (5, {"OK": 5})
    assert waves == [2, 2, 1]
