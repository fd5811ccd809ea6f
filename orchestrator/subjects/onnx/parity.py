"""Whether a torch model and an ONNX file are the same function, measured with onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors
from torch import Tensor, nn

from orchestrator.subjects.onnx.graph import Array
from orchestrator.subjects.subject import Parity

TOLERANCE = 1e-4
"""Largest accepted difference, relative to the largest |output| (absolute where that is below 1)."""

_BATCHES = (1, 2, 5)
_IR_VERSION = 10
"""Version of the file format that every onnxruntime since 1.22 reads; later ones only add what is refused here."""

_RUNTIME_ERRORS = (
    runtime_errors.EPFail,
    runtime_errors.Fail,
    runtime_errors.InvalidArgument,
    runtime_errors.InvalidGraph,
    runtime_errors.InvalidProtobuf,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
)


class ParityError(Exception):
    """The two don't give the same outputs, or one of them gives none."""


class OnnxRunner:
    """An ONNX model as a function of a batch of any size.

    Args:
        content: the serialised, self-contained model.
        input_name: name of its one input.
        fixed_batch: the batch size that the file is frozen to, if it is.

    Raises:
        ParityError: onnxruntime can't load it.
    """

    def __init__(self, content: bytes, input_name: str, fixed_batch: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self._input_name = input_name
        self._fixed_batch = fixed_batch
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except _RUNTIME_ERRORS as error:
            raise ParityError(_first_line(error)) from None

    def __call__(self, batch: Array) -> Array:
        """Return the first output, (N, ...), for float32 inputs (N, ...)."""
        if self._fixed_batch is None:
            return self._run(batch)
        # A file frozen to a batch size runs in batches of it, the last one filled up.
        missing = -len(batch) % self._fixed_batch
        filled = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        parts = np.split(filled, len(filled) // self._fixed_batch)
        return np.concatenate([self._run(part) for part in parts])[: len(batch)]

    def _run(self, batch: Array) -> Array:
        try:
            return np.asarray(self._session.run(None, {self._input_name: batch})[0])
        except _RUNTIME_ERRORS as error:
            raise ParityError(_first_line(error)) from None


@dataclass(frozen=True)
class OriginalFile:
    """The file that a model was imported from, as a function of the inputs that the model takes.

    Attributes:
        runner: of the file.
        channels_last: whether it takes images (N, H, W, C).
        tail: what it does with the logits at its end; None for nothing.
    """

    runner: OnnxRunner
    channels_last: bool
    tail: Callable[[Tensor], Tensor] | None

    def compare(self, model: nn.Module, batches: Iterable[Tensor]) -> Parity:
        """Hold a model against the file.

        Args:
            model: in eval mode, on the CPU; puts out logits (N, classes).
            batches: float32 inputs (N, *shape) as the model takes them.

        Raises:
            ParityError: they differ by more than `TOLERANCE`, or the file can't be run.
        """
        n_inputs, n_same, largest = 0, 0, 0.0
        for batch in batches:
            fed = batch.permute(0, 2, 3, 1) if self.channels_last else batch
            expected = self.runner(fed.contiguous().numpy()).reshape(len(batch), -1)
            with torch.no_grad():
                logits = model(batch)
            given = (logits if self.tail is None else self.tail(logits)).numpy()
            if expected.shape[1] == 1:  # the probability of the second of two classes
                given, expected = np.hstack([1 - given, given]), np.hstack([1 - expected, expected])
            largest = max(largest, difference(given, expected))
            n_inputs += len(batch)
            n_same += int((given.argmax(axis=1) == expected.argmax(axis=1)).sum())
        return Parity(n_inputs, largest, n_same)


def random_batches(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield batches of 1, 2 and 5 samples of the given shape with values in [0, 1), the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    for size in _BATCHES:
        yield torch.rand(size, *shape, generator=generator)


def difference(given: Array, expected: Array) -> float:
    """Return the largest |difference| of outputs (N, classes).

    Raises:
        ParityError: it is beyond `TOLERANCE`, a predicted class differs (other than by a tie within the tolerance),
            the shapes differ, or the expected outputs are not finite.
    """
    if given.shape != expected.shape:
        raise ParityError(f"it puts out the shape {expected.shape} where {given.shape} was expected")
    if not np.isfinite(expected).all():
        raise ParityError("it puts out NaN or infinity")
    largest = float(np.abs(given - expected).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    chosen = np.take_along_axis(expected, given.argmax(axis=1)[:, None], axis=1)[:, 0]
    if not largest <= allowed or (chosen < expected.max(axis=1) - allowed).any():
        raise ParityError(f"outputs differ by {largest:.2g}, and {allowed:.2g} is allowed")
    return largest


def stamp_for_runtime(model: ModelProto) -> None:
    """Lower the versions stamped on a model to those it really needs, in place.

    onnx is released ahead of onnxruntime, which refuses numbers that it doesn't know. An operator means the same
    from the version that its schema is from, so the newest of these is the opset that the model needs.
    """
    model.ir_version = min(model.ir_version, _IR_VERSION)
    for domain in model.opset_import:
        if domain.domain in ("", "ai.onnx"):
            domain.version = max(
                onnx.defs.get_schema(node.op_type, domain.version, "").since_version for node in model.graph.node
            )


def _first_line(error: Exception) -> str:
    """Return what went wrong, without the error codes and C++ signatures that onnxruntime puts in front."""
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    message = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(?:cc|h):\d+ .*?&\) ", "", message)
    return message.rstrip(". ")[:300]
