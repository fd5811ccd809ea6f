"""Building a ``torch.fx`` graph of ``torch.nn`` modules out of ONNX values.

Two ideas carry the import:

*Lazy layouts.* An ONNX value is kept as the node that computes it *plus* the permutation that turns the node's
axes into the ONNX axes. A Transpose only composes permutations, so the Transpose pairs that TensorFlow exporters
put around convolutions vanish, and what is computed stays channels-first throughout. Flattening a value whose
ONNX axes are channels-last leaves an order of columns behind, which the next dense layer absorbs by permuting
its weight columns. Only an operator that really needs the ONNX layout makes a permutation explicit.

*A probe batch.* Shapes are computed on meta tensors with a batch size that is a large prime. Whatever extent is
a multiple of that prime depends on the batch, also after a detour through Shape, Gather, Mul and Concat, so a
dynamic batch needs no symbolic arithmetic.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto
from torch import fx, nn

from orchestrator.subjects.onnx.safety import ModelImportError

BATCH = 999_983
"""The probe batch size: a prime that no real extent is a multiple of."""

_MAX_ACTIVATION = 1 << 28
"""Values a sample may have in one activation (1 GiB in float32); more is a damaged file or an attack."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Activation:
    """An ONNX value that depends on the input.

    Attributes:
        node: the fx node that computes it, in its own layout.
        shape: the node's shape, with `BATCH` for the batch.
        axes: ONNX axis i is axis ``axes[i]`` of the node.
        columns: for (N, F) values, ONNX column i is column ``columns[i]`` of the node; None for the identity.
        dtype: float32 for data, an integer type for stored indices.
    """

    node: fx.Node
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    columns: Array | None = None
    dtype: torch.dtype = torch.float32

    @property
    def onnx_shape(self) -> tuple[int, ...]:
        """The shape of the ONNX value."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def is_plain(self) -> bool:
        """Whether the node has the layout of the ONNX value."""
        return self.columns is None and self.axes == tuple(range(len(self.axes)))

    def has_layout_of(self, other: Activation) -> bool:
        """Whether both lay the same ONNX axes and columns out alike, so that they combine element by element."""
        if self.axes != other.axes:
            return False
        if self.columns is None or other.columns is None:
            return self.columns is other.columns
        return np.array_equal(self.columns, other.columns)


Value = Activation | Array


class GraphBuilder:
    """Grows an fx graph node by node and knows the shape of each.

    Args:
        input_shape: (C, H, W) or any other shape of one sample, as the finished model takes it.
        input_axes: the ONNX input's axis i is axis ``input_axes[i]`` of the finished model's input.
        paths: hands out module paths.
    """

    def __init__(self, input_shape: Sequence[int], input_axes: Sequence[int], paths: ModulePaths) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.paths = paths
        self.has_weights = False
        node = self.graph.placeholder("pixels")
        self.input = Activation(node, (BATCH, *input_shape), tuple(input_axes))

    def module(self, module: nn.Module, source: Activation, path: str) -> Activation:
        """Append a call of ``module`` on ``source``, in the layout of the node; the result is plain."""
        return self.modules(module, (source,), path)[0]

    def modules(self, module: nn.Module, sources: Sequence[Activation], path: str) -> list[Activation]:
        """Append a call of a module that may have several inputs and outputs."""
        module.eval()
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        meta = {name: tensor.to("meta") for name, tensor in state.items()}
        with torch.no_grad():
            result = torch.func.functional_call(module, meta, tuple(map(_probe, sources)))
        _add_submodule(self.root, path, module)
        self.has_weights |= any(True for _ in module.parameters())
        return self._activations(self.graph.call_module(path, tuple(source.node for source in sources)), result)

    def function(self, function: Callable[..., Any], *arguments: Any) -> Activation:
        """Append a call of ``function``, with activations (also in a tuple) in the layout of their nodes."""
        with torch.no_grad():
            result = function(*_replace(arguments, _probe))
        return self._activation(
            self.graph.call_function(function, _replace(arguments, operator.attrgetter("node"))), result
        )

    def functions(self, function: Callable[..., Any], *arguments: Any) -> list[Activation]:
        """Append a call of a ``function`` that returns a tuple, and return its items."""
        with torch.no_grad():
            result = function(*_replace(arguments, _probe))
        return self._activations(
            self.graph.call_function(function, _replace(arguments, operator.attrgetter("node"))), result
        )

    def constant(self, values: Array, name: str, *, trainable: bool = False) -> Activation:
        """Append a constant: a parameter if trainable, else a buffer."""
        path = self.paths.take_root_name(name)
        tensor = to_tensor(values)
        if trainable:
            self.root.register_parameter(path, nn.Parameter(tensor))
            self.has_weights = True
        else:
            self.root.register_buffer(path, tensor)
        return Activation(self.graph.get_attr(path), tuple(tensor.shape), tuple(range(tensor.ndim)), dtype=tensor.dtype)

    def plain(self, value: Activation) -> Activation:
        """Return the value in its ONNX layout, with an explicit permutation where there was a pending one."""
        if value.columns is not None:
            order = self.constant(value.columns, "column_order")
            return self.function(torch.index_select, value, 1, order)
        return value if value.is_plain else self.function(torch.permute, value, value.axes)

    def transpose(self, value: Activation, permutation: Sequence[int]) -> Activation:
        """ONNX Transpose: nothing is computed, the layout changes."""
        if value.columns is not None:
            value = self.plain(value)
        return Activation(value.node, value.shape, tuple(value.axes[axis] for axis in permutation))

    def reshape(self, value: Activation, target: Sequence[int], path: Callable[[], str]) -> Activation:
        """ONNX Reshape to ``target`` (ONNX axes, `BATCH` for the batch), as simply as the layout allows.

        ``path`` names the ``nn.Flatten`` where it comes to one.
        """
        source, target = value.onnx_shape, tuple(target)
        if source == target:
            return value
        if (moved := _moved_ones(source, target)) is not None:
            return self.transpose(value, moved)
        batch_first = len(source) > 1 and source[0] == BATCH and value.axes[0] == 0
        if batch_first and len(target) == 2 and target[0] == BATCH and value.columns is None:
            flat = self.module(nn.Flatten(), value, path())
            rest = [axis - 1 for axis in value.axes[1:]]
            columns = np.arange(flat.shape[1]).reshape(value.shape[1:]).transpose(rest).reshape(-1)
            in_order = bool((columns[:-1] < columns[1:]).all())
            return Activation(flat.node, flat.shape, flat.axes, None if in_order else columns)
        return self.function(torch.reshape, self.plain(value), free_batch(target))

    def constant_in_layout(self, values: Array, value: Activation) -> Array:
        """Bring a constant that is to be broadcast against the ONNX value into the layout of its node."""
        values = values.reshape((1,) * (len(value.axes) - values.ndim) + values.shape)
        if value.columns is not None:
            return reorder_columns(values, value.columns) if values.shape[1] > 1 else values
        return values.transpose(np.argsort(value.axes))

    def finish(self, output: Activation) -> fx.GraphModule:
        """Close the graph with ``output`` and return it as a module in eval mode."""
        self.graph.output(self.plain(output).node)
        module = fx.GraphModule(self.root, self.graph, "ImportedModel")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        module.eval()
        return module

    def _activations(self, node: fx.Node, result: Any) -> list[Activation]:
        if isinstance(result, torch.Tensor):
            return [self._activation(node, result)]
        return [
            self._activation(self.graph.call_function(operator.getitem, (node, index)), item)
            for index, item in enumerate(result)
        ]

    @staticmethod
    def _activation(node: fx.Node, result: torch.Tensor) -> Activation:
        if result.numel() // BATCH > _MAX_ACTIVATION:
            raise ModelImportError(
                f"an activation of shape {tuple(result.shape[1:])} a sample is too large; give a smaller model"
            )
        shape = tuple(result.shape)
        return Activation(node, shape, tuple(range(len(shape))), dtype=result.dtype)


class ModulePaths:
    """Readable, unique and valid paths for modules.

    They come from the names of the weights (``layer1.0.conv1.weight``), else from the scope in the node's name
    (``/layer1/layer1.0/relu/Relu`` of torch, ``sequential/dense_1/MatMul`` of TensorFlow), else from the operator,
    so that a torch model gets its own ``state_dict`` keys back.
    """

    def __init__(self, nodes: Iterable[NodeProto], weights: Iterable[str]) -> None:
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}
        candidates = [_scope(node.name) for node in nodes] + [_owner(name) for name in weights]
        self._containers = {".".join(parts[:n]) for parts in candidates for n in range(1, len(parts))}

    def take(self, kind: str, node: NodeProto, weight: str | None = None, *, beside: bool = False) -> str:
        """Return a new path for a module; ``kind`` is the last resort and the suffix that avoids a collision.

        A module ``beside`` the one that stands for the node leaves that its name, and takes the suffix in any case.
        """
        base = ".".join(_owner(weight) if weight is not None else ()) or ".".join(_scope(node.name)) or kind
        if base in self._containers:
            base = f"{base}.{kind}"
        if (beside or not self._is_free(base)) and not base.endswith(kind):
            base = f"{base}_{kind}"
        path = self._take_numbered(base)
        self._containers.update(path[: match.start()] for match in re.finditer(r"\.", path))
        return path

    def take_root_name(self, name: str) -> str:
        """Return a new name for a tensor of the root module."""
        base = "_".join(_clean(part) for part in re.split(r"[./:]+", name) if part) or "constant"
        return self._take_numbered(base)

    def _take_numbered(self, base: str) -> str:
        """Take the path, with the lowest free number where it isn't free itself."""
        path = base
        while not self._is_free(path):
            # What is taken stays taken, so the search goes on where the last one for this base ended.
            self._numbers[base] = self._numbers.get(base, 0) + 1
            path = f"{base}_{self._numbers[base]}"
        self._taken.add(path)
        return path

    def _is_free(self, path: str) -> bool:
        parents = {path[: match.start()] for match in re.finditer(r"\.", path)}
        return not self._taken & (parents | {path}) and path not in self._containers


