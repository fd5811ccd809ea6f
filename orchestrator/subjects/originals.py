"""Original models: found in the cache, taken from a file, or trained by the recipe of the subject.

Training goes on where it was killed. Every epoch draws from generators of its own (order, augmentation, dropout), so
an epoch depends on nothing but the checkpoint before it, and a resumed training gives the same bits as one that was
never interrupted. On one device and number of threads the result is deterministic.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from analysis.contract.errors import UserError
from fixers import Batch, RepairProblem, network
from fixers.training.loop import train
from orchestrator.base.kernels import make_repeatable
from orchestrator.subjects import answers, weights
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.states import State, arrays
from orchestrator.subjects.subject import (
    OriginalRecipe,
    Subject,
    SubjectData,
    SubjectDefinition,
    content_key,
    make_subject,
)

Progress = Callable[[int, Mapping[str, float]], None]
"""Called with (epoch from 1, {epochs, loss, valid_accuracy, seconds})."""

VERSION = 1
"""Raise when the training below gives other weights than before."""


def prepare(
    definition: SubjectDefinition,
    *,
    data_root: DataRoot | None,
    cache_dir: Path,
    data: SubjectData | None = None,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
    keep_history: bool = False,
) -> Subject:
    """Load a subject: its data, and its original model, which is trained now if it never was.

    Safe to call from several processes at once: one trains, the others wait for it.

    Args:
        definition: what to load.
        data_root: folder of datasets; ``FIXSTUDY_DATA`` when not given.
        cache_dir: where trained originals are kept; created when missing.
        data: if they are loaded already.
        device: where to train; its kernels are made repeatable for the rest of the process.
        on_progress: called after each epoch of training.
        keep_history: also keep the weights after each epoch. Trains again if an original was trained without.

    Raises:
        UserError: data or weights are missing, unreadable or don't fit each other; an imported model gives other
            outputs than its file; or the model has no one answer to an input.
    """
    make_repeatable(torch.device(device))
    data = data or definition.load_data(data_root)
    if not definition.trains_original:
        model = definition.build_model()
        _check_weights(definition, model)
        check_answers(definition, model, data)
        return make_subject(definition, data, model, parity=definition.model.parity(data.valid))
    if definition.recipe is None:
        raise UserError(f"{definition.name} has neither weights nor a recipe to train them; give one of them.")
    training = _Training(definition, definition.recipe, data, Path(cache_dir), keep_history)
    return training.finished(torch.device(device), on_progress)


def check_answers(definition: SubjectDefinition, model: nn.Module, data: SubjectData) -> None:
    """See that a model has one answer to an input, by asking it again about a few of valid.

    Raises:
        UserError: it has several.
    """
    reason = answers.why_not_one_answer(model, answers.asked(data.valid))
    if reason is not None:
        raise UserError(f"The model of {definition.name} {reason}.")


def cache_file(definition: SubjectDefinition, data: SubjectData, cache_dir: Path) -> Path:
    """Where the trained original of a subject is kept, whether it is there or not."""
    said = {
        "version": VERSION,
        "model": definition.model.identity(),
        "splits": data.split_hash,
        "recipe": asdict(definition.recipe) if definition.recipe else None,
    }
    return cache_dir / f"{definition.name}-{content_key(said)}.safetensors"


class _Training:
    def __init__(
        self,
        definition: SubjectDefinition,
        recipe: OriginalRecipe,
        data: SubjectData,
        cache_dir: Path,
        keep_history: bool,
    ) -> None:
        self.definition = definition
        self.recipe = recipe
        self.data = data
        self.keep_history = keep_history
        self.result = cache_file(definition, data, cache_dir)
        self.checkpoint = self.result.with_suffix(".checkpoint")

    def finished(self, device: torch.device, on_progress: Progress | None) -> Subject:
        self.result.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.result.with_suffix(".lock")):
            subject = self._cached()
            if subject is None:
                # Before it costs anything; and again below, where the weights of a fresh model may have hidden it.
                check_answers(self.definition, self.definition.build_model(), self.data)
                self._train(device, on_progress)
                subject = self._cached()
        if subject is None:
            raise UserError(
                f"The original model that was just written to {self.result} is gone; keep the cache folder."
            )
        check_answers(self.definition, subject.original, self.data)
        return subject

    def _history_file(self, epoch: int) -> Path:
        return self.result.with_name(f"{self.result.stem}.epoch{epoch:04d}.safetensors")

    def _cached(self) -> Subject | None:
        history: tuple[State, ...] = ()
        # A damaged or missing file counts as not trained.
        with suppress(weights.UnreadableWeightsError):
            model = self.definition.build_model()
            state, facts = weights.read_state(self.result)
            weights.load_state(model, state, str(self.result))
            if self.keep_history:
                epochs = range(1, self.recipe.epochs + 1)
                history = tuple(weights.read_arrays(self._history_file(epoch)) for epoch in epochs)
            return make_subject(
                self.definition, self.data, model, history=history, original_seconds=float(facts["seconds"])
            )
        return None

    def _train(self, device: torch.device, on_progress: Progress | None) -> None:
        model = self.definition.build_model().to(device)
        optimizer = self.recipe.make_optimizer(model)
        problem = RepairProblem(
            model,
            train=self.data.train,
            valid=self.data.valid,
            # The original is trained without a look at the repair split.
            repair=self.data.valid,
            device=device,
            seed=self.recipe.seed,
            recipe=self.recipe,
            micro_batch=self.recipe.batch_size,
        )
        done, seconds = self._resume(model, optimizer)
        started = time.perf_counter() - seconds
        for epoch in range(done + 1, self.recipe.epochs + 1):
            loss = train_epoch(model, optimizer, problem, self.recipe, epoch)
            seconds = time.perf_counter() - started
            if self.keep_history:
                weights.write_arrays(self._history_file(epoch), arrays(model))
            if epoch < self.recipe.epochs:
                self._save_checkpoint(model, optimizer, epoch, seconds)
            if on_progress is not None:
                accuracy = problem.score(model, self.data.valid)
                on_progress(
                    epoch,
                    {"epochs": self.recipe.epochs, "loss": loss, "valid_accuracy": accuracy, "seconds": seconds},
                )
        facts = {
            "seconds": f"{seconds:.3f}",
            "recipe": json.dumps(asdict(self.recipe)),
            "subject": self.definition.name,
        }
        weights.write_state(self.result, network.state_of(model), facts)
        self.checkpoint.unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, seconds: float) -> None:
        state = {f"model.{name}": tensor for name, tensor in network.state_of(model).items()}
        for index, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{key}": value for key, value in values.items() if value is not None}
        facts = {"epoch": str(epoch), "seconds": str(seconds), "history": str(self.keep_history)}
        weights.write_state(self.checkpoint, state, facts)

    def _resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Put model and optimiser where the checkpoint left them; epochs and seconds done."""
        try:
            state, facts = weights.read_state(self.checkpoint)
        except weights.UnreadableWeightsError:
            return 0, 0.0
        if self.keep_history and facts["history"] != "True":
            return 0, 0.0
        own = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        network.load_state(model, own)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(facts["epoch"]), float(facts["seconds"])


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, problem: RepairProblem, recipe: OriginalRecipe, epoch: int
) -> float:
    """Train one epoch in place.

    Args:
        model: on the problem's device.
        optimizer: keeps its state from epoch to epoch.
        problem: data, device and task.
        recipe: schedule, augmentation, precision and seed.
        epoch: counted from 1; determines the draws.

    Returns:
        Mean training loss.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * rate_factor(recipe, epoch)
    drawn = problem.generator(f"augmentation/{epoch}")
    mixed = recipe.precision == "mixed" and problem.device.type == "cuda"

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mixed):
            outputs = model(augmented(batch.inputs, recipe, drawn))
        return problem.task.loss(outputs.float(), batch.targets, "sum")

    devices = [problem.device] if problem.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Dropout draws from the global generator.
        torch.manual_seed(problem.generator(f"dropout/{epoch}").initial_seed())
        return train(
            model,
            problem.train,
            problem,
            epochs=1,
            generator=problem.generator(f"order/{epoch}"),
            recipe=recipe,
            optimizer=optimizer,
            loss=loss,
        )


def rate_factor(recipe: OriginalRecipe, epoch: int) -> float:
    """What the learning rate is multiplied with in an epoch counted from 1; a cosine falls from 1 towards 0."""
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / recipe.epochs))


def augmented(images: Tensor, recipe: OriginalRecipe, generator: torch.Generator) -> Tensor:
    """A batch (B, C, H, W) with each image mirrored, and shifted, or not, as the recipe says; on the batch's device."""
    if recipe.augmentation == "none":
        return images
    n, _, height, width = images.shape
    mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if recipe.augmentation == "flip":
        return images
    reach = 4
    shift = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator).to(images.device)
    rows = shift[0] + torch.arange(height, device=images.device)  # (B, H) in the padded image
    columns = shift[1] + torch.arange(width, device=images.device)  # (B, W)
    padded = nn.functional.pad(images, (reach,) * 4)
    which = torch.arange(n, device=images.device)[:, None, None]
    # Indexing with the channels left out in the middle puts them last.
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        # The kernel releases the lock when its holder dies, so a killed training blocks nobody.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_weights(definition: SubjectDefinition, model: nn.Module) -> None:
    for name, tensor in network.state_of(model).items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"The model of {definition.name} has a value that isn't finite in '{name}', before anything was fixed; "
                "give the weights of a finished training."
            )
