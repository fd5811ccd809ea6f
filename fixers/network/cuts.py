"""Cutting a network in two between its layers."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn


def as_graph(model: nn.Module) -> fx.GraphModule:
    """The model as a torch.fx graph whose calls are leaf modules; parameters are shared, not copied.

    Raises:
        torch.fx.proxy.TraceError: the forward pass depends on values.
    """
    return model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)


def why_untraceable(model: nn.Module) -> str | None:
    """The first line of the tracer's complaint; None when the model can be traced."""
    try:
        as_graph(model)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


@dataclass(frozen=True)
class Cut:
    """A model in two parts: ``model(x) == suffix(*prefix(x))``.

    Both parts share their parameters with the model they were cut from.
    """

    prefix: fx.GraphModule
    """Inputs -> tuple of all values that the suffix needs; the first is what enters the layer."""
    suffix: fx.GraphModule
    """Those values -> outputs; starts with the layer, which keeps its qualified name in it."""
    layer: str

    def features(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Values (B, ...) that the suffix needs."""
        result: tuple[Tensor, ...] = self.prefix(inputs)
        return result


def cut(model: nn.Module, layer: str) -> Cut:
    """Cut a model right before the first call of one of its layers.

    Works on any traceable graph: values that by-pass the layer (a residual connection) are handed on as further
    outputs of the prefix.

    Args:
        model: the model; not changed. Its mode (train or eval) is that of both parts.
        layer: qualified name of a leaf module.

    Raises:
        ValueError: the forward pass doesn't call such a layer.
    """
    graph_module = as_graph(model)
    nodes = list(graph_module.graph.nodes)
    at = next((i for i, node in enumerate(nodes) if node.op == "call_module" and node.target == layer), None)
    if at is None:
        raise ValueError(f"The forward pass never calls a layer named '{layer}'.")
    before, entering = set(nodes[:at]), nodes[at].all_input_nodes[0]
    crossing, again, repeatable = [entering], set[fx.Node](), _repeatable(nodes[:at])
    needed = deque(source for node in nodes[at:] for source in node.all_input_nodes)
    while needed:
        node = needed.popleft()
        if node not in before or node in crossing or node in again:
            continue
        # What isn't of a batch is computed by each part instead of handed over: parameters are shared, and sizes are
        # others where the suffix runs on copies.
        if node in repeatable:
            again.add(node)
            needed.extend(node.all_input_nodes)
        else:
            crossing.append(node)

    prefix = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in nodes[:at]:
        copied[node] = prefix.node_copy(node, lambda source: copied[source])
    prefix.output(tuple(copied[node] for node in crossing))

    suffix = fx.Graph()
    moved = {node: suffix.placeholder(f"value_{i}") for i, node in enumerate(crossing)}
    for node in (*(node for node in nodes[:at] if node in again), *nodes[at:]):
        moved[node] = suffix.node_copy(node, lambda source: moved[source])
    return Cut(_with_mode(model, prefix), _with_mode(model, suffix), layer)


def _repeatable(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those that need parameters and shapes only, and no values of a batch."""
    found: set[fx.Node] = set()
    for node in nodes:
        match node.op:
            case "get_attr":
                found.add(node)
            case "call_method" if node.target in ("size", "dim", "numel"):
                found.add(node)
            case "call_function" if node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"):
                found.add(node)
            case "call_method" | "call_function" if found.issuperset(node.all_input_nodes):
                found.add(node)
    return found


def _with_mode(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    part = fx.GraphModule(model, graph)
    part.graph.eliminate_dead_code()
    part.recompile()
    part.training = model.training
    return part
