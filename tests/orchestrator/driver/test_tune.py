"""What Tune makes of errors and of the environment, without a cluster: only its loop is replaced."""

from types import SimpleNamespace

import pytest
from ray import tune as ray_tune
from ray.tune.error import TuneError
from ray.tune.execution import class_cache

from orchestrator.driver.tune import run_wave
from orchestrator.storage.patience import StorageError

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY")


@pytest.fixture
def wave(monkeypatch):
    """Runs a wave whose loop is the given function."""

    def run(loop):
        monkeypatch.setattr(ray_tune, "with_parameters", lambda worker, context: worker)
        monkeypatch.setattr(ray_tune, "with_resources", lambda worker, resources: worker)
        monkeypatch.setattr(ray_tune, "Tuner", lambda worker, **options: SimpleNamespace(fit=loop))
        return run_wave(SimpleNamespace(in_flight=list), None, "waves", 1, [])

    return run


def test_an_error_of_ours_comes_out_of_tune_as_it_is(wave):
    def loop():
        try:
            try:
                raise StorageError("The results folder is read-only.")
            except StorageError as error:
                raise RuntimeError("in a callback") from error
        except RuntimeError:
            raise TuneError("Traceback, 200 lines") from None

    def chained():
        try:
            loop()
        except TuneError as error:
            raise TuneError("the experiment failed") from error

    with pytest.raises(StorageError, match=r"^The results folder is read-only\.$") as found:
        wave(chained)
    assert found.value.__suppress_context__, "nothing of Tune's is printed with it"


def test_an_error_that_is_nobodys_mistake_keeps_its_traceback(wave):
    def loop():
        raise TuneError("a bug") from KeyError("x")

    with pytest.raises(TuneError, match="a bug"):
        wave(loop)


def test_nothing_secret_of_the_environment_is_handed_to_ray(wave, monkeypatch):
    """Ray writes what it hands to workers into logs that everybody on the machine may read."""
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    told = []

    def loop():
        worker = class_cache._ActorClassCache().get(type("Worker", (), {}))
        told.append(worker._default_options["runtime_env"])

    wave(loop)
    assert "secret" not in str(told)
    assert "PL_DISABLE_FORK" in str(told), "this is where Tune says what it hands over"
