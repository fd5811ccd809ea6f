"""What single units are good for: how many samples a model gets right without each of them."""

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.problem import RepairProblem


def score_without(
    problem: RepairProblem, model: nn.Module, layer: str, split: Split, weights: Tensor | None = None
) -> Tensor:
    """Samples that a model gets right when one unit of a layer gives 0, as with all its incoming weights set to 0.

    What comes before the layer runs once; only what follows it runs for every unit, on as many copies of a batch as a
    micro-batch has room for.

    Args:
        problem: task, device, micro-batch, deadline.
        model: in eval mode; not changed.
        layer: a Linear or Conv2d that a forward pass calls once. A unit is an output, or an output channel.
        split: the samples.
        weights: what a sample counts (N,); 1 when not given.

    Returns:
        (units,) float64 on the CPU.

    Raises:
        ValueError: the forward pass doesn't call the layer exactly once.
    """
    if not called_once(model, layer):
        raise ValueError(f"Units can be left out of a layer that is called once, and '{layer}' isn't.")
    cut = network.cut(model, layer)
    module = cut.suffix.get_submodule(layer)
    axis = 1 if isinstance(module, nn.Conv2d) else -1
    cut.suffix.set_submodule(layer, nn.Identity())
    worth = torch.ones(len(split), dtype=torch.float64) if weights is None else weights.double()
    units = getattr(module, "out_channels" if axis == 1 else "out_features")
    right = torch.zeros(units, dtype=torch.float64, device=problem.device)
    with torch.no_grad():
        for batch in split.batches(problem.micro_batch, device=problem.device):
            entering, *others = cut.features(batch.inputs)
            outputs = module(entering)
            worths = worth[batch.indices].to(problem.device)
            for part in torch.arange(units, device=problem.device).split(max(1, problem.micro_batch // len(outputs))):
                problem.check_deadline()
                silenced = outputs.repeat(len(part), *[1] * outputs.dim())
                by_unit = silenced.movedim(axis if axis < 0 else axis + 1, 1)
                by_unit[torch.arange(len(part), device=part.device), part] = 0
                copies = [other.repeat(len(part), *[1] * (other.dim() - 1)) for other in others]
                judged = problem.task.is_wrong(
                    cut.suffix(silenced.flatten(0, 1), *copies), batch.targets.repeat(len(part))
                )
                right[part] += (~judged).reshape(len(part), -1).double() @ worths
    return right.cpu()


def called_once(model: nn.Module, layer: str) -> bool:
    """Whether a forward pass calls a layer exactly once."""
    nodes = network.as_graph(model).graph.nodes
    return len([node for node in nodes if node.op == "call_module" and node.target == layer]) == 1
