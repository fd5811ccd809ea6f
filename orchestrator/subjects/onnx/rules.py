"""What a rule for an ONNX operator is given, and the table of rules.

A rule is a function of a `Call` that returns the value of the node's first output (or the values of all). Adding
support for an operator is adding a function with ``@rule("OpType")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import NodeProto
from torch import nn

from orchestrator.subjects.onnx.folding import for_one_sample, is_repeated
from orchestrator.subjects.onnx.graph import Activation, Array, GraphBuilder, Value
from orchestrator.subjects.onnx.safety import ModelImportError, UnsupportedOperator


@dataclass
class Call:
    """One node of the ONNX graph, with the values of its inputs.

    Attributes:
        node: the node.
        inputs: one value an input; None where an optional input is left out.
        opset: version of the default domain.
        builder: where the rule appends what it needs.
        fixed_batch: the batch size the file is frozen to, None if its batch is dynamic.
        only_use: whether nothing but this node uses the value that input 0 is a view of.
        notes: what was canonicalised, for the record.
        second: the operators that the second reader read.
    """

    node: NodeProto
    inputs: list[Value | None]
    opset: int
    builder: GraphBuilder
    fixed_batch: int | None
    only_use: bool
    notes: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._attributes = {a.name: onnx.helper.get_attribute_value(a) for a in self.node.attribute}

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute of the node, as `onnx.helper` reads it."""
        return self._attributes.get(name, default)

    def lazy(self, index: int) -> Activation:
        """Return an input that depends on the model's input, in whatever layout it has."""
        value = self.inputs[index]
        if not isinstance(value, Activation):
            self.unsupported("works on a constant where the data should be; swap its inputs")
        return value

    def plain(self, index: int) -> Activation:
        """Return an input that depends on the model's input, in the layout of ONNX."""
        return self.builder.plain(self.lazy(index))

    def optional_tensor(self, index: int) -> Array | None:
        """Return a constant input, or None where it is left out."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if isinstance(value, Activation):
            self.refuse(f"computes its input {self.node.input[index]!r} from the data; it must be a constant")
        if value is not None and is_repeated(value):
            self.refuse(
                "uses a constant that is repeated for every sample of the batch in a way that isn't supported; store "
                "what a sample needs as a buffer of the model"
            )
        return value

    def tensor(self, index: int) -> Array:
        """Return a constant input that must be there."""
        value = self.optional_tensor(index)
        if value is None:
            self.refuse(f"lacks its input number {index + 1}; export the model again")
        return value

    def sample_tensor(self, index: int) -> Array:
        """Return a constant input; of one that is repeated over the batch what a sample has of it, with extent 1."""
        value = self.inputs[index]
        return for_one_sample(value) if isinstance(value, np.ndarray) else self.tensor(index)

    def weight(self, index: int, *, for_every_sample: bool = False) -> Array:
        """Return a constant input that must be there and be a number a weight, as float32.

        ``for_every_sample``: it may be one that is repeated over the batch, see `sample_tensor`.
        """
        value = self.sample_tensor(index) if for_every_sample else self.tensor(index)
        if value.dtype.kind != "f":
            self.refuse(f"has weights of type {value.dtype}; export the float32 model")
        return value.astype(np.float32)

    def integers(self, attribute: str, index: int, since: int) -> list[int] | None:
        """Return integers that are an attribute before opset ``since`` and an input from then on."""
        if self.opset < since:
            values = self.attribute(attribute, None)
            return None if values is None else [int(value) for value in values]
        tensor = self.optional_tensor(index)
        return None if tensor is None else [int(value) for value in tensor.reshape(-1)]

    def operand(self, index: int) -> Activation:
        """Return an input as an activation in the layout of ONNX; a constant becomes one, learned behind weights."""
        if isinstance(self.inputs[index], Activation):
            return self.plain(index)
        values = self.weight(index, for_every_sample=True)
        return self.builder.constant(values, self.node.input[index], trainable=self.builder.has_weights)

    def path(self, kind: str, weight: int | None = None, *, beside: bool = False) -> str:
        """Return the path of a new module, after the weight at input ``weight`` if that has a torch name."""
        name = None if weight is None else self.node.input[weight]
        return self.builder.paths.take(kind, self.node, name, beside=beside)

    def module(self, module: nn.Module, source: Activation, kind: str, weight: int | None = None) -> Activation:
        """Append a module to the graph, working on the layout that the node of ``source`` has."""
        return self.builder.module(module, source, self.path(kind, weight))

    @staticmethod
    def in_layout_of(source: Activation, result: Activation) -> Activation:
        """Give a result that kept all axes in place the pending layout of what it was computed from."""
        return Activation(result.node, result.shape, source.axes, source.columns)

    def refuse(self, reason: str) -> NoReturn:
        """Raise the sentence that says where ``reason`` is the case."""
        raise ModelImportError(f"operator {self.node.op_type} (node {self.node.name!r}) {reason}")

    def unsupported(self, reason: str) -> NoReturn:
        """Raise the sentence that says what of an operator this reader lacks; another may have it."""
        raise UnsupportedOperator(f"operator {self.node.op_type} (node {self.node.name!r}) {reason}")


Rule = Callable[[Call], Value | list[Value]]

RULES: dict[str, Rule] = {}
"""Operator type -> rule."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for the given operator types."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register
