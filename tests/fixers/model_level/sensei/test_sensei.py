import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixers import RepairProblem, TensorSplit, TrainingRecipe, fix, get, network
from fixers.errors import DeadlineExceededError, ParameterError
from fixers.model_level.sensei import sensei
from fixers.model_level.sensei.sensei import SENSEI, Populations, variant_losses
from fixers.model_level.sensei.transformations import Transformations, TransformedSplit
from fixers.training.loop import train
from fixers.views import JoinedSplit

QUICK = {"population": 5, "epochs": 3, "learning_rate": 1e-2, "rotation": 15.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def watch(fixer, problem, monkeypatch):
    """Run a fix and remember every choice: (model at that moment, rows, offspring, chromosomes chosen, losses)."""
    seen, offspring = [], []
    choose, select = SENSEI._choose, Populations.select

    def remember_offspring(self, rows, children, losses, elite):
        offspring.append(children.clone())
        select(self, rows, children, losses, elite)

    def remember(self, model, images, populations, rows, problem_):
        before = copy.deepcopy(model)
        chosen, worst = choose(self, model, images, populations, rows, problem_)
        seen.append((before, rows.clone(), offspring[-1], chosen, worst.clone()))
        return chosen, worst

    with monkeypatch.context() as patch:
        patch.setattr(Populations, "select", remember_offspring)
        patch.setattr(SENSEI, "_choose", remember)
        fix(fixer, problem)
    return seen


# The search


@pytest.mark.parametrize("search", ["genetic", "worst"])
def test_the_chosen_variant_has_the_highest_loss_of_its_population(make_problem, monkeypatch, search):
    problem = make_problem()
    fixer = SENSEI(**QUICK, search=search, robust_below=0.0)
    seen = watch(fixer, problem, monkeypatch)
    images = JoinedSplit([problem.train, problem.failures])
    assert len(seen) == 2
    for model, rows, offspring, chosen, worst in seen:
        assert torch.equal(rows, torch.arange(len(images)))
        everything = images.batch()
        losses = torch.stack(
            [
                problem.task.loss(
                    model(fixer.transformations(everything.inputs, genes)), everything.targets, "none"
                ).detach()
                for genes in offspring.unbind(1)
            ],
            dim=1,
        )
        assert torch.allclose(worst, losses.amax(1), rtol=1e-4, atol=1e-6)
        of_chosen = problem.task.loss(
            model(fixer.transformations(everything.inputs, chosen)), everything.targets, "none"
        ).detach()
        assert torch.allclose(of_chosen, losses.amax(1), rtol=1e-4, atol=1e-6)
        assert (offspring == chosen[:, None]).all(-1).any(1).all()
        # Populations are each image's own.
        assert len(offspring.flatten(1).unique(dim=0)) == len(images)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 7),
    genes=st.integers(1, 6),
    crossover=st.floats(0, 1),
    elite=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_genes_stay_in_range_and_children_take_after_parents(size, genes, crossover, elite, seed):
    populations = Populations(9, size, genes, generator(seed))
    parents = populations._parents.clone()
    draw = generator(seed + 1)
    for _ in range(4):
        rows = torch.randperm(9, generator=draw)[:6]
        counts = populations._count[rows]
        offspring = populations.offspring(rows, crossover)
        assert offspring.shape == (6, size, genes)
        assert (offspring.abs() <= 1).all()
        for row, count, children in zip(rows.tolist(), counts.tolist(), offspring, strict=True):
            own = parents[row, :count]
            # Every gene but one of a child is its parents'.
            inherited = (children[:, None] == own[None]).any(1)
            assert (inherited.sum(1) >= genes - 1).all()
        losses = torch.rand(6, size, generator=draw)
        populations.select(rows, offspring, losses, elite)
        kept = min(size, max(2, round(elite * size)))
        assert (populations._count[rows] == kept).all()
        parents = populations._parents.clone()
        best = losses.argsort(dim=1, descending=True)[:, :kept]
        for row, order, children in zip(rows.tolist(), best, offspring, strict=True):
            assert torch.equal(parents[row, :kept], children[order])


