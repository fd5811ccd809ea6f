"""A study shown in TensorBoard, MLflow and Weights & Biases: the services themselves, through Ray's callbacks."""

import struct

import pytest
from ray.tune.logger import LoggerCallback

from analysis.contract.errors import UserError
from orchestrator.driver import loggers
from orchestrator.driver.loggers import StudyLogger, parse_services
from orchestrator.driver.run import run_study
from orchestrator.storage.store import Store

STUDY = """
study: shown
subjects: [digits]
fixers: [{name: finetune, params: {epochs: 3}}, FAILING]
seeds: 1
attack: none
keep_models: none
"""


def events(folder):
    """The summaries in TensorBoard's files: per tag, the values by step."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.glob("events.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_is_shown_in_all_services(ray_address, study_file, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    results, board = tmp_path / "results", tmp_path / "board"
    services = parse_services([f"tensorboard={board}", f"mlflow=file://{tmp_path}/mlruns"])
    study = study_file(STUDY.replace("FAILING", "raises"))
    summary = run_study(study, results=str(results), address=ray_address, show_in=services)
    assert summary.outcomes == {"OK": 1, "FAILURE": 1}
    store = Store(results)
    rows = {row["fixer"]: row for row in store.rows(["fixer", "accuracy_fixed", "repair_rate", "outcome"])}
    fixed = rows["finetune"]
    trials = {row["fixer"]: row["trial_id"] for row in store.rows(["fixer"])}

    shown = events(board / "shown" / trials["finetune"])
    (accuracy,) = shown["ray/tune/accuracy_fixed"].values()
    assert accuracy == pytest.approx(fixed["accuracy_fixed"])
    points = store.curves(trials["finetune"]).to_pylist()
    assert {point["step"] for point in points} == {1, 2, 3}
    for metric in {point["metric"] for point in points}:
        curve = {point["step"]: point["value"] for point in points if point["metric"] == metric}
        assert shown[f"ray/tune/progress/{metric}"] == pytest.approx(curve)
    assert events(board / "shown" / trials["raises"])["ray/tune/ok"].popitem()[1] == 0.0

    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    runs = client.search_runs([client.get_experiment_by_name("shown").experiment_id])
    assert {run.data.params["fixer"]: run.info.status for run in runs} == {
        "finetune": "FINISHED",
        "raises": "FAILED",
    }
    (run,) = (run for run in runs if run.data.params["fixer"] == "finetune")
    assert run.data.metrics["repair_rate"] == pytest.approx(fixed["repair_rate"])
    assert run.data.params["params/epochs"] == "3"


@pytest.mark.slow
@pytest.mark.ray
def test_weights_and_biases_gets_its_files(study_file, tmp_path, monkeypatch, without_ray):
    # Offline it writes what it would send. A Ray of its own, whose processes know that.
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    results = tmp_path / "results"
    study = study_file(STUDY.replace("FAILING", "ends_its_process"))
    run_study(study, results=str(results), show_in=parse_services(["wandb=mine"]))
    for row in Store(results).rows(["fixer"]):
        files = [*(results / "wandb" / row["trial_id"]).rglob("run-*.wandb")]
        # A process that died without a trace had a second run.
        assert len(files) == (1 if row["fixer"] == "finetune" else 2)
        content = b"".join(file.read_bytes() for file in files)
        assert row["fixer"].encode() in content
        assert b"mine" in content
        assert (b"repair_rate" in content) == (row["fixer"] == "finetune")


def test_a_service_that_fails_is_left_alone_and_said(tmp_path):
    class Down(LoggerCallback):
        calls = 0

        def setup(self, *args, **info):
            self.calls += 1
            raise ConnectionError("refused")

        def on_experiment_end(self, trials, **info):
            self.calls += 1

    said, down = [], Down()
    logger = StudyLogger("mlflow", down, "mine", Store(tmp_path), str(tmp_path), said.append)
    logger.setup()
    logger.on_experiment_end([])
    assert down.calls == 1
    assert said == ["mlflow failed and is left alone from now on: ConnectionError: refused"]


def test_long_curves_are_thinned_evenly(tmp_path):
    store = Store(tmp_path / "results")
    store.create()
    n = 3 * loggers.MOST_STEPS
    columns = {"step": range(n), "metric": ["loss"] * n, "value": [1.0] * n, "seconds": [0.0] * n}
    store.write_trial({"trial_id": "t"}, curves=columns)
    logger = StudyLogger("mlflow", LoggerCallback(), "mine", store, str(tmp_path), print)
    assert [result["training_iteration"] for result in logger._results("t")] == list(range(0, n, 3))


@pytest.mark.parametrize(("text", "message"), [
    ("tensorbord", "did you mean 'tensorboard'"),
    ("wandb=x", r"pip install 'fixstudy\[wandb\]'"),
])  # fmt: skip
def test_what_cant_be_shown_is_said_before_anything_runs(monkeypatch, text, message):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=message):
        parse_services([text])
