"""Reading an ONNX file that nobody vouches for.

A model file is untrusted input. Everything here happens before any tensor is handed to a library that acts on
it: the size of the file, what its tensors claim to hold and where their external data lies. What comes out is one
self-contained ``ModelProto``, whose operators `onnx.operators` looks at.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, SparseTensorProto, TensorProto

from analysis.contract.errors import UserError

# Element types whose values can be read back one by one; the rest (4 and 8 bit floats, packed integers, complex
# numbers) only occur in quantised or non-classifier models.
_ITEM_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.DOUBLE: 8,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.BOOL: 1,
    TensorProto.INT8: 1,
    TensorProto.INT16: 2,
    TensorProto.INT32: 4,
    TensorProto.INT64: 8,
    TensorProto.UINT8: 1,
    TensorProto.UINT16: 2,
    TensorProto.UINT32: 4,
    TensorProto.UINT64: 8,
}
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)


class ModelImportError(UserError):
    """A model file that can't be imported faithfully: what is wrong, where, and what to do about it."""


class UnsupportedOperator(ModelImportError):
    """What is wrong is that there is no rule for an operator, or for this use of it; another reader may have one."""


def read_model(path: Path, max_bytes: int) -> tuple[ModelProto, str]:
    """Read and check an ONNX file; return it self-contained, with the SHA-256 of what was read.

    Args:
        path: the ``.onnx`` file. External data is accepted from plain files in the same folder only.
        max_bytes: upper bound of the file and its external data together, in bytes.

    Returns:
        The model without external data or training information, not yet known to be well-formed, and the hex digest
        over the bytes of the file followed by those of its external files in order of their names (for a file without
        external data: what ``sha256sum`` prints).

    Raises:
        ModelImportError: the file is too large, damaged or unsafe.

    Source: the rules are those of onnx's ``docs/ExternalDataSecurity.md`` with the exceptions closed, since its
    checks were bypassed several times (CVE-2022-25882, CVE-2026-27489, CVE-2026-34447).
    """
    content = _read_bytes(path, max_bytes)
    try:
        model = ModelProto.FromString(content)
    except DecodeError:
        raise ModelImportError("the file is truncated or no ONNX model; copy or export it again") from None
    if not model.graph.node or not model.opset_import:
        raise ModelImportError("the file holds no ONNX graph; copy or export it again")
    if not _is_text_readable(model):
        raise ModelImportError("it has names that are no valid text, so it is damaged; copy or export it again")
    digest = hashlib.sha256(content)
    model.ClearField("training_info")

    tensors = list(model_tensors(model))
    for tensor in tensors:
        _check_claim(tensor, max_bytes)
    _absorb_external_data(tensors, path.parent, max_bytes - len(content), digest)
    for tensor in tensors:
        _check_content(tensor)

    return model, digest.hexdigest()


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelImportError(f"the file can't be opened ({error.strerror}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelImportError("it is not a regular file; give the path of the .onnx file itself")
    if status.st_size > max_bytes:
        raise ModelImportError(
            f"the file has {status.st_size:,} bytes, more than the limit of {max_bytes:,}; "
            "give a smaller model or raise max_bytes"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelImportError(f"the file can't be read ({error.strerror}); check its permissions") from None


def _is_text_readable(message: Message) -> bool:
    """Whether all strings are UTF-8: protobuf passes others on as bytes, which nothing behind here expects."""
    for field, value in message.ListFields():
        items = [value] if isinstance(value, (str, bytes, Message)) else value
        if field.type == field.TYPE_STRING and any(isinstance(item, bytes) for item in items):
            return False
        if field.type == field.TYPE_MESSAGE and not all(_is_text_readable(item) for item in items):
            return False
    return True


# Walking every tensor of a file, wherever it hides.


def model_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model, wherever it hides."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _attribute_tensors(function.attribute_proto)
        for node in function.node:
            yield from _attribute_tensors(node.attribute)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from _sparse_tensors(sparse)
    for node in graph.node:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            yield from _sparse_tensors(attribute.sparse_tensor)
        for sparse in attribute.sparse_tensors:
            yield from _sparse_tensors(sparse)
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def _sparse_tensors(sparse: SparseTensorProto) -> Iterator[TensorProto]:
    yield sparse.values
    yield sparse.indices


# What a tensor claims, and what it holds.


def _claimed_bytes(tensor: TensorProto) -> int:
    return int(math.prod(tensor.dims)) * _ITEM_BYTES[tensor.data_type]


def _check_claim(tensor: TensorProto, max_bytes: int) -> None:
    if tensor.data_type not in _ITEM_BYTES:
        known = tensor.data_type in TensorProto.DataType.values()
        kind = TensorProto.DataType.Name(tensor.data_type) if known else f"number {tensor.data_type}"
        raise ModelImportError(
            f"tensor {tensor.name!r} has element type {kind}, which can't be fixed; export the model in float32"
        )
    if any(extent < 0 for extent in tensor.dims):
        raise ModelImportError(
            f"tensor {tensor.name!r} has the negative shape {tuple(tensor.dims)}; export the model again"
        )
    claimed = _claimed_bytes(tensor)
    if claimed > max_bytes:
        raise ModelImportError(
            f"tensor {tensor.name!r} claims {claimed:,} bytes, more than the limit of {max_bytes:,}; "
            "the file is damaged or the model too large"
        )
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        fits = len(tensor.raw_data) == claimed
    else:
        held = sum(
            len(field)
            for field in (
                tensor.float_data,
                tensor.double_data,
                tensor.int32_data,
                tensor.int64_data,
                tensor.uint64_data,
            )
        )
        fits = held == math.prod(tensor.dims)
    if not fits:
        raise ModelImportError(
            f"tensor {tensor.name!r} claims the shape {tuple(tensor.dims)} ({claimed:,} bytes) but holds another "
            "number of values; copy or export the model again"
        )


def _check_content(tensor: TensorProto) -> None:
    if tensor.data_type not in _FLOATS:
        return
    values = onnx.numpy_helper.to_array(tensor)
    # A single infinity is a bound (Clip) or the padding of a maximum, not a weight.
    if np.isnan(values).any() or (values.size > 1 and np.isinf(values).any()):
        raise ModelImportError(
            f"tensor {tensor.name!r} has weights that are NaN or infinite; export a model whose training converged"
        )


# External data.


def _absorb_external_data(tensors: Iterable[TensorProto], folder: Path, budget: int, digest: hashlib._Hash) -> None:
    """Move external bytes into the tensors, having checked each place before it is opened."""
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for tensor in tensors:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = entries.get("location", "")
            if location not in files:
                files[location] = stack.enter_context(_open_external(folder, location, tensor.name))
            budget -= _claimed_bytes(tensor)
            if budget < 0:
                raise ModelImportError(
                    f"external data {location!r} goes over the size limit at tensor {tensor.name!r}; "
                    "give a smaller model or raise max_bytes"
                )
            tensor.raw_data = _read_range(files[location], location, entries, tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
        for _, file in sorted(files.items()):
            file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)


def _open_external(folder: Path, location: str, tensor: str) -> BinaryIO:
    where = f"external data {location!r} of tensor {tensor!r}"
    if location in ("", ".", "..") or any(character in location for character in "/\\:\0"):
        raise ModelImportError(
            f"{where} is not a plain file name in the model's own folder; save the model with its data beside it"
        )
    # The descriptor is what is checked and what is read, so nothing can be swapped in between; a pipe doesn't block.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(folder / location, flags), "rb")
    except OSError as error:
        raise ModelImportError(
            f"{where} can't be opened as a file of the model's folder ({error.strerror}); put the file itself there"
        ) from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        file.close()
        raise ModelImportError(f"{where} is a link or no regular file; put a copy of the file itself beside the model")
    return file


def _read_range(file: BinaryIO, location: str, entries: dict[str, str], tensor: TensorProto) -> bytes:
    claimed = _claimed_bytes(tensor)
    numbers = [entries.get("offset", "0"), entries.get("length", str(claimed))]
    if not all(number.isdecimal() and len(number) < 20 for number in numbers):
        raise ModelImportError(
            f"external data {location!r} of tensor {tensor.name!r} has no valid offset and length; "
            "export the model again"
        )
    offset, length = map(int, numbers)
    if length != claimed or offset + length > os.fstat(file.fileno()).st_size:
        raise ModelImportError(
            f"external data {location!r} of tensor {tensor.name!r} should hold {claimed:,} bytes from {offset:,}, "
            "which is not what the file has; copy or export model and data file together"
        )
    file.seek(offset)
    return file.read(length)
