"""`fixstudy submit`: what travels with a job, and what is told of it."""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import yaml

from analysis.contract.errors import UserError
from orchestrator.cluster import submission
from orchestrator.cluster.submission import Job, attach_command, follow, pack, submit_command
from orchestrator.storage.store import Store

EXAMPLES = Path(__file__).parents[3] / "examples"
PLUGIN = EXAMPLES / "misbehaving_fixers.py"


def write_study(folder, text, name="study.yaml"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"study: mine\nfixers: [finetune]\n{text}")
    return path


def packed_files(target):
    ours = {f"{name}" for name in submission.PACKAGES}
    return {
        str(path.relative_to(target))
        for path in target.rglob("*")
        if path.is_file() and path.relative_to(target).parts[0] not in ours
    }


def onnx_with_outside_weights(path):
    weight = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, location="model.weights")
    weight.ClearField("raw_data")
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    onnx.save(onnx.helper.make_model(graph), path)
    path.with_name("model.weights").write_bytes(bytes(16))


def test_code_study_plugins_and_models_travel_and_nothing_else(tmp_path):
    folder = tmp_path / "home" / "studies"
    study = write_study(
        folder,
        """plugins: [own.py, ../shared/other.py, installed.module]
subjects:
  - digits
  - {name: a, model: model.onnx, data: /data/a.parquet}
  - {name: b, model: 'zoo.nets:make', weights: b.safetensors, dataset: digits}
  - {name: c, model: 'elsewhere:make', dataset: digits}
""",
    )
    for name in (
        "own.py",
        "../shared/other.py",
        "zoo/nets.py",
        "zoo/__init__.py",
        "b.safetensors",
        "layers.py",
        "secret.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x = 1")
    (folder / "zoo/nets.py").write_text("from layers import x")
    onnx_with_outside_weights(folder / "model.onnx")
    target = tmp_path / "packed"
    target.mkdir()
    assert pack(study, target) == "study/studies/study.yaml"
    ours = {name for name in packed_files(target) if not name.startswith("fixstudy-")}
    assert ours == {
        "study/studies/study.yaml", "study/studies/own.py", "study/shared/other.py", "study/studies/model.onnx",
        "study/studies/model.weights", "study/studies/zoo/nets.py", "study/studies/zoo/__init__.py",
        "study/studies/b.safetensors", "study/studies/layers.py",
    }  # fmt: skip
    assert (target / "study/studies/study.yaml").read_text() == study.read_text()
    assert not list(target.rglob("__pycache__"))


def test_a_file_with_an_absolute_path_is_found_again(tmp_path):
    elsewhere = tmp_path / "plugins" / "mine.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text("x = 1")
    study = write_study(tmp_path / "studies", f"subjects: [digits]\nplugins: ['{elsewhere}']\n")
    target = tmp_path / "packed"
    target.mkdir()
    packed = target / pack(study, target)
    ((given,),) = [[line.split("'")[1] for line in packed.read_text().splitlines() if line.startswith("plugins")]]
    assert not Path(given).is_absolute()
    assert (packed.parent / given).read_text() == "x = 1"


@pytest.mark.parametrize(
    "given", ["{folder}/model.onnx", "$MODELS/model.onnx", "${{MODELS}}/model.onnx", "~/model.onnx"]
)
def test_a_model_outside_travels_with_its_weights_however_its_place_is_written(tmp_path, monkeypatch, given):
    folder = tmp_path / "models"
    folder.mkdir()
    onnx_with_outside_weights(folder / "model.onnx")
    monkeypatch.setenv("MODELS", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    model = given.format(folder=folder)
    study = write_study(tmp_path / "studies", f"subjects: [{{name: a, model: '{model}', data: $DATA/a.parquet}}]\n")
    target = tmp_path / "packed"
    target.mkdir()
    packed = target / pack(study, target)
    (subject,) = yaml.safe_load(packed.read_text())["subjects"]
    found = packed.parent / subject["model"]
    assert found.resolve().is_relative_to(target)
    assert onnx.load(found).graph.initializer[0].raw_data == bytes(16)
    assert subject["data"] == "$DATA/a.parquet"


def test_a_linked_model_is_where_the_study_file_says(tmp_path):
    (tmp_path / "store").mkdir()
    onnx_with_outside_weights(tmp_path / "store" / "model.onnx")
    study = write_study(tmp_path / "studies", "subjects: [{name: a, model: net.onnx, data: /data/a.parquet}]\n")
    (study.parent / "net.onnx").symlink_to(tmp_path / "store" / "model.onnx")
    target = tmp_path / "packed"
    target.mkdir()
    packed = target / pack(study, target)
    assert onnx.load(packed.parent / "net.onnx").graph.initializer[0].raw_data == bytes(16)


def test_the_packed_code_runs_where_nothing_is_installed(tmp_path):
    target = tmp_path / "packed"
    target.mkdir()
    pack(write_study(tmp_path, "subjects: [digits]\n"), target)
    script = "import orchestrator.cli, analysis; from importlib.metadata import version; "
    script += "print(version('fixstudy'), orchestrator.__file__, analysis.__file__)"
    isolated = {"PATH": os.environ["PATH"], "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=target, env=isolated, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(str(target)) == 2
    assert (target / "analysis/sql/status.sql").is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subjects: [{name: a, data: faces.parquet, model: m.onnx}]", "data don't travel.*absolute path"),
        ("subjects: [digits]\nplugins: [gone.py]", r"There is no file .*gone\.py"),
        ("subjects: [{name: a, modle: m.onnx}]", "Subject a has no key 'modle'; did you mean 'model'"),
    ],
)
def test_what_cannot_travel_is_said_before_anything_is_sent(tmp_path, text, said):
    target = tmp_path / "packed"
    target.mkdir()
    with pytest.raises(UserError, match=said):
        pack(write_study(tmp_path, text), target)


