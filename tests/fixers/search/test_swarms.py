import itertools
import math

import pytest
import torch

from fixers.search.swarms import (
    EvolutionSettings,
    InertiaSettings,
    SwarmSettings,
    constriction,
    differential_evolution,
    inertia_swarm,
    particle_swarm,
)


def sphere(x):
    return -(x**2).sum(1)


def rosenbrock(x):
    return -(100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def rastrigin(x):
    return -(10 + x**2 - 10 * torch.cos(2 * math.pi * x)).sum(1)


def run(method, fitness, dimensions, *, generations=300, size=40, seed=0, on_generation=None, **options):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(size, dimensions, generator=generator) * 8 - 3
    bounds = {"low": torch.full((dimensions,), -5.0), "high": torch.full((dimensions,), 5.0)}
    settings = settings_of(method, **{**bounds, "generations": generations, **options})
    return method(fitness, start, settings, generator=generator, on_generation=on_generation)


def settings_of(method, *, low, high, **options):
    """The box is for differential evolution."""
    if method is differential_evolution:
        return EvolutionSettings(low=low, high=high, **options)
    return SwarmSettings(**options)


METHODS = [differential_evolution, particle_swarm]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fitness", "dimensions", "optimum", "close"), [(sphere, 6, 0.0, 1e-4), (rosenbrock, 3, 1.0, 1e-3)]
)
def test_smooth_functions_are_solved(method, fitness, dimensions, optimum, close):
    for seed in range(3):
        result = run(method, fitness, dimensions, seed=seed)
        assert result.fitness > -close
        torch.testing.assert_close(result.best, torch.full((dimensions,), optimum), atol=0.1, rtol=0)


def test_differential_evolution_leaves_the_local_optima_of_rastrigin():
    # 11^3 local optima lie in the box; the second best has fitness -0.995.
    assert sum(run(differential_evolution, rastrigin, 3, seed=seed).fitness > -0.5 for seed in range(5)) >= 4


@pytest.mark.parametrize("method", METHODS)
def test_search_beats_random_draws_of_the_same_number(method):
    result = run(method, sphere, 6, generations=50)
    drawn = torch.rand(result.evaluations, 6, generator=torch.Generator().manual_seed(9)) * 8 - 3
    assert result.fitness > 0.1 * sphere(drawn).max()


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_search(method):
    one, same, other = (run(method, rastrigin, 4, generations=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.best, same.best)
    assert not torch.equal(one.best, other.best)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_never_gets_worse_and_belongs_to_its_fitness(method):
    states = []
    result = run(method, rastrigin, 4, generations=30, on_generation=states.append)
    assert [state.generation for state in states] == list(range(31))
    assert all(later.fitness >= earlier.fitness for earlier, later in itertools.pairwise(states))
    for state in states:
        assert rastrigin(state.best[None]).item() == pytest.approx(state.fitness, abs=1e-5)
    assert (result.generation, result.evaluations, result.stopped) == (30, 40 * 31, "generations")


@pytest.mark.parametrize("method", METHODS)
def test_no_generations_gives_the_best_of_the_first_population(method):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(9, 3, generator=generator)
    settings = settings_of(method, low=start.amin(0), high=start.amax(0), generations=0)
    result = method(sphere, start, settings, generator=generator)
    assert torch.equal(result.best, start[sphere(start).argmax()])


@pytest.mark.parametrize("method", METHODS)
def test_stagnation_stops_after_patience(method):
    calls = []

    def flat(x):
        calls.append(len(x))
        return torch.zeros(len(x))

    result = run(method, flat, 3, generations=50, patience=7)
    assert (result.stopped, result.generation, len(calls)) == ("stagnation", 7, 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_gain_below_single_precision_is_no_progress(method):
    ticks = []

    def crawling(x):
        ticks.append(1)
        return torch.full((len(x),), 1000.0, dtype=torch.float64) + 1e-9 * len(ticks)

    assert run(method, crawling, 3, generations=50, patience=5).generation == 5


@pytest.mark.parametrize("method", METHODS)
def test_the_goal_stops_the_search(method):
    result = run(method, sphere, 3, goal=-0.01)
    assert result.stopped == "goal"
    assert result.fitness >= -0.01
    assert result.generation < 300


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_the_worst_fitness(method):
    def partly_nan(x):
        return torch.where(x[:, 0] > 0, torch.nan, sphere(x))

    result = run(method, partly_nan, 2, generations=40)
    assert result.best[0] <= 0
    assert math.isfinite(result.fitness)


def test_trials_stay_inside_the_bounds_and_take_at_least_one_element():
    low, high = torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([1.0, 0.7, 3.0])
    seen = []

    def watch(x):
        seen.append(x.clone())
        return -x.sum(1)

    generator = torch.Generator().manual_seed(0)
    start = low + (high - low) * torch.rand(20, 3, generator=generator)
    settings = EvolutionSettings(low=low, high=high, generations=30, crossover=0.0)
    differential_evolution(watch, start, settings, generator=generator)
    assert all(((x >= low) & (x <= high)).all() for x in seen)
    # With crossover 0 only the forced element comes from the mutant: exactly one may differ from the individual.
    changed = (seen[1] != seen[0]).sum(1)
    assert changed.max() == 1
    assert (changed == 1).sum() >= 15


def test_mutants_are_made_of_three_other_individuals():
    # Powers of four as individuals: a + F (b - c) with F = 1 tells which three were used.
    start = (4.0 ** torch.arange(8, dtype=torch.float64))[:, None]
    seen = []

    def watch(x):
        seen.append(x.clone())
        return torch.zeros(len(x))

    differential_evolution(
        watch,
        start,
        EvolutionSettings(
            low=torch.tensor([-1e9], dtype=torch.float64),
            high=torch.tensor([1e9], dtype=torch.float64),
            generations=1,
            mutation=(1.0, 1.0),
        ),
        generator=torch.Generator().manual_seed(0),
    )
    for i, trial in enumerate(seen[1][:, 0].tolist()):
        others = [k for k in range(8) if k != i]
        sums = {4.0**a + 4.0**b - 4.0**c for a in others for b in others for c in others if len({a, b, c}) == 3}
        assert trial in sums


def test_the_constriction_factor_is_the_published_one():
    assert constriction(4.1) == pytest.approx(0.7298, abs=5e-5)


def test_moves_follow_the_equations_particle_by_particle():
    seen = []

    def watch(x):
        seen.append(x.clone())
        return rastrigin(x)

    start = torch.randn(5, 2, generator=torch.Generator().manual_seed(3)).double()
    particle_swarm(watch, start, SwarmSettings(generations=12), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    positions, velocities, own = list(start), [torch.zeros(2).double() for _ in start], list(start)
    for after in seen[1:]:
        draws = 2.05 * torch.rand(2, 5, 1, generator=generator, dtype=torch.float64)
        best = max(own, key=lambda x: rastrigin(x[None]).item())
        for i, position in enumerate(positions):
            pull = draws[0, i] * (own[i] - position) + draws[1, i] * (best - position)
            velocities[i] = constriction(4.1) * (velocities[i] + pull)
            positions[i] = position + velocities[i]
            if rastrigin(positions[i][None]) > rastrigin(own[i][None]):
                own[i] = positions[i]
        torch.testing.assert_close(after, torch.stack(positions))


def test_speeds_stay_in_their_range_and_the_first_move_is_downwards():
    seen = []

    def watch(x):
        seen.append(x.clone())
        return sphere(x)

    slowest, fastest = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 3.0])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10, 2, generator=generator).double()
    settings = SwarmSettings(generations=20, slowest=slowest, fastest=fastest)
    particle_swarm(watch, start, settings, generator=generator)
    for before, after in itertools.pairwise(seen):
        speed = (after - before).abs()
        assert ((speed >= slowest - 1e-6) & (speed <= fastest + 1e-6)).all()
    # The particle that is the swarm's best is attracted by nothing; at rest it is set off downwards at least speed.
    best = sphere(start).argmax()
    torch.testing.assert_close(seen[1][best], start[best] - slowest.double(), atol=1e-6, rtol=0)


