"""Speed of what the model-level approaches spend their time on, each case against the plain way of doing it.

    python benchmarks/model_level.py [case ...] [--repeats 5]

Both ways run in turn, in one process, on one thread; a row shows the medians of the repeats and their ratio.
To add a case, write a function that yields rows and put it into ``CASES``.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from fixers import RepairProblem, TensorSplit, TrainingRecipe, ensembles, network
from fixers.consistency import mean_prediction, with_views
from fixers.guided_mixes import GuidedMixes, Mixing


class Row(NamedTuple):
    """One line of the table."""

    case: str
    plain_seconds: float
    fast_seconds: float


def medians(plain: Callable[[], object], fast: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both calls, made in turn so that a busy machine slows both; the first round warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_number in range(repeats + 1):
        for call, into in zip((plain, fast), seconds, strict=True):
            start = time.perf_counter()
            call()
            if round_number:
                into.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


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
        ) -> None:
            problem = RepairProblem(
                model, train=split, valid=split, repair=split, recipe=recipe, micro_batch=micro_batch
            )
            ensembles.train_together(
                lambda k: network.reinitialised(model, k), split, subsets, problem, epochs=1,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip

        # The size of a group follows from the micro-batch: one model at a time, or all ten.
        yield Row(name, *medians(lambda: run(batch), lambda: run(10 * batch), repeats))  # noqa: B023


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
                mixes.inputs(rows, torch.device("cpu"))

        yield Row(name, *medians(lambda: run(1), lambda: run(64), repeats))


def doubt(repeats: int) -> Iterator[Row]:
    """Mean predictions over 64 images and 8 views of each: image by image against all together."""
    images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = lenet5().eval()

    def run(size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for part in images.split(size):
            mean_prediction(model, with_views(part, 8, generator), 512)

    yield Row("LeNet5 28x28, 8 views", *medians(lambda: run(1), lambda: run(64), repeats))


CASES: dict[str, tuple[str, Callable[[int], Iterator[Row]]]] = {
    "reduced_models": ("Apricot: training 10 reduced models, one by one / together", reduced_models),
    "guided_mixes": ("FSGMix: two views of 64 images, one by one / together", guided_mixes),
    "doubt": ("HybridRepair: predictions on 8 views of 64 images, one by one / together", doubt),
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
    for name in arguments.cases or CASES:
        title, case = CASES[name]
        print(f"{title} (medians of {arguments.repeats}, one thread)")
        print(f"  {'case':<26}{'plain':>10}{'fast':>10}{'ratio':>9}")
        for row in case(arguments.repeats):
            ratio = row.plain_seconds / row.fast_seconds
            print(f"  {row.case:<26}{row.plain_seconds:>8.3f} s{row.fast_seconds:>8.3f} s{ratio:>8.2f}x", flush=True)


if __name__ == "__main__":
    main()
