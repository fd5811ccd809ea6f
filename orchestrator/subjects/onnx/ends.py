"""The two ends of an ONNX graph: what goes in, which output is meant, and where the logits are.

An exported classifier seldom ends in its logits. What stands behind them (a Softmax, and whatever only reshapes,
bounds or renames its probabilities) is cut off, and kept as a function by which the file is compared with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto

from orchestrator.subjects.onnx.safety import ModelImportError

_Function = Callable[[torch.Tensor], torch.Tensor]

_ENDINGS: dict[str, _Function] = {
    "Softmax": lambda logits: torch.softmax(logits, dim=1),
    "LogSoftmax": lambda logits: torch.log_softmax(logits, dim=1),
    "Sigmoid": torch.sigmoid,
}
_SHAPE_ONLY = frozenset({"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What leaves the scores as they are; onnxruntime has the last word on their order."""


# What goes in and out.


def choose_output(graph: GraphProto, wanted: str | None) -> None:
    """Reduce a graph to one output and to what that depends on, in place.

    Raises:
        ModelImportError: there is no such output, or there are several and none is named.
    """
    names = [item.name for item in graph.output]
    if wanted is not None and wanted not in names:
        raise ModelImportError(f"it has no output {wanted!r}; name one of {names} as 'output'")
    if wanted is None and len(names) != 1:
        raise ModelImportError(f"it has the outputs {names}; name the one with the scores of the classes as 'output'")
    wanted = wanted or names[0]
    nodes = needed(graph, wanted)
    kept = {name for node in nodes for name in node.input} | {wanted}
    outputs = [item for item in graph.output if item.name == wanted]
    # A graph that reads none is broken, which the checker says better.
    inputs = [item for item in graph.input if item.name in kept] or list(graph.input)
    stored = [item for item in graph.initializer if item.name in kept]
    for field, values in (("node", nodes), ("output", outputs), ("input", inputs), ("initializer", stored)):
        if len(values) != len(getattr(graph, field)):
            graph.ClearField(field)
            getattr(graph, field).extend(values)


def needed(graph: GraphProto, end: str) -> list[NodeProto]:
    """Return the nodes that a value depends on, in the order of the file."""
    producers = {output: index for index, node in enumerate(graph.node) for output in node.output}
    kept, todo = set[int](), [end]
    while todo:
        index = producers.get(todo.pop())
        if index is not None and index not in kept:
            kept.add(index)
            todo.extend(_reads(graph.node[index]))
    return [graph.node[index] for index in sorted(kept)]


def _reads(node: NodeProto) -> Iterable[str]:
    yield from node.input
    for attribute in node.attribute:  # a branch reads values from outside by their names
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


@dataclass(frozen=True)
class Declared:
    """The one input of a file."""

    name: str
    batch: int | None
    """The size that the file is frozen to; None for any."""
    sample: tuple[int, ...]
    """Shape of a sample as the file takes it."""
    channels_last: bool
    """Whether that is (H, W, C)."""


def declared_input(graph: GraphProto, given: Sequence[int] | None) -> Declared:
    """Return what the file says of its one input.

    Args:
        graph: with one output.
        given: shape of a sample as the finished model takes it, (C, H, W), for extents that the file leaves open.

    Raises:
        ModelImportError: there are several inputs, one without a batch, one that isn't float32, or open extents
            and no shape given.
    """
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [item for item in graph.input if item.name not in stored]
    if len(inputs) != 1:
        raise ModelImportError(f"it has the inputs {[item.name for item in inputs]}; export a classifier with one")
    kind, name = inputs[0].type.tensor_type, inputs[0].name
    if kind.elem_type != onnx.TensorProto.FLOAT:
        raise ModelImportError(f"input {name!r} is not float32; export the model with float32 input")
    extents = [item.dim_value if item.HasField("dim_value") else -1 for item in kind.shape.dim]
    if len(extents) < 2:
        raise ModelImportError(
            f"input {name!r} has no batch dimension (its rank is {len(extents)}); export it with a leading batch axis"
        )
    batch, *sample = (extent if extent >= 1 else None for extent in extents)
    channels_last = len(sample) == 3 and _takes_channels_last(graph, name, sample)
    fills: list[int | None] = [None] * len(sample)
    if given is not None and len(given) == len(sample):
        fills = [given[1], given[2], given[0]] if channels_last else list(given)
    filled = tuple(extent or fill for extent, fill in zip(sample, fills, strict=True))
    if not all(filled):
        readable = str(tuple(extent or "open" for extent in (batch, *filled))).replace("'", "")
        raise ModelImportError(
            f"input {name!r} leaves more than the batch open in its shape {readable}; give data of the size that it "
            "is meant for (input_shape in Python), or export it with fixed image or array sizes"
        )
    return Declared(name, batch, tuple(extent for extent in filled if extent), channels_last)


