"""Speed of what the model-level approaches spend their time on, each case against the plain way of doing it.

    python benchmarks/model_level.py [case ...] [--repeats 5]

Both ways run in turn, in one process, on one thread; a row shows the medians of the repeats and their ratio, and
whether both gave the same. Where they draw random numbers in another order they can't, and nothing is compared.
To add a case, write a function that yields rows and put it into ``CASES``.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fixers import RepairProblem, TensorSplit, TrainingRecipe, network
from fixers.features.heatmaps import heatmaps, layers_to_explain
from fixers.images.consistency import mean_prediction, with_views
from fixers.images.style import StyleTransfer
from fixers.model_level.editable_training.edit_quality import Pairs, apply_edit, measure, wrong_pairs
from fixers.model_level.editable_training.editable_training import EditableTraining
from fixers.model_level.editable_training.editing import EditableModel, Editor
from fixers.model_level.ewc import diagonal_fisher
from fixers.model_level.fsgmix.guided_mixes import GuidedMixes, Mixing
from fixers.model_level.hudd.root_causes import distances
from fixers.model_level.mode.state_differences import features, heat_maps, tap_points
from fixers.model_level.sensei.sensei import SENSEI, Populations, variant_losses
from fixers.training import ensembles

CPU = torch.device("cpu")


class Row(NamedTuple):
    """One line of the table."""

    case: str
    plain_seconds: float
    fast_seconds: float
    result: str
    """What comparing the results said."""


def compared(case: str, plain: Callable[[], object], fast: Callable[[], object], repeats: int) -> Row:
    """Median seconds of both calls, made in turn so that a busy machine slows both; the first round warms up.

    Raises:
        AssertionError: both give a tensor, and they differ by more than rounding.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    result = "drawn anew"
    for round_number in range(repeats + 1):
        found = []
        for call, into in zip((plain, fast), seconds, strict=True):
            start = time.perf_counter()
            found.append(call())
            if round_number:
                into.append(time.perf_counter() - start)
        if all(isinstance(value, Tensor) for value in found):
            apart = ((found[1] - found[0]).norm() / found[0].norm()).item()
            assert apart < 1e-3, f"{case}: the results are {apart:.2g} of their norm apart"
            result = "equal"
    return Row(case, statistics.median(seconds[0]), statistics.median(seconds[1]), result)


def lenet5() -> nn.Module:
    """The study's LeNet5 for 1x28x28: 29,450 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(144, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def small_lenet() -> nn.Module:
    """A LeNet for 1x8x8: about 9,000 parameters, where overhead outweighs arithmetic."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 42), nn.ReLU(), nn.Linear(42, 10),
    )  # fmt: skip


def images(count: int, shape: tuple[int, ...] = (1, 28, 28)) -> TensorSplit:
    """Random images of ten classes."""
    generator = torch.Generator().manual_seed(0)
    return TensorSplit(torch.rand(count, *shape, generator=generator), torch.randint(10, (count,), generator=generator))


