"""What batching and caching are worth in search-based repair of single weights, against the straightforward way.

    python benchmarks/neuron_level.py [--repeats 5]

LeNet5 on scikit-learn's digits, upsampled from 8x8 to 28x28: 61,706 parameters (5x5 convolutions with 6 padded and 16
channels, dense 120, 84, 10). One thread, medians of interleaved repeats. The straightforward way is what public
implementations do: set the weights in the model, run the whole network, read off the losses, one candidate at a time.
Both sides are PyTorch on the same machine, use the same samples and make the same number of evaluations, and their
fitness values are compared before anything is timed.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fixers import RepairProblem, TensorSplit, TrainingRecipe, network
from fixers.data import Split
from fixers.network.places import Places
from fixers.neuron_level.arachne import Arachne
from fixers.neuron_level.genmunn.genetic import GeneticSettings, Mutants, evolve
from fixers.neuron_level.genmunn.genmunn import GenMuNN
from fixers.neuron_level.genmunn.weight_pool import PoolEvaluator
from fixers.neuron_level.inner.probes import Block, blocks, train_probes
from fixers.neuron_level.inner.routing import Masking, route_masks
from fixers.neuron_level.vere.bounds import dense_chain, lower_lines
from fixers.search.fitness import counting_fitness, loss_fitness
from fixers.search.localisation import impacts
from fixers.search.swarms import constriction
from fixers.training.loop import train

CANDIDATES, WEIGHTS, INPUTS = 100, 8, 327
LAST = "11"


def lenet5() -> nn.Module:
    """LeNet5 for 1x28x28 inputs, 61,706 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def failing_problem() -> RepairProblem:
    """A LeNet5 trained on 600 digits for five epochs, with 500 to repair it on."""
    data = load_digits()
    small = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(small, scale_factor=4)[:, :, 2:30, 2:30].contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_part, valid, repair, _ = (
        TensorSplit(images, torch.tensor(data.target), rows) for rows in order.split((600, 200, 500, 497))
    )
    torch.manual_seed(0)
    model = lenet5()
    recipe = TrainingRecipe(batch_size=64)
    problem = RepairProblem(model, train=train_part, valid=valid, repair=repair, recipe=recipe)
    train(model, train_part, problem, epochs=5, generator=torch.Generator().manual_seed(0))
    return RepairProblem(model, train=train_part, valid=valid, repair=repair, recipe=recipe)


def outputs_one_by_one(model: nn.Module, places: Places, candidate: Tensor, inputs: Tensor) -> Tensor:
    """Set the weights, run the whole network."""
    places.write(model, candidate)
    with torch.no_grad():
        outputs: Tensor = model(inputs)
    return outputs


def counting_one_by_one(
    problem: RepairProblem, places: Places, failures: Split, passes: Split, alpha: float
) -> Callable[[Tensor], Tensor]:
    """Arachne's second fitness, one candidate at a time."""
    model = problem.new_model()
    batches = [(alpha, failures.batch()), (1.0, passes.batch())]

    def fitness(candidates: Tensor) -> Tensor:
        totals = []
        for candidate in candidates:
            total = 0.0
            for weight, (inputs, labels, _) in batches:
                outputs = outputs_one_by_one(model, places, candidate, inputs)
                losses = problem.task.loss(outputs, labels, "none")
                wrong = problem.task.is_wrong(outputs, labels)
                total += weight * torch.where(wrong, 1 / (1 + losses), 1.0).sum().item()
            totals.append(total)
        return torch.tensor(totals, dtype=torch.float64)

    return fitness


def loss_one_by_one(problem: RepairProblem, places: Places, passes: Split) -> Callable[[Tensor], float]:
    """Arachne's first fitness of one candidate."""
    model = problem.new_model()
    batches = [problem.failures.batch(), passes.batch()]

    def fitness(candidate: Tensor) -> float:
        total = 0.0
        for inputs, labels, _ in batches:
            outputs = outputs_one_by_one(model, places, candidate, inputs)
            right = int((~problem.task.is_wrong(outputs, labels)).sum())
            total += (right + 1) / (problem.task.loss(outputs, labels).item() + 1)
        return total

    return fitness


