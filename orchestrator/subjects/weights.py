"""Weights in files: safetensors of ours and the user's, and the user's .pt files, which are read as data only.

This is the only module that calls ``torch.load``. A .pt file is a pickle, and a pickle runs code when it is loaded
unless ``weights_only=True`` says otherwise; there is no way here to say otherwise.
"""

import argparse
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 (an exception, nothing that loads)
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from analysis.contract.errors import UserError
from orchestrator.subjects.states import State

WRAPPERS = ("module", "_orig_mod", "model")
"""What DataParallel, torch.compile and Lightning put in front of every name, in any order and depth."""
KEYS = ("state_dict", "model_state_dict", "model_state", "model.state_dict", "model", "net", "network", "module")
"""Under which checkpoints keep the state_dict."""
SHARED = "shared_tensors"
"""Key of a file's metadata: a JSON object from each further name of a tensor to the one that it is stored under."""

# What torch.load raises on a damaged file, or on one that holds more than tensors.
_DAMAGED = (UnpicklingError, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)

# Of what training scripts keep beside the weights; none of them runs code.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdU"},
]
EXTRA = "_extra_state"
"""How torch ends the name of what ``get_extra_state`` gives."""
OPTIONAL = ("num_batches_tracked", EXTRA)
"""Names that a file may lack."""

_INNER_WRAPPER = re.compile(r"\b(?:module|_orig_mod)\.")
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12](?=\.))")


class UnreadableWeightsError(UserError):
    """A weights file that isn't there, is damaged or holds something else."""


def read_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """A user's state_dict in the names of the model: what lies under the prefix of wrappers, at any depth.

    Args:
        model: what the weights are for.
        path: a ``.safetensors`` file, or what ``torch.save`` wrote of a state_dict (``.pt``, ``.pth``, ``.th``),
            alone or under one of :data:`KEYS`.

    Returns:
        Tensors, and what ``get_extra_state`` of modules gave. Names may still differ from the model's.

    Raises:
        UnreadableWeightsError: the file isn't there, isn't readable, holds no state_dict, or two that fit.
    """
    state: dict[str, Any] = (
        read_state(path)[0] if path.suffix == ".safetensors" else _state_dict(_read_pickle(path), path)
    )
    needed = [name for name in model.state_dict() if not name.endswith(OPTIONAL)]
    # torchvision publishes DenseNet's weights in the names of a release that wrote "norm.1" for "norm1".
    renamed = {_DENSE_LAYER.sub(r"\1\2", name): value for name, value in state.items()}
    for named in (state, renamed, {_INNER_WRAPPER.sub("", name): value for name, value in renamed.items()}):
        if (found := _fitting(named, needed, path)) is not None:
            return found
    # For the sentence on what doesn't fit.
    while (first := {name.partition(".")[0] for name in renamed}) and len(first) == 1 and first <= set(WRAPPERS):
        renamed = {name.partition(".")[2]: value for name, value in renamed.items()}
    return renamed


def _fitting(state: Mapping[str, Any], needed: Sequence[str], path: Path) -> dict[str, Any] | None:
    """The part of a state_dict, under a prefix or as it is, that has all names that a model needs."""
    if all(name in state for name in needed):
        return dict(state)
    prefixes = {name[: end + 1] for name in state for end, letter in enumerate(name) if letter == "."}
    fitting = sorted(prefix for prefix in prefixes if all(prefix + name in state for name in needed))
    usual = [prefix for prefix in fitting if set(prefix[:-1].split(".")) <= set(WRAPPERS)]
    fitting = usual or fitting
    if len(fitting) > 1:
        raise UnreadableWeightsError(
            f"{path} has weights of this architecture under '{fitting[0]}' and under '{fitting[1]}'; save those that "
            "are meant alone."
        )
    return (
        {name.removeprefix(fitting[0]): state[name] for name in state if name.startswith(fitting[0])}
        if fitting
        else None
    )


def load_state(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state_dict into a model, every name and shape of it.

    Raises:
        UnreadableWeightsError: names or shapes differ, with the first of them; or a tensor is no plain one.
    """
    own = model.state_dict()
    # Files from before torch 0.4.1 lack the counters of batch norm, which nothing but a momentum of None depends on.
    state = {name: own[name] for name in own if name.endswith(OPTIONAL)} | dict(state)
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        found = [f"has no '{missing[0]}' (and {len(missing) - 1} more)"] if missing else []
        found += [f"has '{surplus[0]}' (and {len(surplus) - 1} more), which the model has not"] if surplus else []
        raise UnreadableWeightsError(f"{source} {' and '.join(found)}; give the weights of this architecture.")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise UnreadableWeightsError(f"'{name}' in {source} is {kind}; save dense float tensors.")
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
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return _under_all_names(state, metadata), metadata
    except (OSError, SafetensorError) as error:
        raise UnreadableWeightsError(f"{path} can't be read as safetensors: {error}.") from error


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors: whole or not at all."""
    _write(path, content(state, metadata))


def content(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as a safetensors file. A tensor of several names is in it once, and the metadata name the others."""
    names: dict[Hashable, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        # Empty tensors have no memory to share.
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if (first := names.setdefault(place, name)) != name:
            shared[name] = first
    own = {name: state[name].detach().cpu().contiguous().clone() for name in names.values()}
    said = dict(metadata or {}) | ({SHARED: json.dumps(shared)} if shared else {})
    return bytes(safetensors.torch.save(own, said))


def of_content(file: bytes) -> dict[str, Tensor]:
    """The tensors of what :func:`content` gave, each under all of its names."""
    state = safetensors.torch.load(file)
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return _under_all_names(state, header.get("__metadata__") or {})


def _under_all_names(state: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    return state | {name: state[first] for name, first in json.loads(metadata.get(SHARED, "{}")).items()}


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
    except OSError as error:
        # Of a full disk it says no name, and nobody knows this temporary one.
        error.filename = str(path)
        raise
    finally:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()


def _read_pickle(path: Path) -> object:
    if _is_script(path):
        raise UnreadableWeightsError(
            f"{path} is a program (TorchScript or .pt2), no file of weights; save model.state_dict() and give that."
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (data only; see the module's head)
    except FileNotFoundError as error:
        raise UnreadableWeightsError(f"There is no weights file {path}; check the path.") from error
    except _DAMAGED as error:
        raise UnreadableWeightsError(
            f"{path} can't be read as tensors ({type(error).__name__}): it is damaged or holds Python objects, which "
            "would run code; save model.state_dict() as safetensors and give that."
        ) from error


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(("/constants.pkl", "/archive_format")) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _state_dict(content: object, path: Path) -> dict[str, Any]:
    while isinstance(content, dict):
        inner = next((content[key] for key in KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not content:
        raise UnreadableWeightsError(f"{path} holds no state_dict; save model.state_dict() and give that.")
    state = {str(name): value for name, value in content.items()}
    strange = next(
        (name for name, value in state.items() if not (isinstance(value, Tensor) or name.endswith(EXTRA))), None
    )
    if strange is not None:
        raise UnreadableWeightsError(
            f"{path} holds '{strange}' of type {type(state[strange]).__name__} where a state_dict has tensors; "
            "save model.state_dict() and give that."
        )
    return state
