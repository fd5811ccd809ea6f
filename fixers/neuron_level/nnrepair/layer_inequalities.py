"""Inequalities over changes of single weights of one dense layer: linear, because what enters the layer is fixed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fixers import network
from fixers.data import Split
from fixers.exact.arrays import FloatArray
from fixers.features.frozen_prefix import prefix_batches
from fixers.problem import RepairProblem

MARGIN = 1e-4
"""What makes an inequality strict, in units of the layer's output; more where outputs are very large."""


@dataclass(frozen=True)
class Entered:
    """Samples as one dense layer sees them, on the CPU."""

    features: Tensor
    """(N, I) float64: what enters it."""
    outputs: Tensor
    """(N, J) float64: what it makes of them."""
    labels: Tensor
    """(N,) int64."""

    @property
    def margin(self) -> float:
        """By how much an inequality has to hold in double precision to hold in single precision."""
        return MARGIN + 1e-6 * float(self.outputs.abs().max()) if len(self.outputs) else MARGIN

    def select(self, rows: Tensor) -> "Entered":
        """Those at a mask (N,) bool or positions (M,) int64."""
        return Entered(self.features[rows], self.outputs[rows], self.labels[rows])


def entered(problem: RepairProblem, layer: str, split: Split) -> Entered:
    """What enters a Linear layer of the original, and what it makes of it, for every sample of a split."""
    cut = network.cut(problem.original, layer)
    weight = problem.original.get_parameter(f"{layer}.weight")
    features = [torch.empty(0, weight.shape[1], dtype=torch.float64)]
    outputs = [torch.empty(0, weight.shape[0], dtype=torch.float64)]
    with torch.no_grad():
        for entering, *_ in prefix_batches(problem, cut, split):
            features.append(entering.double().cpu())
            outputs.append(cut.suffix.get_submodule(layer)(entering).double().cpu())
    return Entered(torch.cat(features), torch.cat(outputs), split.labels)


def joined(parts: Sequence[Entered]) -> Entered:
    """One after the other."""
    return Entered(
        torch.cat([part.features for part in parts]),
        torch.cat([part.outputs for part in parts]),
        torch.cat([part.labels for part in parts]),
    )


def comparisons(samples: Entered, edges: Tensor) -> tuple[FloatArray, FloatArray]:
    """Rows a'v >= b: with changes v at some weights the logit of the label is larger than that of a rival.

    Args:
        samples: of the layer that gives the logits.
        edges: (n,) int64 positions in its flattened weight.

    Returns:
        (R, n) and (R,), one row for each sample and rival; those that no edge touches are left out.
    """
    inputs, rivals = samples.features.shape[1], torch.arange(samples.outputs.shape[1])
    unit, column = edges // inputs, edges % inputs
    sign = (unit == samples.labels[:, None]).double()[:, None] - (unit == rivals[:, None]).double()
    rows = sign * samples.features[:, column][:, None]
    least = samples.outputs - samples.outputs.gather(1, samples.labels[:, None]) + samples.margin
    kept = (rivals != samples.labels[:, None]) & (sign != 0).any(-1)
    return rows[kept].numpy(), least[kept].numpy()


def switched(samples: Entered, neuron: int, edges: Tensor, on: Tensor) -> tuple[FloatArray, FloatArray]:
    """Rows a'v >= b: with changes v at some of its incoming weights a neuron is on or off.

    Args:
        samples: of its layer.
        neuron: a unit of the layer.
        edges: (n,) int64 positions in the flattened weight, all in the unit's row.
        on: (N,) bool, the state wanted for each sample.

    Returns:
        (N, n) and (N,).
    """
    sign = torch.where(on, 1.0, -1.0).double()
    rows = sign[:, None] * samples.features[:, edges % samples.features.shape[1]]
    return rows.numpy(), (samples.margin - sign * samples.outputs[:, neuron]).numpy()
