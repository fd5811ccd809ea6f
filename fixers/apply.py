"""Running an approach on a problem: the checks and the isolation that every caller wants."""

import torch
from torch import nn

from fixers.errors import UnadaptableError
from fixers.fixer import Fixer
from fixers.problem import RepairProblem


def fix(fixer: Fixer, problem: RepairProblem) -> nn.Module:
    """Fix a model, with the requirements checked first and the global state of torch left as it was.

    Dropout draws from torch's global generator, so it is seeded here from the problem and put back afterwards.

    Returns:
        The fixed model, in eval mode.

    Raises:
        UnadaptableError: the model or the data don't meet a requirement of the approach.
        DeadlineExceededError: the problem's time limit has passed.
        FixFailedError: the approach gave up, with the reason.
    """
    unmet = fixer.unmet(problem.facts)
    if unmet is not None:
        raise UnadaptableError(unmet.reason)
    devices = [problem.device] if problem.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(problem.seed)
        return fixer.fix(problem).eval()
