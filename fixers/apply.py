"""Running an approach on a problem: the checks and the isolation that every caller wants."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fixers import network
from fixers.errors import UnadaptableError
from fixers.fixer import Fixer
from fixers.problem import RepairProblem


def fix(fixer: Fixer, problem: RepairProblem) -> nn.Module:
    """Fix a model, with the requirements checked first and the global state of torch left as it was.

    Dropout draws from torch's global generator, so it is seeded here from the problem and put back afterwards.

    Returns:
        The fixed model, in eval mode; where the repair split has no failure, a copy of the original (a note says so).

    Raises:
        UnadaptableError: the model or the data don't meet a requirement of the approach.
        DeadlineExceededError: the problem's time limit has passed.
        FixFailedError: the approach gave up, with the reason.
    """
    unmet = fixer.unmet(problem.facts)
    if unmet is not None:
        raise UnadaptableError(unmet.reason)
    with network.seeded(problem.seed, problem.device), _all_of_float32(), torch.enable_grad():
        if not problem.wrong.any():
            problem.note(nothing_to_fix=True)
            return problem.new_model()
        return fixer.fix(problem).eval()


@contextmanager
def _all_of_float32() -> Iterator[None]:
    """Keep cuDNN from rounding the inputs of convolutions to TF32: what linear programs prove wouldn't hold."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
