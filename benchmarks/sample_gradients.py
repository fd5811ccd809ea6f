"""Projected gradients of single samples against the loop that the paper's code takes, on one core.

The loop is theirs: a batch of one, a forward pass for the prediction and one for the loss, a backward pass, and each
weight's gradient times a matrix of 100 columns. Run as `OMP_NUM_THREADS=1 python benchmarks/sample_gradients.py`.
"""

import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fixers import RepairProblem, TensorSplit
from fixers.failure_types.representations import PROJECTED, gradients
from orchestrator.subjects.architectures import NamedArchitecture

ROUNDS = 3
IN_LOOP = 10


def problem_of(architecture: str, n_classes: int, shape: tuple[int, ...], n: int) -> RepairProblem:
    """A model of that architecture with fresh weights, and random images."""
    torch.manual_seed(0)
    split = TensorSplit(torch.rand(n, *shape), torch.randint(0, n_classes, (n,)))
    model = NamedArchitecture(architecture, n_classes).build()
    return RepairProblem(model, train=split, valid=split, repair=split)


def one_by_one(problem: RepairProblem) -> Callable[[], object]:
    """The loop over the first samples."""
    model, batch = problem.new_model(), problem.repair.select(torch.arange(IN_LOOP)).batch()
    matrices = {
        name: torch.randn(weight.numel(), PROJECTED)
        for name, weight in model.named_parameters() if weight.dim() > 1 and weight.numel() > PROJECTED
    }  # fmt: skip

    def loop() -> list[list[Tensor]]:
        found = []
        for inputs, target in zip(batch.inputs, batch.targets, strict=True):
            model(inputs[None])
            model.zero_grad()
            problem.task.loss(model(inputs[None]), target[None]).backward()
            own = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            found.append([own[name].reshape(1, -1) @ matrix for name, matrix in matrices.items()])
        return found

    return loop


def seconds(call: Callable[[], object]) -> float:
    """Of the quickest of some calls."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Print milliseconds per sample, their ratio, and the peak memory of the process."""
    torch.set_num_threads(1)
    for architecture, n_classes, shape, n in (("LeNet5", 10, (1, 28, 28), 2000), ("TissueNet", 2, (3, 28, 28), 256)):
        problem = problem_of(architecture, n_classes, shape, n)
        slow = seconds(one_by_one(problem)) / IN_LOOP
        quick = seconds(lambda: gradients(problem.repair, problem)) / n  # noqa: B023
        print(f"{architecture}: loop {1e3 * slow:.2f} ms, ours {1e3 * quick:.2f} ms a sample, {slow / quick:.1f} times")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