def test_crossover_takes_two_different_parents_at_one_point():
    populations = Populations(200, 6, 5, generator())
    parents = populations._parents.clone()
    children = populations.offspring(torch.arange(200), 1.0)
    owner = (children[:, :, None] == parents[:, None]).float()  # (200, child, parent, gene)
    assert (owner.sum(2) == 1).all()
    of_gene = owner.argmax(2)  # (200, child, gene)
    switches = (of_gene[..., 1:] != of_gene[..., :-1]).sum(-1)
    assert (switches == 1).all()
    points = (of_gene[..., 1:] != of_gene[..., :-1]).float().mean((0, 1))
    assert ((points - 0.25).abs() < 0.05).all()


def test_evolution_finds_harder_variants_than_as_many_random_ones(make_problem):
    problem = make_problem()
    images = problem.train
    fixer = SENSEI(population=10, rotation=30.0)
    rows, generations = torch.arange(len(images)), 6
    populations = Populations(len(images), 10, len(fixer.transformations.names), generator())
    history = []
    for _ in range(generations):
        chosen, worst = fixer._choose(problem.original, images, populations, rows, problem)
        history.append(worst.mean().item())
    random = SENSEI(population=10, rotation=30.0, search="worst")
    baseline = [random._choose(problem.original, images, populations, rows, problem)[1].mean().item() for _ in range(6)]
    assert history[-1] > history[0]
    assert sum(history[1:]) > 1.1 * sum(baseline[1:])
    assert len(chosen.unique(dim=0)) == len(images)


def test_one_chromosome_without_crossover_is_a_random_variant(make_problem, monkeypatch):
    fixer = SENSEI(**{**QUICK, "population": 1}, crossover=0.0, robust_below=0.0)
    calls = []
    monkeypatch.setattr(sensei, "variant_losses", lambda *arguments: calls.append(arguments))
    problem = make_problem()
    populations = Populations(2000, 1, 4, generator())
    images = problem.train.select(torch.arange(2000) % len(problem.train))
    for _ in range(3):
        chosen, _ = fixer._choose(problem.original, images, populations, torch.arange(2000), problem)
        # Uniform in its range, and no loss has a say in it.
        histogram = torch.stack([torch.histc(column, 4, -1, 1) for column in chosen.unbind(1)])
        assert ((histogram - 500).abs() < 100).all()
    baseline = SENSEI(**QUICK, search="random")
    drawn, _ = baseline._choose(problem.original, images, populations, torch.arange(2000), problem)
    histogram = torch.stack([torch.histc(column, 4, -1, 1) for column in drawn.unbind(1)])
    assert ((histogram - 500).abs() < 100).all()
    assert calls == []


# SENSEI-SA


