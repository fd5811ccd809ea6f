"""Files of weights: which are taken, which are refused, and that none runs code."""

import pickle  # noqa: TID251 (what hostile files are made of)
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.contract.errors import UserError
from orchestrator.subjects import weights


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    path = tmp_path / "w.pt"
    torch.save(Holder().state_dict(), path)
    assert set(weights.read_weights(path, Holder())) == {"model.weight", "model.bias"}


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
    ],
)
def test_what_is_no_state_dict_is_told_so(content: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=complaint):
        weights.read_weights(path, nn.Linear(2, 2))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"w has no 'bias' .* has 'scale'"):
        weights.load_state(model, {"weight": torch.ones(2, 2), "scale": torch.ones(1)}, "w")
    with pytest.raises(UserError, match=r"'bias' in w has shape \(3,\), but the model's has \(2,\)"):
        weights.load_state(model, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "w")
