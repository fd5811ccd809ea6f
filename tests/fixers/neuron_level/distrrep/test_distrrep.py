import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fixers import RepairProblem, TensorSplit, fix, get, network
from fixers.errors import DeadlineExceededError, FixFailedError, ParameterError, UnadaptableError
from fixers.network.places import Places
from fixers.neuron_level.distrrep.distrrep import DistrRep
from fixers.neuron_level.distrrep.merged_repairs import Kind, Mixture, Repair, RiskScore

FAST = {
    "min_types": 1, "min_examples": 1, "repairs": 6, "particles": 12, "iterations": 8, "merge_particles": 30,
    "merge_iterations": 12, "merge_steps": "small",
}  # fmt: skip


def repaired(indices, values):
    return Repair(Places(("0",), (torch.tensor(indices),)), torch.tensor(values), 0.0)


def layer(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3))


def errors(problem, model, kind):
    outputs = problem.outputs(model, problem.repair)
    labels = problem.repair.labels
    wrong = problem.task.is_wrong(outputs, labels) & (labels == kind.label)
    if kind.predicted is not None:
        wrong &= problem.task.predict(outputs) == kind.predicted
    return int(wrong.sum()), int((labels == kind.label).sum())


def definition(problem, model, kinds, penalty):
    whole = [kind for kind in kinds if kind.predicted is None]
    total = sum(kind.risk for kind in kinds)
    score = 0.0
    for kind in kinds:
        wrong, size = errors(problem, model, kind)
        score -= penalty * kind.risk / total * wrong / size
        if kind.predicted is None:
            score += (1 - wrong / size) / len(whole)
    return score


@pytest.fixture(scope="module")
def repairs(digits, lenet):
    """A problem, its kinds of failures and their repairs; shared by the tests that only look at them."""
    problem = RepairProblem(lenet, **{name: digits[name] for name in ("train", "valid", "repair")})
    fixer = DistrRep(**FAST)
    kinds = fixer.kinds(problem)
    return problem, kinds, [fixer.repair(problem, kind) for kind in kinds]


# Merging


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), size=st.integers(1, 6))
def test_no_coefficient_is_the_original_and_one_alone_is_that_repair(seed, count, size):
    model, generator = layer(seed), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        indices = torch.randperm(12, generator=generator)[:size].sort().values.tolist()
        found.append(repaired(indices, (2 * torch.randn(size, generator=generator)).tolist()))
    mixture = Mixture(model, found)
    original = mixture.places.read(model)
    values = mixture.values(mixture.seeds).float()
    assert torch.equal(values[0], original)
    everywhere = mixture.places.indices[0]
    for repair, merged in zip(found, values[1:], strict=True):
        expected = original.clone()
        expected[torch.searchsorted(everywhere, repair.places.indices[0])] = repair.values
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-9)
        counts = torch.cat([one.places.indices[0] for one in found]).bincount(minlength=12)[everywhere]
        assert torch.equal(merged[counts == 1], expected[counts == 1])
    # Whatever the coefficients, no value leaves the hull of the original's and the repairs'.
    coefficients = torch.rand(8, mixture.n_coefficients, generator=torch.Generator().manual_seed(0)).double()
    merged = mixture.values(coefficients)
    assert (merged >= values.amin(0) - 1e-5).all()
    assert (merged <= values.amax(0) + 1e-5).all()


def test_no_coefficient_leaves_the_model_as_it_is_bit_for_bit(repairs):
    problem, _, found = repairs
    mixture = Mixture(problem.original, found)
    assert mixture.n_shared > 0
    model = problem.new_model()
    mixture.places.write(model, mixture.values(mixture.seeds[:1])[0])
    for key, value in problem.original.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_a_shared_weight_has_its_own_coefficient():
    model = layer()
    with torch.no_grad():
        model[0].weight.view(-1)[5] = 0.0
    mixture = Mixture(model, [repaired([2, 5], [7.0, -1.0]), repaired([5, 8], [1.0, 9.0])])
    assert (mixture.n_shared, mixture.n_coefficients) == (1, 3)
    coefficients = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.25], [0.3, 0.9, 1.0]], dtype=torch.float64)
    merged = mixture.values(coefficients)
    assert merged[:, 1].tolist() == [-1.0, -0.5, 1.0]
    assert merged[1, [0, 2]].tolist() == [7.0, 9.0]
    first, last = model[0].weight.detach().view(-1)[[2, 8]].double().tolist()
    assert merged[0, [0, 2]].tolist() == [first, last]
    assert merged[2, 0].item() == pytest.approx(first + 0.3 * (7 - first))
    assert merged[2, 2].item() == pytest.approx(last + 0.9 * (9 - last))