def test_robust_images_are_skipped_and_no_others(make_problem, monkeypatch):
    threshold = 0.3
    problem = make_problem()
    # The rate is high, so that losses rise again, too.
    fixer = SENSEI(**{**QUICK, "epochs": 5, "learning_rate": 0.03}, robust_below=threshold)
    trained_on, forwards = [], []
    train, judge = sensei.training.train, sensei.variant_losses

    def remember(model, split, *arguments, loss, **options):
        seen = torch.full((len(split),), torch.nan)

        def spy(network, batch):
            with torch.no_grad():
                seen[batch.indices] = problem.task.loss(network(batch.inputs), batch.targets, "none")
            return loss(network, batch)

        mean = train(model, split, *arguments, loss=spy, **options)
        trained_on.append((split, seen))
        return mean

    def count(model, images, transformations, chromosomes, problem_):
        forwards.append(chromosomes.shape[0] * chromosomes.shape[1])
        return judge(model, images, transformations, chromosomes, problem_)

    monkeypatch.setattr(sensei.training, "train", remember)
    monkeypatch.setattr(sensei, "variant_losses", count)
    seen = watch(fixer, problem, monkeypatch)
    n = len(trained_on[0][1])
    robust = torch.zeros(n, dtype=torch.bool)
    skipped = resumed = 0
    originals = JoinedSplit([problem.train, problem.failures]).batch().inputs
    for (_, rows, _, _, worst), (split, losses) in zip(seen, trained_on[1:], strict=True):
        assert torch.equal(rows, (~robust).nonzero().squeeze(1))
        images = split.inputs(torch.arange(n), torch.device("cpu"))
        untouched = (images == originals).flatten(1).all(1)
        assert torch.equal(untouched, robust)
        skipped += int(robust.sum())
        robust[rows] = worst < threshold
        resumed += int((robust & (losses >= threshold)).sum())
        robust &= losses < threshold
    assert skipped > 0
    assert resumed > 0
    assert problem.notes["searches_skipped"] == skipped
    assert problem.notes["variants_judged"] == sum(forwards) == fixer.population * (4 * n - skipped)


def test_without_a_threshold_everything_is_searched(make_problem):
    problem = make_problem()
    fix(SENSEI(**QUICK, robust_below=0.0), problem)
    assert problem.notes["searches_skipped"] == 0
    assert problem.notes["variants_judged"] == 2 * 5 * (len(problem.train) + len(problem.failures))


# The point of it


def robust_accuracy(problem, model, split, transformations):
    """Share of images that are right under every combination of three values a gene."""
    right = torch.ones(len(split), dtype=torch.bool)
    for genes in itertools.product((-1.0, 0.0, 1.0), repeat=len(transformations.names)):
        variants = TransformedSplit(split, transformations, torch.tensor(genes).expand(len(split), -1))
        right &= ~problem.task.is_wrong(problem.outputs(model, variants), split.labels)
    return right.double().mean().item()


@pytest.fixture(scope="module")
def learned(digits, lenet):
    """A network trained on 600 digits. With the 150 of other tests robustness costs 1.5 points on clean images."""
    known = [digits["train"].batch(), digits["repair"].select(torch.arange(450)).batch()]
    given = {
        "train": TensorSplit(torch.cat([b.inputs for b in known]), torch.cat([b.targets for b in known])),
        "valid": digits["valid"],
        "repair": digits["repair"].select(torch.arange(450, 700)),
    }
    recipe = TrainingRecipe(learning_rate=3e-3, batch_size=32)

    def problem_of(seed):
        model = network.reinitialised(lenet, seed)
        problem = RepairProblem(model, **given, recipe=recipe, seed=seed)
        train(model, given["train"], problem, epochs=25, generator=generator(seed))
        return RepairProblem(model.eval(), **given, recipe=recipe, seed=seed)

    return problem_of


# How many images to train on was decided on three other divisions of the digits, where robustness costs 0.4 points on
# clean images, mean of three seeds (and with 150 images 1.6 points); the preset is as it is.
@pytest.mark.parametrize("seeds", [(0,), pytest.param(range(5), marks=pytest.mark.slow)], ids=["one", "five"])
def test_robust_accuracy_rises_and_clean_accuracy_stays_within_a_point(learned, digits, monkeypatch, seeds):
    """Against plain training on the same images, as long, from the same network; held-out images, mean of the seeds."""
    grid, test = Transformations(rotation=15.0), digits["held_out"]
    gained, lost = [], []
    for seed in seeds:
        problem = learned(seed)
        ours = fix(SENSEI.build({}, "quick"), problem)
        with monkeypatch.context() as patch:
            patch.setattr(TransformedSplit, "inputs", lambda self, indices, device: self._split.inputs(indices, device))
            plain = fix(SENSEI.build({"search": "random"}, "quick"), problem)
        gained.append(robust_accuracy(problem, ours, test, grid) - robust_accuracy(problem, plain, test, grid))
        lost.append(problem.score(plain, test) - problem.score(ours, test))
    print(gained, lost)
    assert sum(gained) / len(gained) > 0.1
    assert sum(lost) / len(lost) < 0.01