def to_tensor(values: Array) -> torch.Tensor:
    """Copy an array into a tensor of its own; floats become float32."""
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    return torch.from_numpy(np.array(values, order="C"))


def free_batch(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape for ``torch.reshape``, with -1 for the extent that depends on the batch."""
    return tuple(-1 if extent % BATCH == 0 else extent for extent in shape)


def reorder_columns(values: Array, columns: Array) -> Array:
    """Lay axis 1 of ``values``, in ONNX order, out in the order of the node: column i goes to ``columns[i]``."""
    result = np.empty_like(values)
    result[:, columns] = values
    return result


def _probe(value: Activation) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _replace(argument: Any, function: Callable[[Activation], Any]) -> Any:
    if isinstance(argument, Activation):
        return function(argument)
    if isinstance(argument, tuple):
        return tuple(_replace(item, function) for item in argument)
    return argument


def _moved_ones(source: tuple[int, ...], target: tuple[int, ...]) -> list[int] | None:
    """Return the permutation that a reshape amounts to when it only moves axes of extent 1, else None."""
    if len(source) != len(target) or math.prod(source) != math.prod(target):
        return None
    ones = [axis for axis, extent in enumerate(source) if extent == 1]
    others = [axis for axis, extent in enumerate(source) if extent != 1]
    if [source[axis] for axis in others] != [extent for extent in target if extent != 1]:
        return None
    return [ones.pop(0) if extent == 1 else others.pop(0) for extent in target]


def _add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _owner(weight: str) -> tuple[str, ...]:
    """Return the path of the module that a torch weight name belongs to, or nothing for other names."""
    if not weight.endswith(".weight") or ":" in weight or "/" in weight:
        return ()
    return tuple(_clean(part) for part in weight.split(".")[:-1])


def _scope(name: str) -> tuple[str, ...]:
    """Return the module path in a node's name, or nothing where it has none."""
    parts: list[str] = []
    for part in [part for part in name.split("/") if part][:-1]:
        if part.startswith(("StatefulPartitionedCall", "PartitionedCall")):
            continue
        # torch writes /layer1/layer1.0/relu/Relu: an index repeats the name of its container.
        if parts and part.startswith(parts[-1] + "."):
            parts.pop()
        parts.append(part)
    return tuple(_clean(piece) for part in parts for piece in part.split("."))


def _clean(part: str) -> str:
    name = re.sub(r"[^0-9A-Za-z_]", "_", part).strip("_")[:64] or "unnamed"
    return f"{name}_" if hasattr(fx.GraphModule, name) or name in ("training", "graph") else name