def swarm_one_by_one(problem: RepairProblem, population: int, generations: int) -> int:
    """A whole repair by the first version, particle after particle, without early stop; returns its evaluations."""
    impact = impacts(problem, problem.original, [LAST], problem.failures, shares=False)[LAST]
    scores = list(zip(impact.gradient.flatten().tolist(), impact.forward.flatten().tolist(), strict=True))
    strongest = sorted(range(len(scores)), key=lambda i: -scores[i][0])[: 20 * len(problem.failures)]
    front = [
        i
        for i in strongest
        if not any(
            all(a >= b for a, b in zip(scores[k], scores[i], strict=True)) and scores[k] != scores[i] for k in strongest
        )
    ]
    places = Places((LAST,), (torch.tensor(front),))
    weight = problem.original.get_parameter(f"{LAST}.weight").detach()
    span = (weight.max() - weight.min()).item()
    generator = problem.generator("one by one")
    order = torch.randperm(len(problem.passes), generator=generator)
    fitness = loss_one_by_one(problem, places, problem.passes.select(order[:200]))
    positions = [weight.mean() + weight.std() * torch.randn(len(front), generator=generator) for _ in range(population)]
    positions[0] = places.read(problem.original)
    velocities = [torch.zeros(len(front)) for _ in positions]
    own = [(fitness(position), position) for position in positions]
    evaluations = population
    for _ in range(generations):
        best = max(own, key=lambda item: item[0])[1]
        for i, position in enumerate(positions):
            r1, r2 = (4.1 * torch.rand(2, generator=generator)).tolist()
            pull = velocities[i] + r1 * (own[i][1] - position) + r2 * (best - position)
            pull = constriction(4.1) * pull
            velocities[i] = torch.where(pull > 0, 1.0, -1.0) * pull.abs().clamp(span / 5, 5 * span)
            positions[i] = position + velocities[i]
            value = fitness(positions[i])
            evaluations += 1
            if value > own[i][0]:
                own[i] = (value, positions[i])
    return evaluations


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable[[], object], plain: Callable[[], object], repeats: int, target: float | None
) -> None:
    """Time both in turn, so that a busy machine hits both, and print a row."""
    ours()
    pairs = [(seconds(ours), seconds(plain)) for _ in range(repeats)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    verdict = "" if target is None else f"{target:>7.0f}x  {'met' if ratio >= target else 'MISSED'}"
    print(f"{name:<64} {theirs * 1e3:>12.1f} {mine * 1e3:>10.2f} {ratio:>8.1f}x {verdict}")


def one_generation(
    problem: RepairProblem, failures: Split, passes: Split, layer: str, label: str, repeats: int
) -> None:
    """Rows for one evaluation of a population whose weights are in ``layer``; the fitness must agree first."""
    generator = torch.Generator().manual_seed(0)
    size = problem.original.get_parameter(f"{layer}.weight").numel()
    places = Places((layer,), (torch.randperm(size, generator=generator)[:WEIGHTS],))
    candidates = places.read(problem.original) + 0.3 * torch.randn(CANDIDATES, WEIGHTS, generator=generator)
    target = 200.0 if layer == LAST else None

    batched, _ = counting_fitness(problem, places, failures, passes, 10.0)
    plain = counting_one_by_one(problem, places, failures, passes, 10.0)
    torch.testing.assert_close(batched(candidates), plain(candidates), rtol=1e-4, atol=1e-3)
    name = f"{CANDIDATES} candidates, {WEIGHTS} weights, {INPUTS} inputs, {label}"
    compare(name, lambda: batched(candidates), lambda: plain(candidates), repeats, target)
    if layer == LAST:
        by_loss = loss_fitness(problem, places, failures, passes)
        plain_loss = loss_one_by_one(problem, places, passes)
        compare(
            "  the same with the first version's fitness",
            lambda: by_loss(candidates),
            lambda: [plain_loss(candidate) for candidate in candidates],
            repeats,
            target,
        )


def generation_of_mutants(problem: RepairProblem, inputs: Split, repeats: int) -> None:
    """A row for a generation of GenMuNN, whose mutants change weights all over the model; both sides must agree."""
    fixer = GenMuNN()
    pool = fixer._pool(problem, inputs, torch.ones(len(inputs), dtype=torch.float64))
    generations: list[Mutants] = []

    def keep(mutants: Mutants) -> Tensor:
        generations.append(mutants)
        return torch.zeros(len(mutants))

    evolve(
        keep,
        pool.origin,
        fixer._mutation(pool),
        GeneticSettings(population=CANDIDATES + 1, generations=1, mutations=fixer.mutations),
        generator=torch.Generator().manual_seed(0),
    )
    mutants, batch = generations[1], inputs.batch()
    evaluator = PoolEvaluator(problem, pool, inputs)

    def plain() -> Tensor:
        losses = []
        for row in range(len(mutants)):
            model = pool.mutant(problem, mutants.take(torch.tensor([row])))
            with torch.no_grad():
                losses.append(problem.task.loss(model(batch.inputs), batch.targets, "none"))
        return torch.stack(losses)

    torch.testing.assert_close(evaluator.judge(mutants)[1], plain(), rtol=1e-3, atol=1e-4)
    name = f"{CANDIDATES} mutants of {len(mutants.positions)} weights in all layers, {len(inputs)} inputs"
    compare(name, lambda: evaluator.judge(mutants), plain, repeats, None)


def bounds_of_neurons(problem: RepairProblem, failures: Split, repeats: int, pieces: int = 10) -> None:
    """A row for VeRe's bounds: every neuron and interval at once, or a bound call for each, as the public code does."""
    first, *after = dense_chain(problem.original)
    with torch.no_grad():
        features = network.cut(problem.original, first.name).features(failures.batch().inputs)[0]
    values, neurons = first(features), torch.arange(first.layer.out_features)
    edges = torch.lerp(-values.amax(0)[:, None], values.amax(0)[:, None], torch.linspace(0, 1, pieces + 1))
    low, high = edges[:, :-1], edges[:, 1:]
    objective = nn.functional.one_hot(failures.labels, problem.task.n_classes).float()

    def ours() -> Tensor:
        return lower_lines(after, values, neurons, low, high, objective).at(low)

    def plain() -> Tensor:
        bounds = [
            lower_lines(after, values, neuron[None], low[neuron, [k]][None], high[neuron, [k]][None], objective)
            .at(low[neuron, [k]][None])
            .flatten()
            for neuron in neurons
            for k in range(pieces)
        ]
        return torch.stack(bounds, dim=1).unflatten(1, (-1, pieces))

    torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-3)
    name = f"bounds of {len(neurons)} neurons, {pieces} intervals, {len(failures)} inputs"
    compare(name, ours, plain, repeats, None)


