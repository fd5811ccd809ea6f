"""Running a mitigation: the checks and the isolation that every caller wants."""

from functools import reduce
from operator import add

import torch
from torch import nn

from fixers import network
from fixers.combinations.outputs import log_probabilities_of
from fixers.errors import UnadaptableError
from fixers.mitigations.effects import Effect
from fixers.mitigations.mitigation import Mitigation
from fixers.mitigations.problem import MitigationProblem
from fixers.requirements import Unmet


def unmet(mitigation: type[Mitigation], problem: MitigationProblem) -> Unmet | None:
    """Why a mitigation can't be applied; None when it can."""
    if log_probabilities_of(problem.task) is None:
        reason = f"{mitigation.abbreviation} can't be applied: outputs of the model are no probabilities."
        return Unmet("task_without_probabilities", reason)
    return mitigation.unmet(problem.facts)


def mitigate(mitigation: Mitigation, problem: MitigationProblem) -> nn.Module:
    """Combine the members, with the requirements checked first and the global state of torch left as it was.

    Returns:
        The combined model on the problem's device, in eval mode; log-probabilities (B, K) come out of it.

    Raises:
        UnadaptableError: the members or the data don't meet a requirement.
        DeadlineExceededError: the time limit has passed.
    """
    missing = unmet(type(mitigation), problem)
    if missing is not None:
        raise UnadaptableError(missing.reason)
    if problem.is_identical:
        problem.note(identical=True)
    with network.seeded(problem.seed, problem.device), torch.no_grad():
        return mitigation.combine(problem).to(problem.device).eval()


def cross_fitted(mitigation: Mitigation, problem: MitigationProblem) -> Effect:
    """What a mitigation does on samples of valid that its numbers weren't fitted on.

    Each of five folds is judged by a model that the other four calibrated. On all of valid at once a model would
    flatter.
    """
    folds = problem.folds()
    parts = []
    with network.seeded(problem.seed, problem.device), torch.no_grad():
        for place, held_out in enumerate(folds):
            if len(held_out) == 0:
                continue
            rest = torch.cat([fold for other, fold in enumerate(folds) if other != place])
            model = mitigation.combine(problem.on(rest)).to(problem.device).eval()
            judged = problem.valid.select(held_out)
            was_wrong = problem.task.is_wrong(problem.on(held_out).member_outputs()[0], judged.labels)
            parts.append(Effect.of(was_wrong, problem.wrong_on(model, judged)))
    return reduce(add, parts)
