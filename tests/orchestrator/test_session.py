"""Starting Ray on machines that are busy, and joining clusters that aren't there."""

import re
import subprocess

import pytest
import ray

from orchestrator.errors import UserError
from orchestrator.session import STARTS_OF_RAY, commit_of, definitions, ray_running
from orchestrator.study import parse_study


@pytest.fixture
def starts(monkeypatch):
    """Errors that ray.init raises, one per call; then it succeeds."""
    errors = []
    calls = []

    def init(**options):
        calls.append(options)
        if errors:
            raise errors.pop(0)

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
