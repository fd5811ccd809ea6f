"""Starting Ray on machines that are busy, and joining clusters that aren't there."""

import os
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from analysis.contract.errors import UserError
from orchestrator.cluster import ray_session
from orchestrator.cluster.ray_session import STARTS_OF_RAY, ray_running
from orchestrator.driver.frozen import commit_of, freeze
from orchestrator.storage.store import Store
from orchestrator.study.reading import load_study, parse_study
from orchestrator.study.subjects import definitions
from orchestrator.subjects.reading import roots


@pytest.fixture
def starts(monkeypatch):
    """Errors that ray.init raises, one per call; then it succeeds."""
    errors = []
    calls = []

    def init(**options):
        calls.append(options)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(ray_session, "_answers", lambda address: True)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return errors, calls


BUSY = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def test_a_busy_machine_gets_another_try(starts):
    errors, calls = starts
    errors.append(Exception(BUSY))
    with ray_running(None):
        assert len(calls) == 2


def test_a_machine_that_stays_busy_is_named_in_a_sentence(starts):
    errors, calls = starts
    errors += [Exception(BUSY)] * STARTS_OF_RAY
    with pytest.raises(UserError, match="machine is busy"), ray_running(None):
        pass
    assert len(calls) == STARTS_OF_RAY


def test_a_temporary_folder_with_too_long_a_name_for_sockets_is_not_taken(starts, monkeypatch, tmp_path):
    _, calls = starts
    long = tmp_path / ("scratch" * 12)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with ray_running(None):
        pass
    (options,) = calls
    sockets = f"{options['_temp_dir']}/session_2026-12-01_12-00-00_123456_1234567/sockets/plasma_store_0"
    assert len(sockets) <= 107
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with ray_running(None):
        pass
    assert calls[-1]["_temp_dir"] is None, "a short one of the user's own is the user's choice"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_full_temporary_folder_is_no_slow_machine(starts, monkeypatch, when):
    errors, _ = starts
    errors += [Exception(BUSY)] * STARTS_OF_RAY
    free = iter([0] if when == "before" else [10**9, 0])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with pytest.raises(UserError, match="has 0 MB left, too little for Ray; free some space"), ray_running(None):
        pass