def test_too_much_is_refused_with_the_largest_file(tmp_path):
    (tmp_path / "big.safetensors").write_bytes(bytes(30_000_000))
    study = write_study(tmp_path, "subjects: [{name: a, dataset: digits, weights: big.safetensors}]")
    (tmp_path / "packed").mkdir()
    with pytest.raises(UserError, match=r"would travel to the cluster.*largest is big\.safetensors with 30 MB"):
        pack(study, tmp_path / "packed", most_bytes=20_000_000)


def test_the_command_of_a_job_survives_strange_names():
    job = Job("study/my study.yaml", "s3://b/x y", data_root="/d", retry="failures", log=("mlflow=http://m", "wandb"))
    command = job.command()
    assert command == (
        "python -m orchestrator.cli run 'study/my study.yaml' --address auto --results 's3://b/x y' "
        "--data-root /d --retry failures --log mlflow=http://m --log wandb"
    )


class Cluster:
    """A job server with one job."""

    def __init__(self, statuses, lines=("one\n", "two\n"), code=0):
        self.statuses, self.lines, self.code, self.stopped = list(statuses), lines, code, False

    def get_job_status(self, job):
        if job != "j":
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return SimpleNamespace(value=self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0])

    def get_job_info(self, job):
        return SimpleNamespace(driver_exit_code=self.code, message="it went wrong")

    async def tail_job_logs(self, job):
        for line in self.lines:
            await asyncio.sleep(0)
            if line is None:
                raise KeyboardInterrupt
            yield line

    def stop_job(self, job):
        self.stopped = True
        return True


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", -15, 130)]
)
def test_the_exit_code_is_the_jobs(capsys, status, code, expected):
    assert follow(Cluster([status], code=code), "j") == expected
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert ("it went wrong" in err) == (code is None)


def test_a_lost_connection_is_not_the_end_of_the_job(monkeypatch):
    monkeypatch.setattr(submission, "SECONDS_BETWEEN_LOOKS", 0.0)
    cluster = Cluster(["RUNNING", "RUNNING", "PENDING", "SUCCEEDED"], lines=())
    assert follow(cluster, "j") == 0
    assert cluster.statuses == ["SUCCEEDED"]


def test_an_unknown_job_is_said(monkeypatch):
    with pytest.raises(UserError, match="knows no job 'x'"):
        follow(Cluster(["RUNNING"]), "x")


@pytest.mark.parametrize(("terminal", "leave", "stopped", "code"), [
    (False, None, False, 0), (True, True, False, 0), (True, False, True, 130),
])  # fmt: skip
def test_ctrl_c_offers_to_detach(monkeypatch, capsys, terminal, leave, stopped, code):
    cluster = Cluster(["RUNNING"], lines=("one\n", None))
    monkeypatch.setattr(submission, "connect", lambda address: cluster)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setattr(submission.click, "confirm", lambda *a, **k: leave)
    assert attach_command("j", "http://head:8265") == code
    assert cluster.stopped is stopped
    said = capsys.readouterr().err
    assert ("--attach j --address http://head:8265" in said) is not stopped


