"""What became of a trial: the only place that turns an event into an outcome and a reason.

Four outcomes, no fifth. Whatever happens to a trial (an exception, a killed worker, NaN weights) ends in one of them
with a reason code for machines and a sentence for people; a lost node is nobody's outcome, the trial runs again.
"""

import re
import traceback
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from analysis.contract.schema import Outcome

TRACEBACK_CHARACTERS: Final = 32_000


class ReasonCode(StrEnum):
    """Why a trial isn't OK. UNADAPTABLE rows carry the code of the unmet requirement instead."""

    CUDA_OOM = "cuda_oom"
    HOST_OOM = "host_oom"
    TIMEOUT = "timeout"
    NAN = "nan"
    EXCEPTION = "exception"
    WORKER_DIED = "worker_died"
    CANCELLED = "cancelled"
    ACCURACY_DROP = "accuracy_drop"


@dataclass(frozen=True)
class Verdict:
    """An outcome with its reason."""

    outcome: Outcome
    reason_code: str | None = None
    reason: str | None = None
    traceback: str | None = None
    """Last characters of the traceback of an exception."""


OK: Final = Verdict("OK")


def unadaptable(code: str, reason: str) -> Verdict:
    """The subject doesn't meet a requirement of the approach."""
    return Verdict("UNADAPTABLE", code, reason)


def failure(code: ReasonCode, reason: str, trace: str | None = None) -> Verdict:
    """Fixing or evaluating didn't finish."""
    return Verdict("FAILURE", code.value, reason, trace)


def judge_accuracy(
    accuracy_original: float, accuracy_fixed: float, allowed_drop: float, split: str = "Test"
) -> Verdict:
    """OK or CORRUPTED by the relative fall of accuracy.

    Args:
        accuracy_original: fraction.
        accuracy_fixed: fraction.
        allowed_drop: largest relative fall that is still OK, 0.10 in the study.
        split: where it was measured: test, or valid for a trial of an adaptation.
    """
    if accuracy_original <= 0:
        return OK
    drop = (accuracy_original - accuracy_fixed) / accuracy_original
    # A fall of exactly the threshold is OK; the slack keeps that true in floating point.
    if drop <= allowed_drop + 1e-12:
        return OK
    return Verdict(
        "CORRUPTED",
        ReasonCode.ACCURACY_DROP.value,
        f"{split} accuracy fell from {accuracy_original:.2%} to {accuracy_fixed:.2%}, "
        f"{drop:.1%} relative; more than {allowed_drop:.0%} counts as corrupted.",
    )


def is_device_broken(error: BaseException) -> bool:
    """Whether the process can't use its device any more and must not take another trial."""
    import torch

    return isinstance(error, torch.AcceleratorError)


def judge_exception(error: BaseException, phase: str) -> Verdict:
    """FAILURE by the type of an exception that ended a phase of a trial in its worker."""
    import torch

    from fixers.errors import DeadlineExceededError, FixFailedError, UnadaptableError, is_out_of_memory

    trace = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
    message = _first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        said = f"The GPU ran out of memory during {phase}, at every micro-batch tried: {message}"
        return failure(ReasonCode.CUDA_OOM, said, trace)
    if is_out_of_memory(error):
        return failure(ReasonCode.HOST_OOM, f"The machine ran out of memory during {phase}: {message}", trace)
    if isinstance(error, UnadaptableError):
        return unadaptable("declared_by_fixer", message)
    if isinstance(error, DeadlineExceededError):
        return failure(ReasonCode.TIMEOUT, f"The time limit passed during {phase}; the fixer stopped as asked.", trace)
    if isinstance(error, FixFailedError):
        return failure(ReasonCode.EXCEPTION, message, trace)
    return failure(ReasonCode.EXCEPTION, f"{type(error).__name__} during {phase}: {message}", trace)


def judge_killed_by_watchdog(phase: str, limit: float) -> Verdict:
    """FAILURE of a trial that went on past its deadline until its worker was ended."""
    return failure(
        ReasonCode.TIMEOUT,
        f"The trial ignored its deadline during {phase} and was killed {limit:.0f} s after the phase began.",
    )


def judge_memory_limit(phase: str, taken: int, limit: int) -> Verdict:
    """FAILURE of a trial whose process took more memory than the study allows a trial."""
    return failure(
        ReasonCode.HOST_OOM,
        f"The trial took {taken / 2**30:.1f} GiB of memory during {phase}, more than its {limit / 2**30:.1f} GiB, and "
        "was ended; raise resources.memory in the study file.",
    )


def judge_dead_worker(error: BaseException, phase: str | None, oom_kills: int) -> Verdict:
    """FAILURE of a trial whose worker process is gone while its node is alive.

    Args:
        error: what Ray raised; its memory monitor has a type of its own, everything else looks alike.
        phase: the last phase the worker reported; None when it never got that far.
        oom_kills: processes that the kernel's OOM killer ended in the worker's cgroup while the trial ran.
    """
    import ray.exceptions

    where = f"during {phase}" if phase else "before it reported anything"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return failure(ReasonCode.HOST_OOM, f"Ray's memory monitor killed the worker {where}: {_first_line(error)}")
    if oom_kills > 0:
        return failure(ReasonCode.HOST_OOM, f"The kernel's OOM killer ended the worker {where}.")
    return failure(
        ReasonCode.WORKER_DIED,
        f"The worker process ended {where} (a crash in native code, os._exit or an outside kill): {_first_line(error)}",
    )


def cancelled(phase: str | None) -> Verdict:
    """FAILURE of a trial that somebody stopped.

    Args:
        phase: the last phase it was seen in; None when it hadn't begun.
    """
    where = f"during {phase}" if phase else "before it began"
    return failure(ReasonCode.CANCELLED, f"The trial was stopped {where} by `fixstudy stop`.")


def judge_nonfinite(parameter: str) -> Verdict:
    """FAILURE of a fix that left NaN or infinity in a weight."""
    return failure(ReasonCode.NAN, f"The fixed model has NaN or infinite values in '{parameter}'.")


def _first_line(error: BaseException) -> str:
    # Ray colours what it says of other processes.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
