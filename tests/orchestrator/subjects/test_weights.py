"""Files of weights: which are taken, which are refused, and that none runs code."""

import argparse
import errno
import os
import pickle  # noqa: TID251 (what hostile files are made of)
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from unusual_modules import counting

from analysis.contract.errors import UserError
from fixers import network as network_module
from orchestrator.subjects import weights


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    path = tmp_path / "w.pt"
    torch.save(Holder().state_dict(), path)
    assert set(weights.read_weights(path, Holder())) == {"model.weight", "model.bias"}


def test_on_a_full_disk_the_file_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_full_disk(**options: Any) -> tuple[int, str]:
        path = tmp_path / "x.tmp"
        path.touch()
        return os.open("/dev/full", os.O_RDWR), str(path)

    monkeypatch.setattr(weights.tempfile, "mkstemp", on_a_full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*w\.safetensors") as found:
        weights.write_state(tmp_path / "w.safetensors", nn.Linear(2, 2).state_dict())
    assert found.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_hostile_weights_file_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    path = tmp_path / "w.pt"
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(UserError, match="holds Python objects, which would run code; save"):
        weights.read_weights(path, nn.Linear(2, 2))
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError):
        weights.read_weights(path, nn.Linear(2, 2))
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="holds Python objects"):
        weights.read_weights(path, nn.Linear(2, 2))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "can't be read as tensors"),
        (b"<html>404</html>", "can't be read as tensors"),
        ({}, "holds no state_dict"),
        ([torch.ones(2)], "holds no state_dict"),
        ({"weight": torch.ones(2, 2), "epoch": 3}, "holds 'epoch' of type int"),
        ({"weight": torch.eye(2).to_sparse(), "bias": torch.ones(2)}, "'weight' in .* is sparse; save dense"),
        (
            {"weight": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8), "bias": torch.ones(2)},
            "'weight' in .* is quantised; save dense float tensors",
        ),
    ],
)
def test_what_is_no_state_dict_is_told_so(content: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=complaint):
        weights.load_state(model, weights.read_weights(path, model), str(path))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


PREFIXES = [
    "", "module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.", "model._orig_mod.",
    "model.module.", "module.module.", "module.model._orig_mod.", "model.model.", "net.", "encoder.backbone.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_in_any_order_and_depth(prefix: str, tmp_path: Path) -> None:
    model = network()
    # Beside a prefix lie what an average counts and what a loss has; without one all names are the model's.
    beside = {"n_averaged": torch.tensor(3), "criterion.weight": torch.ones(2)} if prefix else {}
    state = {prefix + name: value + 1 for name, value in model.state_dict().items()} | beside
    torch.save(state, tmp_path / "w.pt")
    weights.load_state(model, weights.read_weights(tmp_path / "w.pt", model), "w")
    assert all(torch.equal(value, state[prefix + name]) for name, value in model.state_dict().items())


def test_wrappers_within_a_model_and_the_prefixes_of_one_that_has_its_own(tmp_path: Path) -> None:
    holder = nn.ModuleDict({"model": nn.Linear(2, 2), "head": network()})
    own = {name: value + 1 for name, value in holder.state_dict().items()}
    for change in (
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"model._orig_mod.{name}",
        lambda name: name.replace("head.", "head._orig_mod.module."),
    ):
        torch.save({change(name): value for name, value in own.items()}, tmp_path / "w.pt")
        read = weights.read_weights(tmp_path / "w.pt", holder)
        assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)


def test_two_networks_in_one_file_are_not_guessed_between(tmp_path: Path) -> None:
    state = network().state_dict()
    both = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in state.items()}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"under 'student\.' and under 'teacher\.'; save those"):
        weights.read_weights(tmp_path / "w.pt", network())
    # Of an average beside the model it is the model.
    torch.save({name.replace("student", "model"): value for name, value in both.items()}, tmp_path / "w.pt")
    assert weights.read_weights(tmp_path / "w.pt", network()).keys() == state.keys()


@pytest.mark.parametrize("key", ["net", "model_state", "model.state_dict", "model_state_dict", "state_dict"])
def test_checkpoints_keep_weights_under_many_keys_and_scalars_beside_them(key: str, tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(
        {key: state, "optimizer": {"state": {}}, "best": np.float64(0.9), "epoch": np.int64(3), "on": np.bool_(True),
         "args": argparse.Namespace(lr=0.1)},
        tmp_path / "w.pt",
    )  # fmt: skip
    read = weights.read_weights(tmp_path / "w.pt", network())
    assert all(torch.equal(read[name], value) for name, value in state.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_are_no_weights(tmp_path: Path) -> None:
    torch.jit.script(network()).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "program.pt2", "w") as archive:
        archive.writestr("program/archive_format", "pt2")
    for name in ("script.pt", "program.pt2"):
        with pytest.raises(UserError, match=rf"{name} is a program \(TorchScript or \.pt2\), no file of weights"):
            weights.read_weights(tmp_path / name, network())


def test_what_modules_keep_beside_tensors_stays_or_comes_with_the_file(tmp_path: Path) -> None:
    model, other = counting(), counting()
    other.facts = {"made": "elsewhere"}  # type: ignore[assignment]
    torch.save(other.state_dict(), tmp_path / "w.pt")
    weights.load_state(model, weights.read_weights(tmp_path / "w.pt", model), "w")
    assert model.facts == {"made": "elsewhere"}  # type: ignore[comparison-overlap]
    weights.load_state(model, network_module.state_of(counting()), "w")
    assert model.facts == {"made": "elsewhere"}  # type: ignore[comparison-overlap]


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"w has no 'bias' .* has 'scale'"):
        weights.load_state(model, {"weight": torch.ones(2, 2), "scale": torch.ones(1)}, "w")
    with pytest.raises(UserError, match=r"'bias' in w has shape \(3,\), but the model's has \(2,\)"):
        weights.load_state(model, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "w")