def test_ctrl_c_detaches_as_soon_as_the_job_is_named(tmp_path, monkeypatch):
    cluster, said = Cluster(["RUNNING"]), []

    def echo(text, **options):
        said.append(text)
        if text.startswith("Submitted as"):
            raise KeyboardInterrupt

    cluster.submit_job = lambda submission_id, **job: submission_id
    monkeypatch.setattr(submission, "connect", lambda address: cluster)
    monkeypatch.setattr(submission.click, "echo", echo)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    study = str(write_study(tmp_path, "subjects: [digits]\n"))
    options = {"data_root": None, "retry": None, "log": (), "python": "python"}
    assert submit_command(study, "http://head:8265", results="s3://b/x", **options) == 0
    assert said[-1].count(f"--attach {said[0].split()[2].rstrip(';')}") == 1


@pytest.mark.parametrize("results", [None, "results/mine"])
def test_results_must_outlive_the_job(tmp_path, results):
    study = str(write_study(tmp_path, "subjects: [digits]\n"))
    options = {"data_root": None, "retry": None, "log": (), "python": "python"}
    with pytest.raises(UserError, match="give --results as a URI"):
        submit_command(study, "http://192.0.2.1:8265", results=results, **options)


def test_a_server_that_goes_away_is_said_in_a_sentence(tmp_path, monkeypatch):
    class Gone:
        def submit_job(self, **job):
            raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(submission, "connect", lambda address: Gone())
    study = str(write_study(tmp_path, "subjects: [digits]\n"))
    options = {"data_root": None, "retry": None, "log": (), "python": "python"}
    with pytest.raises(UserError, match=r"at http://head:8265 takes no job \(Connection reset by peer\)"):
        submit_command(study, "http://head:8265", results="s3://b/x", **options)


# ---- a real job server ----------------------------------------------------------------------------------------


def started_head(command, environment, log):
    """A head that is up. A busy machine may need more than the 30 s that Ray gives its own processes."""
    for _ in range(5):
        with log.open("wb") as file:
            head = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        until = time.monotonic() + 240
        while head.poll() is None and time.monotonic() < until:
            if "Ray runtime started" in log.read_text():
                return head
            time.sleep(0.5)
        head.kill()
        head.wait()
    pytest.fail(log.read_text())


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_is_submitted_followed_left_and_followed_again(tmp_path, shared_cache):
    """Needs ray[default], whose job server is a part of the dashboard."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("opencensus")
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    own = os.environ | {"FIXSTUDY_CACHE": str(shared_cache), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    # A path of sockets may have 107 characters.
    short = Path(tempfile.mkdtemp(prefix="sent-", dir="/tmp"))
    own |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(short)}
    # As on a real cluster: the server asks for a token, and both sides have it.
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = ["start", "--head", "--port=6399", "--dashboard-port=8299", "--num-cpus=2", "--num-gpus=0", "--block"]
    start += ["--object-store-memory=200000000", "--disable-usage-stats"]
    address, results = "http://127.0.0.1:8299", tmp_path / "results"
    study = tmp_path / "study.yaml"
    study.write_text(
        f"study: sent\nsubjects: [digits]\nplugins: ['{PLUGIN}']\nfixers: [does_nothing, raises]\nseeds: 2\n"
        "attack: none\n"
    )

    def fixstudy(*arguments, **options):
        command = [sys.executable, "-m", "orchestrator.cli", "submit", *map(str, arguments), "--address", address]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own, **options)

    head = started_head([*ray, *start], own, tmp_path / "head.log")
    try:
        sent = fixstudy(study, "--results", results, "--python", sys.executable)
        first = sent.stderr.readline()
        job = first.split()[2].rstrip(";")
        assert job.startswith("fixstudy-sent-"), first + sent.stderr.read()
        sent.send_signal(signal.SIGINT)
        _, said = sent.communicate(timeout=60)
        assert (sent.returncode, f"--attach {job}" in said) == (0, True), said
        again = fixstudy("--attach", job)
        out, said = again.communicate(timeout=400)
        assert again.returncode == 0, out + said
        assert "4 of 4 trials ran" in out
        rows = Store(results).rows(["fixer", "outcome"])
        assert sorted((row["fixer"], row["outcome"]) for row in rows) == [
            ("does_nothing", "OK"), ("does_nothing", "OK"), ("raises", "FAILURE"), ("raises", "FAILURE"),
        ]  # fmt: skip
        frozen = (results / "study.yaml").read_text()
        assert str(PLUGIN) not in frozen, "the plug-in travelled"
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(study.read_text().replace("seeds: 2", "seeds: 2\ntime_limit: 5"))
        refused = fixstudy(wrong, "--results", results, "--python", sys.executable)
        out, said = refused.communicate(timeout=400)
        assert (refused.returncode, "other settings" in out) == (2, True), out + said
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(short, ignore_errors=True)