def declared_channels(graph: GraphProto) -> int | None:
    """Return the channels of the images that a file takes: 1 or 3; None where it takes others or doesn't say."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [item for item in graph.input if item.name not in stored]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        return None
    _, *sample = (item.dim_value or None for item in inputs[0].type.tensor_type.shape.dim)
    channels = sample[2] if _takes_channels_last(graph, inputs[0].name, sample) else sample[0]
    return channels if channels in (1, 3) else None


def _takes_channels_last(graph: GraphProto, name: str, sample: Iterable[int | None]) -> bool:
    """Whether the input is (N, H, W, C): by what is done with it first, else by which extent looks like channels."""
    followed = {name}
    for node in graph.node:
        if not followed & set(node.input):
            continue
        if node.op_type == "Transpose":
            return any(list(item.ints) == [0, 3, 1, 2] for item in node.attribute)
        if node.op_type in ("Conv", "BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool"):
            return False
        if node.op_type in ("Identity", "Cast", "Sub", "Add", "Mul", "Div", "Pad"):
            followed.update(node.output)
    height, width, channels = (extent or 1 << 30 for extent in sample)  # an open extent is no channels
    return channels <= 4 < min(height, width)


# Where the logits are.


@dataclass(frozen=True)
class Ending:
    """What a file does with its logits.

    Attributes:
        logits: the name of their value.
        node: the operator that makes probabilities of them; None where the logits are put out.
        behind: what is done with the probabilities, in order.
        note: what is cut off, in words; empty for nothing.
    """

    logits: str
    node: NodeProto | None = None
    behind: tuple[_Function, ...] = ()
    note: str = ""

    @property
    def is_sigmoid(self) -> bool:
        """Whether one score alone says how likely the second of two classes is."""
        return self.node is not None and self.node.op_type == "Sigmoid"

    def normalises(self, axis: int, rank: int, opset: int) -> bool:
        """Whether it is the values along an axis of the logits that become probabilities."""
        if self.node is None or self.is_sigmoid:
            return True
        given = next((item.i for item in self.node.attribute if item.name == "axis"), 1 if opset < 13 else -1) % rank
        # Before opset 13 all axes from the given one on were normalised as one; but one have a single value here.
        return 0 < given <= axis if opset < 13 else given == axis

    def function(self, *, one_score: bool) -> _Function | None:
        """Return what makes the file's output of logits (N, classes); None for nothing.

        ``one_score``: the file has one score, which the model has as the second of two logits.
        """
        if self.node is None:
            return None
        first = _second_of_two if one_score else _ENDINGS[self.node.op_type]
        return functools.partial(_chain, (first, *self.behind))


def find_ending(graph: GraphProto) -> Ending:
    """Look through what only reshapes, bounds, renames or takes the logarithm of probabilities for their Softmax."""
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    end = graph.output[0].name
    name, behind, seen = end, list[_Function](), list[str]()
    while (node := producers.get(name)) is not None and node.input:
        if node.op_type in _ENDINGS:
            # Whoever cuts Identity and Cast off doesn't need to say so.
            more = sorted({kind for kind in seen if kind not in ("Identity", "Cast")})
            note = f"trailing {node.op_type} cut off" + (f" with the {' and '.join(more)} behind it" if more else "")
            return Ending(node.input[0], node, tuple(reversed(behind)), note)
        if node.op_type == "Log":
            behind.append(torch.log)
        elif (bounds := _bounds(node, constants)) is not None:
            behind.append(functools.partial(torch.clamp, min=bounds[0], max=bounds[1]))
        elif node.op_type not in _SHAPE_ONLY:
            break
        seen.append(node.op_type)
        name = node.input[0]
    return Ending(end)


def _bounds(node: NodeProto, constants: Mapping[str, np.ndarray]) -> tuple[float | None, float | None] | None:
    """Return the lower and upper bound of a Clip, or of a Min or Max with a number; None for other operators."""
    if node.op_type not in ("Clip", "Min", "Max"):
        return None
    given = {item.name: item.f for item in node.attribute}
    names = [*node.input[1:], "", ""]
    if any(name and (name not in constants or constants[name].size != 1) for name in names):
        return None
    first, second = (float(constants[name].item()) if name else None for name in names[:2])
    match node.op_type:
        case "Clip":
            return given.get("min", first), given.get("max", second)
        case "Min":
            return None, first
    return first, None


def _chain(functions: Sequence[_Function], values: torch.Tensor) -> torch.Tensor:
    for function in functions:
        values = function(values)
    return values


def _second_of_two(logits: torch.Tensor) -> torch.Tensor:
    """The probability of the second of two classes (N, 1)."""
    return torch.softmax(logits, dim=1)[:, 1:]
