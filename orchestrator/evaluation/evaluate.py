"""The evaluation of one trial: what the fixed model predicts on the test split, and every metric of it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fixers import network
from fixers.data import Split
from fixers.task import Task
from orchestrator.evaluation import metrics
from orchestrator.evaluation.robustness import OriginalAttack, RobustnessResult, attack_success

NO_CLASS = -1
"""The prediction of a model whose output has a NaN."""

Predictions = npt.NDArray[np.int64]


class Original(NamedTuple):
    """The original model on the test split, with which a fixed one is compared."""

    predictions: npt.NDArray[np.integer]
    """(N,)."""
    attack: OriginalAttack | None = None
    """Without it there is no ASR."""


@dataclass(frozen=True)
class Evaluation:
    """All that a trial's row and its predictions table are made of."""

    predictions: Predictions
    """What the fixed model predicts on the test split (N,); ``NO_CLASS`` where its output has a NaN."""
    effect: metrics.Effect
    aaod_original: metrics.Aaod | None
    """None without groups."""
    aaod_fixed: metrics.Aaod | None
    robustness: RobustnessResult | None
    """None where no attack was asked for."""

    def row(self) -> dict[str, float | int | None]:
        """The figures under the names that the trials table has for them; None where not measured."""
        effect, robustness = self.effect, self.robustness or RobustnessResult(None, None, None, None, 0)
        return {
            "accuracy_original": effect.accuracy_original,
            "accuracy_fixed": effect.accuracy_fixed,
            "repair_rate": effect.repair_rate,
            "negative_flip_rate": effect.negative_flip_rate,
            "asr_original": robustness.asr_original,
            "asr_fixed": robustness.asr_fixed,
            "masked_original": robustness.masked_original,
            "masked_fixed": robustness.masked_fixed,
            "n_attacked": None if self.robustness is None else robustness.n_attacked,
            "aaod_original": self.aaod_original and self.aaod_original.value,
            "aaod_fixed": self.aaod_fixed and self.aaod_fixed.value,
            "aaod_undefined_classes": self.aaod_fixed and self.aaod_fixed.undefined_classes,
            "n_test": effect.n_test,
            "n_wrong": effect.n_wrong,
            "n_repaired": effect.n_repaired,
            "n_broken": effect.n_broken,
        }


def evaluate(
    fixed: nn.Module,
    test: Split,
    original: Original,
    *,
    task: Task,
    groups: npt.NDArray[np.integer] | None = None,
    device: torch.device | str = "cpu",
    micro_batch: int = 512,
) -> Evaluation:
    """Judge a fixed model by the test split.

    Args:
        fixed: the fixed model, on ``device``.
        test: the test split, which no fixer has seen.
        original: the original model on it.
        task: turns outputs into decisions.
        groups: sensitive attribute (N,) of 0 and 1; without it there is no AAOD.
        device: where to compute.
        micro_batch: most samples that go through the model at once.

    Raises:
        AttackError: the test inputs are not pixels in [0, 1].
        ValueError: the split is empty, or predictions and groups don't have its length.
    """
    labels = test.labels.numpy()
    fixed_predictions = predictions(fixed, test, task=task, device=device, micro_batch=micro_batch)
    aaod_original = aaod_fixed = robustness = None
    if groups is not None:
        aaod_original = metrics.aaod(labels, original.predictions, groups, task.n_classes)
        aaod_fixed = metrics.aaod(labels, fixed_predictions, groups, task.n_classes)
    if original.attack is not None:
        robustness = attack_success(original.attack, fixed, fixed_predictions, device=device, micro_batch=micro_batch)
    effect = metrics.Effect.of(labels, original.predictions, fixed_predictions)
    return Evaluation(fixed_predictions, effect, aaod_original, aaod_fixed, robustness)


def predictions(
    model: nn.Module, split: Split, *, task: Task, device: torch.device | str = "cpu", micro_batch: int = 512
) -> Predictions:
    """Decisions (N,) int64 of a model, on ``device`` already, in eval mode; its mode is put back.

    A row whose output has a NaN decides nothing and gets ``NO_CLASS``.
    """
    parts = [np.zeros(0, dtype=np.int64)]
    with network.eval_mode(model), torch.no_grad():
        for batch in split.batches(micro_batch, device=device):
            outputs = model(batch.inputs)
            decided = task.predict(outputs).masked_fill(outputs.isnan().any(dim=-1), NO_CLASS)
            parts.append(decided.cpu().numpy())
    return np.concatenate(parts)


def has_nonfinite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with a NaN or an infinity; None when all are finite."""
    tensors = network.state_of(model).items()
    return next((name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()), None)
