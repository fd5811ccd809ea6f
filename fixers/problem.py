"""What a fixer is given: the failing model, the data it may look at, and the means to work.

There is no test split here, and no way to reach one: what a fixer can't see it can't overfit.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fixers import network
from fixers.cache import Cache, NoCache, Tensors
from fixers.data import Split
from fixers.errors import DeadlineExceededError
from fixers.recipe import TrainingRecipe
from fixers.requirements import SubjectFacts
from fixers.task import Classification, Task

StateDict = Mapping[str, Tensor]


class RepairProblem:
    """A trained model that fails, with the train, valid and repair split of its subject.

    Args:
        model: the original model: inputs in, logits (N, K) out, normalisation inside. It is copied at once; the
            caller's model is never touched.
        train: what the original model was trained on.
        valid: for selection among candidates, and for nothing else.
        repair: the samples whose failures are to be fixed, failures and correct ones together.
        task: judges outputs; classification over the model's outputs when not given.
        device: where to compute.
        seed: every generator of the fix is derived from it.
        time_limit: seconds from now until :meth:`check_deadline` raises; no limit when not given.
        cache: keeps intermediate results between trials; none when not given.
        recipe: how the original was trained; Adam with its defaults when not given.
        history: weights of the original model after each training epoch, oldest first, if they were kept.
        fingerprint: names model and data by content; part of every cache key.
        micro_batch: the largest number of samples that goes through the model at once. The orchestrator lowers it
            after an out-of-memory; honour it and the result stays the same while the peak memory falls.
        on_progress: called with (step, metrics) by :meth:`report`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        train: Split,
        valid: Split,
        repair: Split,
        task: Task | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        time_limit: float | None = None,
        cache: Cache | None = None,
        recipe: TrainingRecipe | None = None,
        history: Sequence[StateDict] = (),
        fingerprint: str = "",
        micro_batch: int = 512,
        on_progress: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.original = copy.deepcopy(model).to(self.device).eval()
        # Labels are tensors, and a fix that changes them in place must change nobody else's; pixels aren't copied.
        self.train, self.valid, self.repair = (
            split.select(torch.arange(len(split))) for split in (train, valid, repair)
        )
        self.seed = seed
        self.recipe = recipe or TrainingRecipe()
        self.history = history
        self.fingerprint = fingerprint
        self.micro_batch = micro_batch
        self.notes: dict[str, Any] = {}
        self._cache = cache or NoCache()
        self._on_progress = on_progress
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self.task = task or self._infer_task()

    def _infer_task(self) -> Task:
        with torch.no_grad():
            example = self.repair.inputs(torch.zeros(1, dtype=torch.int64), self.device)
            return Classification(n_classes=self.original(example).shape[-1])

    @cached_property
    def facts(self) -> SubjectFacts:
        """What requirements of approaches are checked against."""
        return SubjectFacts(
            model=self.original,
            input_shape=self.repair.shape,
            n_classes=self.task.n_classes,
            train_class_counts=dict(enumerate(torch.bincount(self.train.labels).tolist())),
            has_history=len(self.history) > 0,
        )

    def new_model(self) -> nn.Module:
        """A fresh copy of the original model, in eval mode, every parameter trainable: yours to change and return."""
        model = copy.deepcopy(self.original).eval()
        return model.requires_grad_(True)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on the seed and on ``purpose`` only.

        One generator per purpose: drawing more numbers for one doesn't shift those of another.
        """
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def check_deadline(self) -> None:
        """Call between units of work, at least once a second.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """
        if self.seconds_left < 0:
            raise DeadlineExceededError(
                "The time limit of the fix has passed; raise time_limit or choose a smaller preset."
            )

    def report(self, step: int, **metrics: float) -> None:
        """Tell how far the fix is: once per epoch, generation or iteration, with whatever figures it has.

        Also checks the deadline, so that a fixer that reports honours it.
        """
        self.check_deadline()
        if self._on_progress is not None:
            self._on_progress(step, metrics)

    def note(self, **facts: Any) -> None:
        """Record facts about the fix (JSON values) that belong in its result row, such as a mode that was chosen."""
        self.notes.update(facts)

    def cached(self, kind: str, determined_by: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """An intermediate result, from the cache if some trial computed it before.

        Args:
            kind: what it is; change the name when the algorithm behind it changes.
            determined_by: every value (JSON) that it depends on besides the subject, the seed included if it matters.
            compute: makes it.

        Returns:
            The tensors, on the CPU.
        """
        key = {"kind": kind, "subject": self.fingerprint, "determined_by": dict(determined_by)}
        return self._cache.get_or_compute(key, compute)

    def outputs(self, model: nn.Module, split: Split) -> Tensor:
        """Outputs (N, K) of ``model`` in eval mode on ``split``, on the CPU; the model's mode is put back."""
        parts = []
        with network.eval_mode(model), torch.no_grad():
            for batch in split.batches(self.micro_batch, device=self.device):
                self.check_deadline()
                parts.append(model(batch.inputs).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.task.n_classes)

    def score(self, model: nn.Module, split: Split) -> float:
        """The task's score of ``model`` on ``split``: accuracy in [0, 1]."""
        return self.task.score(self.outputs(model, split), split.labels)

    def wrong_on(self, model: nn.Module, split: Split) -> Tensor:
        """Mask (N,) bool, on the CPU, of what ``model`` in eval mode gets wrong; the model's mode is put back."""
        parts = [torch.empty(0, dtype=torch.bool)]
        with network.eval_mode(model), torch.no_grad():
            for batch in split.batches(self.micro_batch, device=self.device):
                self.check_deadline()
                parts.append(self.task.is_wrong(model(batch.inputs), batch.targets).cpu())
        return torch.cat(parts)

    @cached_property
    def wrong(self) -> Tensor:
        """Mask (N,) bool over the repair split: what the original model gets wrong."""
        return self.task.is_wrong(self.outputs(self.original, self.repair), self.repair.labels)

    @cached_property
    def failures(self) -> Split:
        """The repair samples that the original model gets wrong."""
        return self.repair.select(self.wrong.nonzero().squeeze(1))

    @cached_property
    def passes(self) -> Split:
        """The repair samples that the original model gets right."""
        return self.repair.select((~self.wrong).nonzero().squeeze(1))