def test_what_the_system_refuses_ray_is_one_sentence(starts):
    errors, _ = starts
    errors.append(OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"))
    with pytest.raises(UserError, match=r"^Ray can't start on this machine \(validate_socket.*RAY_TMPDIR\.$"):
        ray_running(None).__enter__()


def test_rays_settings_are_ours_unless_the_user_says_otherwise(starts, monkeypatch):
    niceness = "RAY_worker_niceness"
    monkeypatch.delenv(niceness, raising=False)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1")
    with ray_running(None):
        assert os.environ[niceness] == "0"
        assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "1"


def test_the_token_of_this_users_ray_is_for_nobody_else(starts, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray" / "auth_token"
    token.touch(0o644)
    with ray_running(None):
        assert token.stat().st_mode & 0o777 == 0o600


def test_workers_look_for_our_modules_before_those_of_the_users_folder(starts):
    _, calls = starts
    with ray_running(None):
        pass
    job = calls[0]["job_config"]
    # As Ray does it: each of them is put in front of those before it.
    job._py_driver_sys_path.append("/home/user/project")
    job._serialize()
    assert job._py_driver_sys_path[-1] == str(Path(ray_session.__file__).parents[2])


def test_without_an_address_nobodys_cluster_is_joined(starts, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_running(None), ray_running("head:6379"):
        # As Ray's job server says it to what it runs.
        monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
        with ray_running(None):
            pass
    assert [call["address"] for call in starts[1]] == ["local", "head:6379", "elsewhere:6379"]


def test_a_cluster_that_wants_a_token_says_so(starts):
    starts[0].append(ray.exceptions.AuthenticationError("no token"))
    with pytest.raises(UserError, match="asks for a token: set RAY_AUTH_MODE=token"), ray_running("head:6379"):
        pass


@pytest.mark.parametrize("address", ["nope", ":", "127.0.0.1:notaport", "ray://", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_said(address, monkeypatch):
    monkeypatch.setattr(ray_session, "SECONDS_FOR_ANSWER", 0.1)
    with pytest.raises(UserError, match=f"No Ray cluster answers at '{re.escape(address)}'"), ray_running(address):
        pass


def test_where_nobody_listens_is_said_within_seconds(monkeypatch):
    monkeypatch.setattr(ray_session, "SECONDS_FOR_ANSWER", 0.1)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UserError, match="No Ray cluster answers"), ray_running(place):
            pass
        bound.listen()
        assert ray_session._answers(place)
    assert ray_session._answers("auto")


def test_a_job_server_is_no_cluster():
    with (
        pytest.raises(UserError, match="is a job server, which fixstudy submit takes"),
        ray_running("http://head:8265"),
    ):
        pass


def make_study(tmp_path, rest=""):
    path = tmp_path / "mine.yaml"
    path.write_text(f"study: t\nsubjects: [digits]\nfixers: [arachne]\n{rest}")
    study, store = load_study(path), Store(str(tmp_path / "results"))
    store.create()
    return study, definitions(study, tmp_path), path, store


def test_what_ran_is_frozen_and_not_what_the_file_says_by_now(tmp_path):
    """Or nothing, when the file is a pipe, as in `fixstudy run <(...)`."""
    study, subjects, path, store = make_study(tmp_path, "# as it ran\n")
    path.unlink()
    freeze(study, subjects, path, store)
    assert store.read_bytes("study.yaml").decode().endswith("# as it ran\n")


def test_rows_of_two_attack_radii_are_not_mixed(tmp_path):
    """Whoever sets them, and those of other subjects may be added."""
    study, subjects, path, store = make_study(tmp_path)
    freeze(study, subjects, path, store)
    freeze(study, subjects | {"other": replace(subjects["digits"], epsilon=0.3)}, path, store)
    freeze(study, subjects, path, store)
    for name in ("digits", "other"):
        changed = {name: replace(subjects["digits"], epsilon=0.01)}
        with pytest.raises(UserError, match=rf"made with other settings \(attack radius of {name}\)"):
            freeze(study, changed, path, store)
    with pytest.raises(UserError, match=r"other settings \(attack\)"):
        freeze(study.model_copy(update={"attack": None}), subjects, path, store)


def test_results_of_another_study_are_said_to_be(tmp_path):
    study, subjects, path, store = make_study(tmp_path)
    freeze(study, subjects, path, store)
    with pytest.raises(UserError, match=r"results of the study 't', and this is the study 'u'; choose another"):
        freeze(study.model_copy(update={"study": "u"}), subjects, path, store)


@pytest.mark.parametrize("content", [b"x", b"[1]", b"\xff"])
def test_settings_of_something_else_are_said(tmp_path, content):
    study, subjects, path, store = make_study(tmp_path)
    store.write_bytes("settings.json", content)
    with pytest.raises(UserError, match=r"has a settings\.json that no study wrote"):
        freeze(study, subjects, path, store)


def test_home_means_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FIXSTUDY_CACHE", "~/cache")
    assert Store("~/results").local_path == tmp_path / "results"
    assert roots.data_root("~/data") == tmp_path / "data"
    assert roots.cache_dir() == tmp_path / "cache"


def test_a_cache_that_cannot_be_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIXSTUDY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache folder .*file can't be used .*: set FIXSTUDY_CACHE"):
        roots.usable_cache_dir()
    monkeypatch.setenv("FIXSTUDY_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="set FIXSTUDY_CACHE"):
        roots.usable_cache_dir()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for name in ("FIXSTUDY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="has no home folder; set FIXSTUDY_CACHE"):
        roots.cache_dir()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("subjects:\n  - digits\n  - mnst\n", r"mine\.yaml, line 4: .*mnst.*did you mean 'mnist'"),
        (
            "subjects:\n  - digits\n  - {name: own, modell: x.onnx}\n",
            r"mine\.yaml, line 4: .*modell",
        ),
        (
            "subjects: [digits]\nattack:\n  epsilon:\n    digts: 0.1\n",
            r"mine\.yaml, line 5: attack\.epsilon names 'digts', .*did you mean 'digits'",
        ),
    ],
)
def test_mistakes_in_subjects_have_their_line(text, expected, tmp_path):
    study = parse_study(f"study: t\n{text}fixers: [arachne]\n", "mine.yaml", tmp_path)
    with pytest.raises(UserError, match=expected):
        definitions(study, tmp_path)


def test_a_cluster_that_is_not_there_is_named(starts):
    starts[0].append(ConnectionError("no"))
    with (
        pytest.raises(UserError, match=r"No Ray cluster answers at '192\.0\.2\.1:6379'"),
        ray_running("192.0.2.1:6379"),
    ):
        pass


def test_other_errors_of_ray_are_not_hidden(starts):
    starts[0].append(Exception("disk on fire"))
    with pytest.raises(Exception, match="disk on fire"), ray_running(None):
        pass


def test_the_commit_of_a_study_file_is_known(tmp_path):
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "study.yaml").write_text("study: mine\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "study.yaml").write_text("study: other\n")
    assert commit_of(tmp_path) == f"{commit} (with changes)"
