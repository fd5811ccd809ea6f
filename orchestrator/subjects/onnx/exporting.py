"""ONNX out: a model as one self-contained file that comes back as the model it was.

torch's default export is for deployment: it folds batch normalisation into the convolutions and drops Dropout. A
fixed model must stay the architecture that the user gave, so both are kept here. This uses torch's TorchScript-based
exporter (``dynamo=False``): the newer one needs onnxscript at run time and folds batch normalisation regardless.
"""

from __future__ import annotations

import copy
import io
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from torch import nn

from analysis.contract.errors import UserError
from fixers import network
from orchestrator.subjects.onnx.parity import OnnxRunner, ParityError, difference, random_batches

__all__ = ["ModelExportError", "export_onnx"]

_OPSETS = range(11, 21)  # what the exporter can write
_INPUT, _OUTPUT, _BATCH_AXIS = "pixels", "logits", "batch"


class ModelExportError(UserError):
    """A model that can't be written as ONNX faithfully: what is wrong and what to do about it."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, ...],
    metadata: Mapping[str, str] | None = None,
    opset: int = 17,
) -> float:
    """Write a classifier as ONNX, with a dynamic batch, and verify the file with onnxruntime.

    Batch normalisation and Dropout stay layers of their own, every weight is stored under its ``state_dict`` key.
    The file appears whole or not at all; the model, its mode and its device stay as they are.

    Args:
        model: float32 pixels (N, *input_shape) in [0, 1] to logits (N, classes), on any device.
        path: the file to write, replaced if it exists.
        input_shape: shape of one sample, (C, H, W) or (F,).
        metadata: what to store in the file's ``metadata_props``, such as trial id, fixer and metrics.
        opset: version of the operator set, 11 to 20.

    Returns:
        Largest |difference| between model and file over random inputs in [0, 1] at batch sizes 1, 2 and 5.

    Raises:
        ModelExportError: torch can't export the model, the file would not be the same function, or can't be written.
    """
    path = Path(path)
    if opset not in _OPSETS:
        raise ModelExportError(f"Cannot write opset {opset}: choose one from {_OPSETS[0]} to {_OPSETS[-1]}.")
    # The copy is traced, so that modes, hooks and device of the caller's model are out of reach.
    twin = copy.deepcopy(model).cpu().eval()
    try:
        proto = _trace(twin, input_shape, opset)
        _use_own_initialisers(proto, _ties(twin))
        _silence_dropout(proto)
        onnx.helper.set_model_props(proto, dict(metadata or {}))
        content = proto.SerializeToString()
        twin.eval()
        largest = _check_parity(twin, content, input_shape)
    except (torch.onnx.errors.OnnxExporterError, ParityError, RuntimeError, ValueError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise ModelExportError(
            f"Cannot export the {type(model).__name__} for inputs {input_shape} faithfully ({detail}): "
            "keep it as safetensors, or replace the layer named."
        ) from error
    _write(path, content)
    return largest


def _trace(model: nn.Module, input_shape: tuple[int, ...], opset: int) -> ModelProto:
    example = torch.zeros(2, *input_shape)
    _spread_small_maps(model, example)
    # In evaluation mode the exporter leaves Dropout out; it is put back to sleep in `_silence_dropout`.
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.train()
    buffer = io.BytesIO()
    # Tracing runs the Dropout layers, which must not move the caller's random numbers.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # deprecation of this exporter, and tracing of size checks
        torch.onnx.export(
            model,
            (example,),
            buffer,  # type: ignore[arg-type]  # what this exporter takes, and annotates no longer
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=opset,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_axes={_INPUT: {0: _BATCH_AXIS}, _OUTPUT: {0: _BATCH_AXIS}},
        )
    proto: ModelProto = ModelProto.FromString(buffer.getvalue())
    return proto


def _spread_small_maps(model: nn.Module, example: torch.Tensor) -> None:
    """Replace adaptive pooling to a multiple of its input's size by the nearest-neighbour resizing that it amounts to.

    ONNX has no adaptive pooling, and the exporter refuses this case: torchvision's VGG16 pools the 1 x 1 map that it
    has on 32 x 32 images to 7 x 7.
    """
    pools = {name: module for name, module in model.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)}
    with torch.no_grad(), network.captured(model, pools, inputs=True) as calls:
        model(example)
    for name, pooled in dict(calls).items():
        goals = _pair(pools[name].output_size)
        factors = [(goal or size) / size for goal, size in zip(goals, pooled.shape[-2:], strict=True)]
        if max(factors) > 1 and all(factor >= 1 and factor % 1 == 0 for factor in factors):
            model.set_submodule(name, nn.Upsample(scale_factor=(factors[0], factors[1]), mode="nearest"))


def _pair(size: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    return size if isinstance(size, tuple) else (size, size)


def _ties(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter, by each of its names."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _use_own_initialisers(proto: ModelProto, ties: Mapping[str, str]) -> None:
    """Give every weight its own initialiser under its own name, and one that layers share a single one.

    The exporter stores equal weights once and hands them out through Identity, which other importers (and their
    users' optimisers) take for one shared weight.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    shared: dict[str, str] = {}
    for node in list(proto.graph.node):
        if node.op_type == "Identity" and node.input[0] in stored:
            given, name = node.input[0], node.output[0]
            if name in ties and ties[name] == ties.get(given):
                shared[name] = given
                proto.graph.node.remove(node)
                continue
            twin = proto.graph.initializer.add()
            twin.CopyFrom(stored[node.input[0]])
            twin.name = node.output[0]
            stored[twin.name] = twin
            proto.graph.node.remove(node)
    for node in proto.graph.node:
        node.input[:] = [shared.get(name, name) for name in node.input]


def _silence_dropout(proto: ModelProto) -> None:
    """Make every Dropout do nothing at inference, which is what it does without a training flag."""
    for node in proto.graph.node:
        if node.op_type == "Dropout":
            del node.input[2:], node.output[1:]


def _check_parity(model: nn.Module, content: bytes, input_shape: tuple[int, ...]) -> float:
    original = OnnxRunner(content, _INPUT)
    largest = 0.0
    for pixels in random_batches(input_shape):
        with torch.no_grad():
            expected = model(pixels)
        largest = max(largest, difference(original(pixels.numpy()), expected.numpy()))
    return largest


def _write(path: Path, content: bytes) -> None:
    # A hidden neighbour first: the rename is atomic within a folder only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ModelExportError(
            f"Cannot write {path.name} ({error.strerror}): check the folder and its space."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