def test_impossible_populations_are_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="4 individuals"):
        settings = EvolutionSettings(low=torch.zeros(2), high=torch.ones(2), generations=1)
        differential_evolution(sphere, torch.zeros(3, 2), settings, generator=generator)
    with pytest.raises(ValueError, match="phi above 4"):
        particle_swarm(sphere, torch.zeros(3, 2), SwarmSettings(generations=1, phi=4.0), generator=generator)


def swarm(fitness, dimensions, *, generations=200, size=30, seed=0, start=1.0, bound=5.0, **options):
    options = {"inertia": 0.8, "to_own": 0.41, "to_best": 0.41, **options}
    bounds = torch.full((dimensions,), bound)
    generator = torch.Generator().manual_seed(seed)
    settings = InertiaSettings(low=-bounds, high=bounds, generations=generations, **options)
    return inertia_swarm(fitness, torch.full((size, dimensions), start), settings, generator=generator)


def test_a_swarm_with_inertia_leaves_the_point_it_starts_in():
    for seed in range(3):
        assert swarm(sphere, 4, seed=seed).fitness > -1e-4


def test_inertia_and_pulls_are_what_moves_it():
    seen = []

    def watch(x):
        seen.append(x.clone())
        return sphere(x)

    swarm(watch, 3, generations=4, size=5, inertia=0.5, to_own=0.0, to_best=0.0)
    first = seen[1] - seen[0]
    assert (seen[0] == 1).all()
    # Without pulls a particle coasts: every move is the inertia times the one before.
    torch.testing.assert_close(seen[2] - seen[1], 0.5 * first)
    # Unlike in the other swarm each element has a velocity of its own from the start.
    assert len(first.unique()) == 15
    seen.clear()
    swarm(watch, 3, generations=2, size=5, inertia=0.0, to_own=0.0, to_best=1.0)
    best = seen[1][sphere(seen[1]).argmax()] if sphere(seen[1]).max() > sphere(seen[0]).max() else seen[0][0]
    between = (seen[2] - seen[1]) / (best - seen[1])
    inside = between[(best - seen[1]).abs() > 1e-6]
    assert ((inside >= 0) & (inside <= 1)).all()


def test_what_leaves_the_box_comes_back_on_the_other_side():
    seen = []

    def watch(x):
        seen.append(x.clone())
        return x.sum(1)

    swarm(watch, 2, generations=30, inertia=1.2, bound=2.0)
    everything = torch.cat(seen)
    assert ((everything >= -2) & (everything <= 2)).all()
    assert (seen[-1] < 0).any()


def test_small_gains_are_no_progress_beyond_the_tolerance():
    calls = itertools.count()

    def creeping(x):
        return torch.full((len(x),), 1e-4 * next(calls))

    assert swarm(creeping, 2, patience=10, tolerance=1e-3).generation == 10
    assert swarm(creeping, 2, patience=10, generations=40).generation == 40
    with pytest.raises(ValueError, match="particles"):
        swarm(sphere, 0)
