"""Fine-tuning: the simplest repair, to train on with the failures, alone or mixed with data that is still right."""

from dataclasses import dataclass
from typing import Any, ClassVar

from fixers.fixer import Level, parameter
from fixers.problem import RepairProblem
from fixers.training.failure_tuning import FailureTuning, Mixture, Penalty, TuningData


@dataclass(frozen=True)
class Finetune(FailureTuning):
    """Adam on failures and correct data.

    With ``correct_share`` 0 it is tuning on failures only, which forgets; the shares of the paper are half and half, in
    strict alternation of one optimiser step on each. To repair one failure type, put only its failures into the
    repair split.

    An epoch is one pass over the failures. The paper's has 1,000 steps whatever their number; the preset ``study``
    bounds an epoch by that and reaches it with 1,000 failures only, so with fewer it trains less than the paper does.

    Peak memory: six copies of the parameters (weights, gradients, two moments, best and original) and activations of
    one micro-batch.
    """

    name: ClassVar[str] = "finetune"
    abbreviation: ClassVar[str] = "FT"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "T. Henn et al.: A Principled Approach to Failure Analysis and Model Repairment: Demonstration in Medical "
        "Imaging. MICCAI 2021. arXiv:2109.12347"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-3, "epochs": 20},
        # One failure, then one correct sample, as for the paper's BP-MNIST.
        "study": {"learning_rate": 1e-6, "batch_size": 2, "steps_per_epoch": 1000, "patience": 100},
    }

    correct_share: float = parameter(
        0.5, grid=(0.0, 0.25, 0.5, 0.75), low=0.0, high=0.95, help="Share of correct samples; 0 tunes on failures only."
    )
    alternate: bool = parameter(
        True, help="Step on failures and on correct samples in turn; False takes one step on both together."
    )
    failure_weight: float = parameter(1.0, low=0.0, help="Factor on the loss of failures.")

    def _mixture(self) -> Mixture:
        return Mixture(self.correct_share, self.alternate, self.failure_weight)

    def _penalty(self, problem: RepairProblem, data: TuningData) -> Penalty | None:
        return None