def problem_of(model: nn.Module, split: TensorSplit, micro_batch: int = 512) -> RepairProblem:
    """A problem whose splits are all the same."""
    return RepairProblem(model, train=split, valid=split, repair=split, micro_batch=micro_batch)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All values of named tensors, in one row."""
    return torch.cat([value.detach().flatten() for value in tensors.values()])


def reduced_models(repeats: int) -> Iterator[Row]:
    """Ten reduced models for one epoch of 320 samples each: one after the other against all together.

    On a CPU larger batches are never stacked.
    """
    for name, build, side, batch in (
        ("LeNet 8x8, batch 20", small_lenet, 8, 20),
        ("LeNet 8x8, batch 32", small_lenet, 8, 32),
        ("LeNet5 28x28, batch 20", lenet5, 28, 20),
        ("LeNet5 28x28, batch 32", lenet5, 28, 32),
    ):
        generator = torch.Generator().manual_seed(0)
        split = TensorSplit(torch.rand(640, 1, side, side, generator=generator), torch.arange(640) % 10)
        subsets = [torch.randperm(640, generator=generator)[:320] for _ in range(10)]
        model = build()
        recipe = TrainingRecipe(batch_size=batch)

        def run(
            micro_batch: int,
            model: nn.Module = model,
            split: TensorSplit = split,
            subsets: list[torch.Tensor] = subsets,
            recipe: TrainingRecipe = recipe,
        ) -> Tensor:
            problem = RepairProblem(
                model, train=split, valid=split, repair=split, recipe=recipe, micro_batch=micro_batch
            )
            trained = ensembles.train_together(
                lambda k: network.reinitialised(model, k), split, subsets, problem,
                generator=torch.Generator().manual_seed(0), recipe=dataclasses.replace(recipe, epochs=1),
            )  # fmt: skip
            return flat(trained)

        # The size of a group follows from the micro-batch: one model at a time, or all ten.
        yield compared(name, lambda: run(batch), lambda: run(10 * batch), repeats)  # noqa: B023


def guided_mixes(repeats: int) -> Iterator[Row]:
    """Two guided views of each of 64 images: image by image against all together."""
    for name, shape, mixing in (
        ("28x28x1, mix", (1, 28, 28), Mixing("mix", views=2)),
        ("32x32x3, mix", (3, 32, 32), Mixing("mix", views=2)),
        ("32x32x3, no guidance", (3, 32, 32), Mixing("none", views=2)),
    ):
        generator = torch.Generator().manual_seed(0)
        split = TensorSplit(torch.rand(64, *shape, generator=generator), torch.arange(64) % 10)
        mixes = GuidedMixes(split, split, mixing, 10, generator=generator, partners=generator)

        def run(size: int, mixes: GuidedMixes = mixes) -> None:
            for rows in torch.arange(64).split(size):
                mixes.inputs(rows, CPU)

        yield compared(name, lambda: run(1), lambda: run(64), repeats)


def doubt(repeats: int) -> Iterator[Row]:
    """Mean predictions over 64 images and 8 views of each: image by image against all together."""
    clean = images(64).batch().inputs
    model = lenet5().eval()

    def run(size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for part in clean.split(size):
            mean_prediction(model, with_views(part, 8, generator), 512)

    yield compared("LeNet5 28x28, 8 views", lambda: run(1), lambda: run(64), repeats)


def editing(repeats: int) -> Iterator[Row]:
    """Editable Training: one edit, one training step and one look at drawdown."""
    split = images(128)
    model = lenet5().eval()
    problem = problem_of(model, split)
    editor = Editor(rate=1e-3, decay=0.5, momentum=0.0, rmsprop=True, most_steps=10, learned=())
    view = EditableModel(model, "last_two_linear", split.shape)
    pairs = wrong_pairs(problem, 10)
    one = Pairs(*(part[:1] for part in pairs))

    def whole_network(pair: Pairs) -> dict[str, Tensor]:
        start = {name: weight.detach().requires_grad_(True) for name, weight in view.weights.items()}
        return editor.edit(
            start, lambda weights: functional_call(model, weights, (pair.inputs,)), pair.targets, problem.task, "none"
        ).weights

    def change(weights: dict[str, Tensor]) -> Tensor:
        return flat(weights) - flat(view.weights)

    yield compared(
        "edit of two layers", lambda: change(whole_network(one)),
        lambda: change(apply_edit(view, editor, one, problem).weights), repeats,
    )  # fmt: skip

    fixer = EditableTraining(editable="last_two_linear", most_steps=5)

    def step(micro_batch: int) -> Tensor:
        model.zero_grad()
        fixer.accumulate(model, view, editor, split.batch(), one, problem_of(model, split, micro_batch))
        return flat({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})

    yield compared("training step, 128 images", lambda: step(1), lambda: step(512), repeats)

    def copies() -> Tensor:
        found = []
        for index in range(10):
            edited = copy.deepcopy(model)
            edited.load_state_dict(whole_network(Pairs(*(part[index : index + 1] for part in pairs))), strict=False)
            found.append(problem.score(edited, split))
        return torch.tensor(problem.score(model, split) - sum(found) / 10)

    yield compared(
        "drawdown of 10 edits", copies, lambda: torch.tensor(measure(view, editor, pairs, problem).drawdown), repeats
    )


def style(repeats: int) -> Iterator[Row]:
    """DeepRepair: 64 images in the style of references."""
    for name, shape in (("28x28x1", (1, 28, 28)), ("32x32x3", (3, 32, 32))):
        contents = images(64, shape).batch().inputs
        transfer, choice = StyleTransfer(contents[:20].square()), torch.arange(64) % 20

        def run(
            size: int, contents: Tensor = contents, transfer: StyleTransfer = transfer, choice: Tensor = choice
        ) -> Tensor:
            return torch.cat([transfer(*part) for part in zip(contents.split(size), choice.split(size), strict=True)])

        yield compared(name, lambda: run(1), lambda: run(64), repeats)


def root_causes(repeats: int) -> Iterator[Row]:
    """HUDD: heat maps of all layers, and the distances between them."""
    split = images(256)
    model = lenet5().eval()
    names = layers_to_explain(model, split.shape, 10)

    def run(size: int) -> Tensor:
        return flat(heatmaps(model, split, names, problem_of(model, split, size)))

    yield compared("heat maps of 256 images", lambda: run(1), lambda: run(256), repeats)
    maps = heatmaps(model, split, names, problem_of(model, split))[names[0]]

    def pair_by_pair() -> Tensor:
        return torch.stack([torch.stack([(one - other).norm() for other in maps]) for one in maps])

    yield compared("distances of 256 maps", pair_by_pair, lambda: torch.tensor(distances(maps, maps)).float(), repeats)


def variants(repeats: int) -> Iterator[Row]:
    """SENSEI: what an epoch's search does for 64 images, ten variants each."""
    split = images(64)
    model = lenet5().eval()
    problem = problem_of(model, split)
    transformations = SENSEI().transformations
    chromosomes = 2 * torch.rand(64, 10, 4, generator=torch.Generator().manual_seed(0)) - 1

    def one_by_one() -> Tensor:
        found = torch.zeros(64, 10)
        with torch.no_grad():
            for index in range(64):
                batch = split.select(torch.tensor([index])).batch()
                for number in range(10):
                    variant = transformations(batch.inputs, chromosomes[index, number : number + 1])
                    found[index, number] = problem.task.loss(model(variant), batch.targets)
        return found

    yield compared(
        "losses of 640 variants", one_by_one,
        lambda: variant_losses(model, split, transformations, chromosomes, problem), repeats,
    )  # fmt: skip
    losses = torch.rand(64, 10)

    def generation(size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for part in losses.split(size):
            populations = Populations(len(part), 10, 4, generator)
            rows = torch.arange(len(part))
            populations.select(rows, populations.offspring(rows, 0.4), part, 0.4)

    yield compared("64 populations evolve", lambda: generation(1), lambda: generation(64), repeats)


def states(repeats: int) -> Iterator[Row]:
    """MODE: features before all layers, and the heat maps of classes."""
    split = images(512)
    model = lenet5().eval()
    problem = problem_of(model, split)
    taps = tap_points(model, split.shape)

    def layer_by_layer() -> Tensor:
        return flat({tap: features(model, split, [tap], problem)[tap] for tap in taps})

    yield compared(
        "features of 512 images", layer_by_layer, lambda: flat(features(model, split, taps, problem)), repeats
    )

    def image_by_image() -> Tensor:
        sums = {group: torch.zeros(10, 144) for group in ("correct", "mistaken", "missed")}
        counts = {group: torch.zeros(10, 1) for group in sums}
        with torch.no_grad(), network.captured(model, taps[1:2], inputs=True) as calls:
            for batch in split.batches(1):
                calls.clear()
                decided, label = int(model(batch.inputs).argmax()), int(batch.targets)
                mine = {"correct": label} if decided == label else {"mistaken": decided, "missed": label}
                for group, row in mine.items():
                    sums[group][row] += calls[0][1].flatten()
                    counts[group][row] += 1
        return flat({group: sums[group] / counts[group].clamp_min(1) for group in sums})

    yield compared(
        "heat maps of 512 images", image_by_image, lambda: flat(heat_maps(model, split, taps[1], problem).maps), repeats
    )  # fmt: skip


def fisher(repeats: int) -> Iterator[Row]:
    """EWC: the Fisher information of 256 samples."""
    split = images(256)
    model = lenet5().eval()
    problem = problem_of(model, split)

    def one_by_one() -> Tensor:
        total = torch.zeros(sum(weight.numel() for weight in model.parameters()))
        for batch in split.batches(1):
            loss = problem.task.loss(model(batch.inputs), batch.targets)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            total += torch.cat([gradient.flatten() for gradient in gradients]).square()
        return total / len(split)

    yield compared("LeNet5, 256 samples", one_by_one, lambda: flat(diagonal_fisher(model, split, problem)), repeats)


CASES: dict[str, tuple[str, Callable[[int], Iterator[Row]]]] = {
    "reduced_models": ("Apricot: training 10 reduced models, one by one / together", reduced_models),
    "editing": ("Editable Training: whole network and image by image / features once and together", editing),
    "guided_mixes": ("FSGMix: two views of 64 images, one by one / together", guided_mixes),
    "style": ("DeepRepair: style transfer of 64 images, one by one / together", style),
    "root_causes": ("HUDD: heat maps and their distances, one by one / together", root_causes),
    "doubt": ("HybridRepair: predictions on 8 views of 64 images, one by one / together", doubt),
    "fisher": ("EWC: Fisher information, sample by sample / together", fisher),
    "variants": ("SENSEI: search over variants of 64 images, one by one / together", variants),
    "states": ("MODE: inner states, a pass for each layer or image / together", states),
}


def main() -> None:
    """Run the chosen cases and print a table of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all when not given")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each case")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"unknown case {', '.join(sorted(unknown))}; valid: {', '.join(CASES)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in arguments.cases or CASES:
        title, case = CASES[name]
        print(f"{title} (medians of {arguments.repeats}, one thread)")
        print(f"  {'case':<26}{'plain':>10}{'fast':>10}{'ratio':>9}  results")
        for row in case(arguments.repeats):
            ratio = row.plain_seconds / row.fast_seconds
            print(
                f"  {row.case:<26}{row.plain_seconds:>8.3f} s{row.fast_seconds:>8.3f} s{ratio:>8.2f}x  {row.result}",
                flush=True,
            )


if __name__ == "__main__":
    main()