def paths_one_by_one(model: nn.Sequential, at: int, probe: nn.Module, split: Split, steps: int) -> Tensor:
    """Masks of INNER's paths, one input after the other, each step through all layers up to the probe."""
    weight = model[at].get_parameter("weight")
    original = weight.detach().clone()
    masks = []
    for image in split.batch().inputs.split(1):
        decided = probe(model[: at + 2](image)).argmax(dim=1)
        mask = torch.ones_like(original)
        for _ in range(steps):
            weight.data = mask * original
            loss = nn.functional.cross_entropy(probe(model[: at + 2](image)), decided)
            (slope,) = torch.autograd.grad(loss, weight)
            mask = (mask - 0.009 * slope - 0.005 * mask.sign()).clamp(0, 1)
        weight.data = original
        masks.append(mask)
    return torch.stack(masks)


def routing_paths(problem: RepairProblem, inputs: Split, repeats: int, steps: int = 40) -> None:
    """Rows for the routing paths of some inputs through a dense layer and a convolution; the masks must agree first."""
    model = problem.original
    if not isinstance(model, nn.Sequential):
        raise TypeError("The plain way slices the network, which must be a Sequential.")
    where = [block for block in blocks(model, problem.repair.shape) if block.layer in ("3", "7")]
    probes = train_probes(problem, where, problem.train, epochs=2, learning_rate=0.01)
    for block, label in zip(where, ("second convolution", "first dense layer"), strict=True):
        probe = probes[block.layer]

        def ours(block: Block = block, probe: nn.Module = probe) -> Tensor:
            found = route_masks(problem, model, block, probe, inputs, Masking(steps, rate=0.009, shrinkage=0.005))
            return torch.cat(list(found))

        def plain(block: Block = block, probe: nn.Module = probe) -> Tensor:
            # What enters the next layer with weights is pooled and flattened behind the convolution.
            tapped = nn.Sequential(nn.MaxPool2d(2), probe) if block.layer == "3" else probe
            return paths_one_by_one(copy.deepcopy(model), int(block.layer), tapped, inputs, steps)

        torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-4)
        compare(f"paths of {len(inputs)} inputs, {steps} steps, {label}", ours, plain, repeats, None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements a row (default 5)")
    parser.add_argument("--population", type=int, default=100, help="particles of the whole repair (default 100)")
    parser.add_argument("--generations", type=int, default=10, help="moves of the whole repair (default 10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = failing_problem()
    failures = problem.failures
    passes = problem.passes.select(torch.arange(INPUTS - len(failures)))
    print(f"{len(failures)} failures of {len(problem.repair)}; {torch.get_num_threads()} thread")
    print(f"{'':<64} {'one by one':>12} {'batched':>10} {'ratio':>9} {'target':>8}")
    print(f"{'':<64} {'ms':>12} {'ms':>10}")

    for layer, label in ((LAST, "last layer"), ("9", "second last layer"), ("3", "second convolution")):
        one_generation(problem, failures, passes, layer, label, options.repeats)
    generation_of_mutants(problem, problem.repair.select(torch.arange(INPUTS)), options.repeats)
    bounds_of_neurons(problem, failures, options.repeats)
    routing_paths(problem, failures.select(torch.arange(min(32, len(failures)))), max(1, options.repeats // 2))
    fixer = Arachne(search="pso", population=options.population, generations=options.generations)

    def whole() -> None:
        fresh = copy.copy(problem)  # what a problem computes lazily counts as part of the repair
        for lazy in ("wrong", "failures", "passes"):
            vars(fresh).pop(lazy, None)
        fixer.fix(fresh)
        expected = options.population * (options.generations + 1)
        if fresh.notes["evaluations"] != expected:
            raise SystemExit(f"The repair stopped after {fresh.notes['evaluations']} of {expected} evaluations.")

    compare(
        f"whole repair, first version, {options.population} particles, {options.generations} moves",
        whole,
        lambda: swarm_one_by_one(problem, options.population, options.generations),
        max(1, options.repeats // 2),
        50.0,
    )


if __name__ == "__main__":
    main()
