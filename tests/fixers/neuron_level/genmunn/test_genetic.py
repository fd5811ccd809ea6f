import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fixers.neuron_level.genmunn.genetic import GeneticSettings, evolve


def gaussian(positions, values, generator):
    return values + 0.5 * torch.randn(len(values), generator=generator)


def run(fitness, dimensions=40, *, seed=0, mutate=gaussian, on_generation=None, **options):
    settings = GeneticSettings(**{"population": 20, "generations": 30, "mutations": 2, **options})
    generator = torch.Generator().manual_seed(seed)
    return evolve(fitness, torch.zeros(dimensions), mutate, settings, generator=generator, on_generation=on_generation)


def whole(mutants, dimensions=40):
    """The individuals as full vectors (P, D)."""
    vectors = torch.zeros(len(mutants), dimensions)
    vectors[:, mutants.positions] = torch.where(mutants.mutated, mutants.values, 0.0)
    return vectors


def near(target):
    return lambda mutants: -(whole(mutants, len(target)) - target).square().sum(1)


TARGET = torch.zeros(40).index_put((torch.tensor([0, 2, 5]),), torch.tensor([2.0, -1.0, 1.5]))


def test_it_finds_a_target_that_random_mutants_of_the_same_number_miss():
    for seed in range(3):
        result = run(near(TARGET), seed=seed, generations=60)
        drawn = run(near(TARGET), seed=seed, generations=1, population=result.evaluations)
        assert result.fitness > -0.5 > drawn.fitness
        assert result.fitness > 0.2 * drawn.fitness


def test_crossover_joins_what_several_parents_found():
    changed = []

    def judge(people):
        changed.append((whole(people) != 0).sum(1))
        return changed[-1]

    def once(positions, values, generator):
        return torch.ones(len(positions)) if len(changed) == 1 else values

    # Mutations that do something are over after the first generation, in which nobody has more than one.
    result = run(judge, mutate=once, mutations=1, generations=12)
    assert changed[1].max() == 1
    assert result.fitness >= 3


def test_a_child_takes_every_changed_position_after_one_parent():
    generations = []

    def judge(people):
        generations.append(people)
        return torch.rand(len(people), generator=torch.Generator().manual_seed(len(generations)))

    marks = itertools.count(1)

    def mark(positions, values, generator):
        return torch.full((len(positions),), float(next(marks)))

    run(judge, mutate=mark, generations=8)
    known = {0.0}
    for number, people in enumerate(generations):
        now = set(whole(people).unique().tolist())
        # Nothing but what some parent had, and the mutations of this generation.
        assert now <= known | {float(number)}
        known |= now


def test_mutated_positions_follow_their_rank():
    counts = torch.zeros(40)

    def count(positions, values, generator):
        counts.index_add_(0, positions, torch.ones(len(positions)))
        return values

    run(lambda people: torch.zeros(len(people)), mutate=count, generations=100, mutations=5)
    assert stats.spearmanr(torch.arange(40), counts).statistic < -0.9
    # A position that is drawn twice for an individual counts once, so the first ranks get a little less than 1 / rank.
    assert 0.35 < counts[2] / counts[0] < 0.6
    assert counts[-1] > 0


@pytest.mark.parametrize("mean", [1, 4])
def test_the_number_of_mutations_is_geometric(mean):
    sizes = []

    def judge(people):
        sizes.extend(people.mutated.sum(1).tolist())
        return torch.zeros(len(people))

    run(judge, 20_000, mutations=mean, population=1501, generations=1)
    # So few meet twice among so many positions (the first rank has 10 %) that the mean is almost kept.
    first = torch.tensor(sizes[1:], dtype=torch.float64)
    assert first.mean() == pytest.approx(mean, rel=0.1)
    assert (first == 1).double().mean() == pytest.approx(1 / mean, abs=0.05)
    assert first.max() == 1 if mean == 1 else first.max() > 12


def test_the_best_survives_and_the_fitness_never_falls():
    states = []
    result = run(near(TARGET), on_generation=states.append)
    assert [state.number for state in states] == list(range(31))
    assert [state.evaluations for state in states] == [1 + 19 * i for i in range(31)]
    assert all(later.fitness >= earlier.fitness for earlier, later in itertools.pairwise(states))
    for state in states:
        assert near(TARGET)(state.best).item() == pytest.approx(state.fitness, abs=1e-6)
        assert len(state.best) == 1
        assert state.best.mutated.all(), "nothing but what the individual changes"
    assert (result.number, result.stopped) == (30, "generations")
    assert len(states[0].best.positions) == 0


def test_a_deceptive_fitness_keeps_the_origin():
    result = run(lambda people: -people.mutated.sum(1).double() if len(people.positions) else torch.zeros(len(people)))
    assert result.fitness == 0.0
    assert len(result.best.positions) == 0


def test_stops():
    def flat(people):
        return torch.zeros(len(people))

    result = run(flat, patience=7)
    assert (result.stopped, result.number) == ("stagnation", 7)
    result = run(flat, goal=0.0)
    assert (result.stopped, result.number, result.evaluations) == ("goal", 0, 1)
    result = run(flat, generations=0)
    assert (result.stopped, result.number, result.evaluations) == ("generations", 0, 1)


def test_nan_is_the_worst_fitness():
    result = run(lambda people: torch.where(people.mutated.any(1), torch.nan, 0.0))
    assert result.fitness == 0.0
    result = run(lambda people: torch.where(people.mutated.any(1), whole(people).sum(1), torch.nan))
    assert result.fitness > 0.0


def test_same_seed_same_search():
    one, same, other = (run(near(TARGET), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.best.values, same.best.values)
    assert torch.equal(one.best.positions, same.best.positions)
    assert one.fitness != other.fitness


@settings(max_examples=30, deadline=None)
@given(
    population=st.integers(2, 6),
    dimensions=st.integers(1, 5),
    mutations=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_individuals_keep_their_form(population, dimensions, mutations, seed):
    origin = torch.arange(1.0, dimensions + 1)

    def judge(people):
        assert len(people) in (1, population - 1)
        assert people.mutated.shape == people.values.shape == (len(people), len(people.positions))
        assert torch.equal(people.positions, people.positions.unique())
        assert people.mutated.any(0).all()
        assert ((people.positions >= 0) & (people.positions < dimensions)).all()
        untouched = origin[people.positions].expand_as(people.values)[~people.mutated]
        assert torch.equal(people.values[~people.mutated], untouched)
        return people.values.sum(1)

    evolve(
        judge,
        origin,
        gaussian,
        GeneticSettings(population=population, generations=4, mutations=mutations),
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("wrong", [{"population": 1}, {"mutations": 0.5}, {"dimensions": 0}])
def test_what_cannot_be_searched_is_refused(wrong):
    with pytest.raises(ValueError, match="needs 2 individuals"):
        run(lambda people: torch.zeros(len(people)), **wrong)