def test_a_tiny_original_between_large_repairs_is_not_rounded_away():
    model = layer()
    with torch.no_grad():
        model[0].weight.view(-1)[5] = 1e-20
    mixture = Mixture(model, [repaired([5], [-1.0]), repaired([5], [1.0])])
    assert torch.equal(mixture.values(mixture.seeds[:1])[0].float(), mixture.places.read(model))


def test_low_to_high_is_the_public_codes_form():
    model = layer()
    with torch.no_grad():
        model[0].weight.view(-1)[[2, 8]] = torch.tensor([1.0, 1.0])
    mixture = Mixture(model, [repaired([2], [-4.0]), repaired([8], [3.0])], low_to_high=True)
    merged = mixture.values(torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    assert merged.tolist() == [[-4.0, 1.0], [1.0, 3.0]]
    assert len(mixture.seeds) == 0


def test_the_score_is_its_definition(repairs):
    problem, kinds, found = repairs
    mixture = Mixture(problem.original, found)
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.rand(6, mixture.n_coefficients, generator=generator).double()
    values = mixture.values(torch.cat([mixture.seeds, coefficients]))
    score = RiskScore(problem, mixture.places, kinds, 0.5)
    got = score(values)
    for value, figure in zip(values, got.tolist(), strict=True):
        model = problem.new_model()
        mixture.places.write(model, value)
        assert figure == pytest.approx(definition(problem, model, kinds, 0.5), abs=1e-9)
    assert got.unique().numel() > 4
    assert score.highest == 1.0
    assert RiskScore(problem, mixture.places, [kinds[0]], 0.5).highest == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_the_merged_score_is_no_lower_than_the_originals_and_any_repairs(make_problem, seed):
    problem = make_problem(seed=seed)
    fixer = DistrRep(**FAST, selection="score")
    model = fix(fixer, problem)
    kinds = fixer.kinds(problem)
    alone = []
    for repair in [fixer.repair(problem, kind) for kind in kinds]:
        single = problem.new_model()
        repair.places.write(single, repair.values)
        alone.append(definition(problem, single, kinds, fixer.penalty))
    merged = definition(problem, model, kinds, fixer.penalty)
    assert merged >= max([definition(problem, problem.original, kinds, fixer.penalty), *alone]) - 1e-9
    assert merged == pytest.approx(problem.notes["score"], abs=1e-9)
    # Not just the best of the seeds: the search itself finds more.
    assert merged > max(alone)


def test_the_original_and_each_repair_alone_are_particles(make_problem):
    problem = make_problem()
    fixer = DistrRep(**{**FAST, "merge_particles": 1, "merge_iterations": 0}, selection="score")
    fix(fixer, problem)
    kinds = fixer.kinds(problem)
    scores = [definition(problem, problem.original, kinds, fixer.penalty)]
    for repair in [fixer.repair(problem, kind) for kind in kinds]:
        single = problem.new_model()
        repair.places.write(single, repair.values)
        scores.append(definition(problem, single, kinds, fixer.penalty))
    assert problem.notes["score"] == pytest.approx(max(scores), abs=1e-9)


def test_risk_steers(make_problem):
    plain, steered = [], []
    for seed in range(5):
        problem = make_problem(seed=seed)
        kind = next(kind for kind in DistrRep(**FAST).kinds(problem) if kind.predicted is not None)
        for factors, into in (("", plain), (f"{kind}=10", steered)):
            fixer = DistrRep(**FAST, selection="score", risk="uniform", risk_factors=factors)
            into.append(errors(problem, fix(fixer, problem), kind)[0])
    assert sum(steered) < sum(plain)


# Kinds


def test_kinds_are_the_riskiest_pairs_and_classes(make_problem):
    problem = make_problem()
    labels = problem.failures.labels.tolist()
    predicted = problem.task.predict(problem.outputs(problem.original, problem.failures)).tolist()
    pairs = list(zip(labels, predicted, strict=True))
    kinds = DistrRep(min_types=1, min_examples=2, repairs=8, class_share=0.5).kinds(problem)
    assert [kind.predicted is None for kind in kinds] == [False] * 4 + [True] * 4
    for kind in kinds:
        key, population = (kind.label, labels) if kind.predicted is None else ((kind.label, kind.predicted), pairs)
        assert len(kind.rows) == population.count(key)
        assert kind.risk == pytest.approx(population.count(key) / len(labels))
        assert [population[row] for row in kind.rows.tolist()] == [key] * len(kind.rows)
    counts = sorted((pairs.count(pair) for pair in set(pairs)), reverse=True)
    assert [len(kind.rows) for kind in kinds[:4]] == counts[:4]
    rare = min(set(pairs), key=lambda pair: (pairs.count(pair), pair))
    lifted = DistrRep(min_types=1, min_examples=1, risk_factors=f"{rare[0]}>{rare[1]}=1000").kinds(problem)
    assert (lifted[0].label, lifted[0].predicted) == rare


def test_too_few_kinds_are_unadaptable_with_their_number(digits):
    halves = {name: TensorSplit(digits[name].batch().inputs, digits[name].labels % 2) for name in digits}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    problem = RepairProblem(model, **{name: halves[name] for name in ("train", "valid", "repair")})
    with pytest.raises(UnadaptableError, match=r"8 kinds of misclassification .* has [12];"):
        fix(DistrRep(), problem)


def test_kinds_with_few_failures_dont_count(make_problem):
    problem = make_problem()
    with pytest.raises(UnadaptableError, match="at least 1000 failures each, and the repair split has 0;"):
        fix(DistrRep(min_examples=1000, min_types=1), problem)


@pytest.mark.parametrize("text", ["3", "3>5", "a=1", "3>5=-1", "3=1;4=2", "3>5=1e400"])
def test_risk_factors_that_cant_be_read_are_refused(text):
    with pytest.raises(ParameterError, match="write label>predicted=factor"):
        DistrRep(risk_factors=text)


def test_risk_factors_apply_to_what_they_name(make_problem):
    problem = make_problem()
    before = {str(kind): kind.risk for kind in DistrRep(**FAST).kinds(problem)}
    pair, whole = next(iter(before)), next(name for name in before if ">" not in name)
    fixer = DistrRep(**FAST, risk_factors=f" {pair} = 3 , {whole}=0.5")
    after = {str(kind): kind.risk for kind in fixer.kinds(problem)}
    assert after[pair] == pytest.approx(3 * before[pair])
    if whole in after:
        assert after[whole] == pytest.approx(0.5 * before[whole])
    assert {kind.risk for kind in DistrRep(**FAST, risk="uniform").kinds(problem)} == {1.0}


# Repairs and the whole


def test_a_repair_depends_on_its_kind_alone(repairs, digits, lenet):
    _, kinds, found = repairs
    fresh = RepairProblem(lenet, **{name: digits[name] for name in ("train", "valid", "repair")})
    for kind, repair in list(zip(kinds, found, strict=True))[::-3]:
        alone = DistrRep(**FAST).repair(fresh, kind)
        assert alone.places.layers == repair.places.layers
        assert torch.equal(alone.places.indices[0], repair.places.indices[0])
        assert torch.equal(alone.values, repair.values)


def test_a_repair_reduces_its_kind_of_failure(repairs):
    problem, kinds, found = repairs
    before, after = 0, 0
    for kind, repair in zip(kinds, found, strict=True):
        model = problem.new_model()
        repair.places.write(model, repair.values)
        before += len(kind.rows)
        after += errors(problem, model, kind)[0]
    assert after < 0.9 * before


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_only_the_union_of_the_repairs_changes(make_problem, request, name):
    problem = make_problem(request.getfixturevalue(name))
    before = copy.deepcopy(problem.original.state_dict())
    fixer = DistrRep(**FAST, selection="score")
    model = fix(fixer, problem)
    found = [fixer.repair(problem, kind) for kind in fixer.kinds(problem)]
    [last] = {repair.places.layers for repair in found}
    union = torch.cat([repair.places.indices[0] for repair in found]).unique()
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [f"{last[0]}.weight"]
    where = (before[changed[0]] != after[changed[0]]).flatten().nonzero().squeeze(1)
    assert torch.isin(where, union).all()
    assert problem.notes["localised_weights"] == len(union)
    assert all(torch.equal(before[key], value) for key, value in problem.original.state_dict().items())


def test_selection_on_valid_is_never_less_accurate_there_than_the_original(make_problem):
    for seed in range(3):
        problem = make_problem(seed=seed)
        model = fix(DistrRep(**FAST), problem)
        assert problem.score(model, problem.valid) >= problem.score(problem.original, problem.valid)


@pytest.mark.parametrize("options", [{"mixing": "low_to_high"}, {"merge_steps": "wide"}, {"class_share": 0.0}])
@pytest.mark.parametrize("selection", ["valid", "score"])
def test_the_published_variants_run(make_problem, options, selection):
    problem = make_problem()
    model = fix(DistrRep(**{**FAST, **options, "selection": selection}), problem)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if selection == "score":
        assert problem.notes["score"] >= problem.notes["score_original"]


def test_nothing_to_fix_returns_an_equal_model(make_problem):
    problem = make_problem()
    problem = make_problem(repair=problem.passes)
    model = fix(DistrRep(), problem)
    assert problem.notes["nothing_to_fix"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), problem.original.parameters(), strict=True))


