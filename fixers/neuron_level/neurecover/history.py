"""The training history of a model: which checkpoint the model itself is, and what changed since an earlier one."""

from dataclasses import dataclass
from typing import Literal

import torch

from fixers import network
from fixers.data import Split
from fixers.errors import UnadaptableError
from fixers.problem import RepairProblem, StateDict

ENOUGH_DEGRADED = 5
"""With fewer samples that got worse since a checkpoint they say little, and an earlier one is looked at."""


@dataclass(frozen=True)
class Comparison:
    """A checkpoint of the training against the original model."""

    checkpoint: int
    """Position in the history."""
    earlier: StateDict
    """The weights then."""
    degraded: Split
    """Repair samples that were right then and are wrong now."""
    improved: Split
    """Repair samples that were wrong then and are right now."""


def compare(problem: RepairProblem, checkpoint: Literal["previous", "three_back", "best_valid"]) -> Comparison:
    """Compare the original with the wanted checkpoint, or with an earlier one if hardly anything got worse since then.

    Where no checkpoint has :data:`ENOUGH_DEGRADED` it is the one with the most, the latest in a tie. One checkpoint is
    in memory at a time if the history loads them on demand.

    Args:
        problem: original, history, repair and valid split.
        checkpoint: the epoch before the original, three before, or the most accurate earlier one on valid.

    Raises:
        UnadaptableError: there is no checkpoint before the original, or one is of another architecture.
    """
    history, scratch = problem.history, problem.new_model()
    end = epoch_of_original(problem)
    match checkpoint:
        case "previous":
            start = end - 1
        case "three_back":
            start = max(end - 3, 0)
        case "best_valid":
            scores = []
            for epoch in range(end):
                network.load_state(scratch, history[epoch])
                scores.append(problem.score(scratch, problem.valid))
            start = max(range(end), key=lambda epoch: (scores[epoch], epoch))
    best: Comparison | None = None
    for epoch in range(start, -1, -1):
        earlier = history[epoch]
        network.load_state(scratch, earlier)
        was_wrong = problem.wrong_on(scratch, problem.repair)
        degraded = problem.repair.select((problem.wrong & ~was_wrong).nonzero().squeeze(1))
        if best is None or len(degraded) > len(best.degraded):
            improved = problem.repair.select((was_wrong & ~problem.wrong).nonzero().squeeze(1))
            best = Comparison(epoch, earlier, degraded, improved)
        if len(best.degraded) >= ENOUGH_DEGRADED:
            break
    assert best is not None  # start is at least 0
    return best


def epoch_of_original(problem: RepairProblem) -> int:
    """Where in the history the original is, the last time; the end if it came after all of it. At least 1.

    Raises:
        UnadaptableError: nothing is before it, or a checkpoint that was looked at has other weights than the model.
    """
    now = network.state_of(problem.original)
    end = len(problem.history)
    for epoch in range(len(problem.history) - 1, -1, -1):
        then = problem.history[epoch]
        if then.keys() != now.keys() or any(then[name].shape != value.shape for name, value in now.items()):
            raise UnadaptableError(
                f"It needs the training history of this architecture, and checkpoint {epoch} has other weights than "
                "the model; give the checkpoints that this model was trained through."
            )
        if all(torch.equal(then[name].to(value), value) for name, value in now.items()):
            end = epoch
            break
    if end == 0:
        raise UnadaptableError(
            "It needs at least 2 checkpoints of the training, the last being the model itself, and none is before it; "
            "keep the weights of every epoch."
        )
    return end
