"""Weights in files: safetensors of ours and the user's, and the user's .pt files, which are read as data only.

This is the only module that calls ``torch.load``. A .pt file is a pickle, and a pickle runs code when it is loaded
unless ``weights_only=True`` says otherwise; there is no way here to say otherwise.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 (an exception, nothing that loads)

import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from analysis.contract.errors import UserError
from orchestrator.subjects.states import State

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and Lightning put in front of every name."""

# What torch.load raises on a damaged file, or on one that holds more than tensors.
_DAMAGED = (UnpicklingError, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)

_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12](?=\.))")


class UnreadableWeightsError(UserError):
    """A weights file that isn't there, is damaged or holds something else."""


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A user's state_dict, without the prefix of a wrapper if all of its names, and not the model's, have it.

    Args:
        model: what the weights are for.
        path: a ``.safetensors`` file, or what ``torch.save`` wrote of a state_dict (``.pt``, ``.pth``, ``.th``),
            alone or under the key ``state_dict``, ``model_state_dict`` or ``model`` of a dict.

    Raises:
        UnreadableWeightsError: the file isn't there, isn't readable or holds no state_dict.
    """
    state = read_state(path)[0] if path.suffix == ".safetensors" else _state_dict(_read_pickle(path), path)
    own = model.state_dict()
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # torchvision publishes DenseNet's weights in the names of a release that wrote "norm.1" for "norm1".
    return {name if name in own else _DENSE_LAYER.sub(r"\1\2", name): tensor for name, tensor in state.items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state_dict into a model, every name and shape of it.

    Raises:
        UnreadableWeightsError: names or shapes differ, with the first of them.
    """
    own = model.state_dict()
    # Files from before torch 0.4.1 lack the counters of batch norm, which nothing but a momentum of None depends on.
    state = {name: own[name] for name in own if name.endswith("num_batches_tracked")} | dict(state)
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        found = [f"has no '{missing[0]}' (and {len(missing) - 1} more)"] if missing else []
        found += [f"has '{surplus[0]}' (and {len(surplus) - 1} more), which the model has not"] if surplus else []
        raise UnreadableWeightsError(f"{source} {' and '.join(found)}; give the weights of this architecture.")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UnreadableWeightsError(
                f"'{name}' in {source} has shape {tuple(tensor.shape)}, but the model's has {tuple(own[name].shape)}; "
                "give the weights of this architecture."
            )
    model.load_state_dict(state)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UnreadableWeightsError: the file isn't there or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UnreadableWeightsError(f"{path} can't be read as safetensors: {error}.") from error


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors: whole or not at all."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    _write(path, safetensors.torch.save(own, dict(metadata or {})))


def read_arrays(path: Path) -> State:
    """Tensors of a safetensors file as NumPy arrays.

    Raises:
        UnreadableWeightsError: the file isn't there or is damaged.
    """
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UnreadableWeightsError(f"{path} can't be read as safetensors: {error}.") from error


def write_arrays(path: Path, state: State) -> None:
    """Write NumPy arrays as safetensors: whole or not at all."""
    _write(path, safetensors.numpy.save(state))


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (data only; see the module's head)
    except FileNotFoundError as error:
        raise UnreadableWeightsError(f"There is no weights file {path}; check the path.") from error
    except _DAMAGED as error:
        raise UnreadableWeightsError(
            f"{path} can't be read as tensors ({type(error).__name__}): it is damaged or holds Python objects, which "
            "would run code; save model.state_dict() as safetensors and give that."
        ) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UnreadableWeightsError(f"{path} holds no state_dict; save model.state_dict() and give that.")
    strange = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise UnreadableWeightsError(
            f"{path} holds '{strange}' of type {type(content[strange]).__name__} where a state_dict has tensors; "
            "save model.state_dict() and give that."
        )
    return {str(name): value for name, value in content.items()}