def test_a_model_without_gradients_is_a_failure_with_a_reason(make_problem):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Hardtanh(1e6, 2e6))
    with pytest.raises(FixFailedError, match="every gradient"):
        fix(DistrRep(**FAST), make_problem(model))


def test_the_same_seed_gives_the_same_bits(make_problem):
    def weights(seed):
        return fix(DistrRep(**FAST, selection="score"), make_problem(seed=seed)).classifier[5].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_smaller_micro_batch_gives_the_same_scores(repairs, digits, lenet):
    problem, kinds, found = repairs
    small = RepairProblem(lenet, **{name: digits[name] for name in ("train", "valid", "repair")}, micro_batch=16)
    mixture = Mixture(problem.original, found)
    one, other = (
        RiskScore(each, mixture.places, kinds, 0.5)(mixture.values(mixture.seeds)) for each in (problem, small)
    )
    assert torch.allclose(one, other)


def test_a_traced_model_can_be_fixed(make_problem, lenet):
    model = fix(DistrRep(**FAST), make_problem(network.as_graph(copy.deepcopy(lenet))))
    assert model.state_dict().keys() == lenet.state_dict().keys()


def test_progress_and_deadline(make_problem):
    steps = []
    problem = make_problem(on_progress=lambda step, metrics: steps.append((step, dict(metrics))))
    fix(DistrRep(**FAST), problem)
    repairs = [step for step, metrics in steps if "repair_fitness" in metrics]
    scores = [metrics["score"] for _, metrics in steps if "score" in metrics]
    assert repairs == list(range(1, len(repairs) + 1))
    assert len(repairs) >= 2
    assert scores == sorted(scores)
    with pytest.raises(DeadlineExceededError):
        fix(DistrRep(**FAST), make_problem(time_limit=-1.0))


def test_a_kind_is_named():
    assert str(Kind(3, 5, torch.tensor([0]), 1.0)) == "3>5"
    assert str(Kind(3, None, torch.tensor([0]), 1.0)) == "3"


def test_it_is_registered():
    assert get("DTR") is DistrRep
    assert get("distrrep").search_space()["repairs"] == (4, 8, 12)