# Losses of variants


def test_losses_of_variants_dont_depend_on_the_micro_batch(make_problem):
    chromosomes = Populations(20, 7, 4, generator())._parents
    fixer = SENSEI(**QUICK)
    results = []
    for micro_batch in (512, 30, 3):
        problem = make_problem(micro_batch=micro_batch)
        images = problem.train.select(torch.arange(20))
        results.append(variant_losses(problem.original, images, fixer.transformations, chromosomes, problem))
    one = problem.train.select(torch.tensor([11])).batch()
    alone = problem.original(fixer.transformations(one.inputs, chromosomes[11, 4:5]))
    assert results[0][11, 4].item() == pytest.approx(problem.task.loss(alone, one.targets).item(), rel=1e-4)
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_is_never_the_worst(make_problem):
    problem = make_problem()
    model = problem.new_model()
    fixer = SENSEI(**QUICK)
    plain = model.forward
    model.forward = lambda x: plain(x).where(x.mean((1, 2, 3), keepdim=True)[:, :, 0, 0] > 0.3, torch.nan)
    chromosomes = Populations(30, 5, 4, generator())._parents
    losses = variant_losses(model, problem.train.select(torch.arange(30)), fixer.transformations, chromosomes, problem)
    assert not losses.isnan().any()
    assert (losses == -torch.inf).any()
    assert (losses > 0).any()


# The fixer


def test_the_best_epoch_on_valid_is_returned_and_the_first_is_no_candidate(make_problem, monkeypatch):
    scores = []
    problem = make_problem(on_progress=lambda step, figures: scores.append(figures.get("valid_score")))
    model = fix(SENSEI(**{**QUICK, "epochs": 4}), problem)
    scores = [score for score in scores if score is not None]
    assert len(scores) == 4
    assert problem.score(model, problem.valid) == max(scores[1:])


def test_the_failures_are_trained_on(make_problem, monkeypatch):
    problem = make_problem()
    sizes = []
    train = sensei.training.train
    monkeypatch.setattr(
        sensei.training, "train", lambda model, split, *a, **k: sizes.append(len(split)) or train(model, split, *a, **k)
    )
    fix(SENSEI(**QUICK), problem)
    assert sizes == [len(problem.train) + len(problem.failures)] * 3


def test_nothing_to_fix_returns_an_equal_model(make_problem):
    problem = make_problem()
    problem = make_problem(repair=problem.passes)
    model = fix(SENSEI(), problem)
    assert problem.notes["nothing_to_fix"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), problem.original.parameters(), strict=True))


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_the_same_seed_gives_the_same_bits(make_problem, request, name):
    original = request.getfixturevalue(name)
    before = copy.deepcopy(original.state_dict())

    def state(seed):
        return fix(SENSEI(**QUICK), make_problem(original, seed=seed)).state_dict()

    one, same, other = state(1), state(1), state(2)
    assert one.keys() == before.keys()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())


def test_a_traced_model_can_be_fixed(make_problem, lenet):
    model = fix(SENSEI(**QUICK), make_problem(network.as_graph(copy.deepcopy(lenet))))
    assert model.state_dict().keys() == lenet.state_dict().keys()


def test_deadline(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(SENSEI(**QUICK), make_problem(time_limit=-1.0))


def test_without_any_range_it_is_refused():
    with pytest.raises(ParameterError, match="every range is 0"):
        SENSEI(rotation=0.0, translation=0.0, shear=0.0)
    assert SENSEI(rotation=0.0, translation=0.0, shear=0.0, flip=True).transformations.names == ("flip",)


def test_it_is_registered():
    assert get("SENSEI") is SENSEI
    assert get("sensei").search_space()["population"] == (5, 10)
