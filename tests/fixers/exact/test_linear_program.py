import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

from fixers import FixFailedError
from fixers.exact.linear_program import Limits, LinearProgram, Method, Solver, Status, check_size, no_rows, solve
from fixers.exact.minimal_change import L1, LINF, ChangeProgram, Norm, conflicting_groups, minimal_change
from fixers.exact.weight_rows import LayerRows, MatrixRows

MIXED = Norm(l1=0.01, linf=1.0)


def last_layer(seed, points=20, width=12, classes=5, margin=0.05):
    """All points misclassified; a near-by teacher layer gives the labels, so that a small change exists."""
    rng = np.random.default_rng(seed)
    inputs = np.maximum(rng.normal(size=(points, width)), 0.0)
    inputs = np.hstack([inputs, np.ones((points, 1))])
    weights = rng.normal(size=(classes, width + 1)) / math.sqrt(width)
    teacher = weights + 0.5 * rng.normal(size=weights.shape) / math.sqrt(width)
    outputs, labels = inputs @ weights.T, (inputs @ teacher.T).argmax(1)
    left, point, bound = [], [], []
    for i, label in enumerate(labels):
        for rival in range(classes):
            if rival != label:
                row = np.zeros(classes)
                row[label], row[rival] = 1.0, -1.0
                left.append(row)
                point.append(i)
                bound.append(outputs[i, rival] - outputs[i, label] + margin)
    return LayerRows(sparse.csr_array(np.array(left)), np.array(point), inputs, np.array(bound))


def dense(rows):
    """The rows as they would be written down by hand."""
    left = rows.left.toarray()
    matrix = np.stack([np.outer(a, rows.inputs[p]).ravel() for a, p in zip(left, rows.point, strict=True)])
    return MatrixRows(sparse.csr_array(matrix), rows.bound, rows.point)


def oracle(matrix, bound, norm):
    """Optimum by scipy: x = p - q, p + q <= t."""
    m, n = matrix.shape
    cost = np.concatenate([np.full(2 * n, norm.l1), [norm.linf]])
    rows = np.block(
        [[-matrix, matrix, np.zeros((m, 1))], [np.eye(n), np.eye(n), -np.ones((n, 1))]],
    )
    found = linprog(cost, A_ub=rows, b_ub=np.concatenate([-bound, np.zeros(n)]), method="highs")
    return found.fun if found.status == 0 else None


@pytest.mark.parametrize("norm", [L1, LINF, MIXED], ids=["l1", "linf", "mixed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_simplex_interior_point_and_scipy_agree(norm, seed):
    rows = last_layer(seed)
    expected = oracle(dense(rows).matrix.toarray(), rows.bound, norm)
    for method in (Method.DUAL_SIMPLEX, Method.INTERIOR_POINT):
        change = minimal_change(rows, norm, method=method)
        assert change.is_optimal
        assert change.size == pytest.approx(expected, rel=1e-6)
        assert norm.of(change.values) == pytest.approx(change.size, abs=1e-12)
        assert (rows.values(change.values) >= rows.bound - 1e-7).all()


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_duals_are_the_sensitivity_of_the_optimum(seed):
    rows = last_layer(seed, points=6)
    change = minimal_change(rows, LINF)
    # Strong duality of a homogeneous objective: the optimum is the bounds weighted by the duals.
    assert (change.duals >= -1e-7).all()
    assert change.duals @ rows.bound == pytest.approx(change.size, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("norm", [L1, LINF, MIXED], ids=["l1", "linf", "mixed"])
def test_nothing_changes_where_nothing_is_violated(norm):
    rows = last_layer(0)
    rows = LayerRows(rows.left, rows.point, rows.inputs, -np.abs(rows.bound))
    change = minimal_change(rows, norm)
    assert change.is_optimal
    assert change.rounds == 0
    assert not change.values.any()
    assert change.size == 0.0


@pytest.mark.parametrize("norm", [L1, LINF, MIXED], ids=["l1", "linf", "mixed"])
def test_contradictions_are_infeasible_and_never_a_vector(norm):
    matrix = sparse.csr_array(np.array([[1.0, 2.0], [-1.0, -2.0]]))
    change = minimal_change(MatrixRows(matrix, np.array([1.0, 1.0]), np.arange(2)), norm)
    assert change.status is Status.INFEASIBLE
    assert change.values.size == 0
    assert change.size == math.inf


def test_an_unreachable_row_without_coefficients_is_infeasible():
    rows = MatrixRows(sparse.csr_array(np.zeros((1, 3))), np.array([1.0]), np.zeros(1, dtype=np.int64))
    assert minimal_change(rows, L1).status is Status.INFEASIBLE


def test_the_box_bounds_every_weight():
    rows = last_layer(0)
    free = minimal_change(rows, L1)
    largest = np.abs(free.values).max()
    boxed = minimal_change(rows, L1, box=0.6 * largest)
    assert np.abs(boxed.values).max() <= 0.6 * largest + 1e-9
    assert boxed.size > free.size
    assert minimal_change(rows, L1, box=1e-4).status is Status.INFEASIBLE


@pytest.mark.parametrize("norm", [L1, LINF], ids=["l1", "linf"])
def test_a_millisecond_gives_a_timeout_and_never_a_vector(norm):
    rows = last_layer(0, points=150, width=120, classes=10)
    change = minimal_change(rows, norm, start=np.arange(len(rows.bound)), limits=Limits(lambda: 1e-3))
    assert change.status is Status.TIMEOUT
    assert change.values.size == 0


def test_no_time_left_is_a_timeout_without_a_run():
    assert minimal_change(last_layer(0), L1, limits=Limits(lambda: -1.0)).status is Status.TIMEOUT


def test_the_time_limit_counts_each_run_of_a_solver_alone():
    rows = last_layer(0, points=60, width=60, classes=10)
    n = rows.n_columns
    matrix = rows.take(np.arange(len(rows.bound)))
    program = LinearProgram(
        np.ones(n), np.full(n, -1.0), np.ones(n), matrix, rows.bound, np.full(len(rows.bound), np.inf)
    )
    solver = Solver(program, Method.DUAL_SIMPLEX)
    for _ in range(3):
        spent = solver._highs.getRunTime()
        solver.set_cost(np.random.default_rng(0).uniform(0.5, 1.0, size=n))
        assert solver.solve(30.0).is_optimal
        # HiGHS compares its limit with the time of all runs together.
        assert solver._highs.getOptionValue("time_limit")[1] == pytest.approx(spent + 30.0)
        assert solver._highs.getRunTime() > spent


@pytest.mark.parametrize("norm", [L1, LINF, MIXED], ids=["l1", "linf", "mixed"])
def test_row_generation_finds_the_optimum_of_the_full_program(norm):
    rows = last_layer(3, points=40, width=20, classes=8)
    full, generated = (minimal_change(rows, norm, start=start) for start in (np.arange(len(rows.bound)), None))
    assert generated.size == pytest.approx(full.size, rel=1e-6)
    assert generated.rounds > 1
    assert len(full.used) == len(rows.bound)
    assert len(generated.used) < len(rows.bound) / 2
    assert (rows.values(generated.values) >= rows.bound - 1e-7).all()


def test_rows_of_an_earlier_program_save_rounds_not_correctness():
    rows = last_layer(3, points=40, width=20, classes=8)
    cold = minimal_change(rows, L1)
    warm = minimal_change(rows, L1, start=cold.used)
    assert warm.rounds < cold.rounds
    assert warm.size == pytest.approx(cold.size, rel=1e-9)


def hidden_layer(seed, points=12, width=15, units=10, classes=4):
    """Rows of a hidden layer: outer products of masked gradients with features."""
    rng = np.random.default_rng(seed)
    inputs = np.hstack([np.maximum(rng.normal(size=(points, width)), 0), np.ones((points, 1))])
    gradients = rng.normal(size=(points * (classes - 1), units)) * (rng.random((points * (classes - 1), units)) < 0.5)
    bound = rng.normal(size=len(gradients)) * 0.3
    return LayerRows(sparse.csr_array(gradients), np.repeat(np.arange(points), classes - 1), inputs, bound)


@pytest.mark.parametrize("norm", [L1, LINF, MIXED], ids=["l1", "linf", "mixed"])
@pytest.mark.parametrize("generate", [False, True])
def test_factored_equals_dense(norm, generate):
    rows = hidden_layer(0)
    factored = LayerRows(rows.left, rows.point, rows.inputs, rows.bound, factored=True)
    expected = minimal_change(dense(rows), norm)
    for variant in (rows, factored):
        start = None if generate else np.arange(len(variant.bound))
        change = minimal_change(variant, norm, start=start)
        assert change.size == pytest.approx(expected.size, rel=1e-6)
        assert (dense(rows).values(change.values) >= rows.bound - 1e-7).all()
    everything = np.arange(len(rows.bound))
    assert factored.nonzeros(everything) < rows.nonzeros(everything)
    assert rows.nonzeros(everything) == rows.take(everything).nnz == dense(rows).matrix.nnz


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_layer_rows_are_outer_products(seed):
    rows = hidden_layer(seed, points=4)
    change = np.random.default_rng(seed).normal(size=rows.n_columns)
    chosen = np.array([5, 0, 7])
    np.testing.assert_allclose(rows.values(change), dense(rows).values(change), atol=1e-12)
    np.testing.assert_allclose(rows.take(chosen).toarray(), dense(rows).take(chosen).toarray(), atol=1e-15)
    factored = LayerRows(rows.left, rows.point, rows.inputs, rows.bound, factored=True)
    taken = factored.take(chosen)
    auxiliary = np.unique(taken.indices) - rows.n_columns
    links = factored.links(auxiliary).toarray()
    # Eliminating the auxiliary columns gives the rows back.
    left = taken.toarray()[:, rows.n_columns + auxiliary]
    np.testing.assert_allclose(left @ -links[:, : rows.n_columns], rows.take(chosen).toarray(), atol=1e-12)
    assert factored.nonzeros(chosen) == taken.nnz + np.count_nonzero(links)


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
@settings(max_examples=15, deadline=None)
def test_closed_forms_of_one_point_with_one_rival(seed, needed):
    features = np.random.default_rng(seed).uniform(0.1, 2.0, size=(1, 8))
    rows = LayerRows(
        sparse.csr_array(np.array([[1.0, -1.0]])), np.zeros(1, dtype=np.int64), features, np.array([needed])
    )
    assert minimal_change(rows, LINF).size == pytest.approx(needed / (2 * features.sum()), abs=1e-8)
    smallest = minimal_change(rows, L1)
    assert smallest.size == pytest.approx(needed / features.max(), abs=1e-8)
    assert np.count_nonzero(smallest.values) <= 2


def test_disjoint_features_decompose_into_the_single_optima():
    rows = [
        LayerRows(
            sparse.csr_array(np.array([[1.0, -1.0]])),
            np.zeros(1, dtype=np.int64),
            np.eye(1, 2, i) * (i + 1.0),
            np.array([0.7]),
        )
        for i in range(2)
    ]
    both = LayerRows(
        sparse.csr_array(np.array([[1.0, -1.0]] * 2)), np.arange(2), np.diag([1.0, 2.0]), np.array([0.7, 0.7])
    )
    for norm, combine in ((L1, sum), (LINF, max)):
        singles = [minimal_change(row, norm).size for row in rows]
        assert minimal_change(both, norm).size == pytest.approx(combine(singles), rel=1e-7)


def test_each_optimum_beats_the_other_in_its_own_norm():
    rows = last_layer(5)
    sparse_change, flat_change = minimal_change(rows, L1), minimal_change(rows, LINF)
    assert np.abs(sparse_change.values).sum() < np.abs(flat_change.values).sum()
    assert np.abs(flat_change.values).max() < np.abs(sparse_change.values).max()
    assert np.count_nonzero(sparse_change.values) <= len(rows.bound)


def test_bisection_over_the_box_brackets_the_optimum():
    rows, step = last_layer(6), 1e-4
    optimum = minimal_change(rows, LINF).size
    low, high = 0.0, 1.0
    while high - low > step:
        middle = (low + high) / 2
        feasible = minimal_change(rows, Norm(), box=middle, method=Method.DUAL_SIMPLEX).is_optimal
        low, high = (low, middle) if feasible else (middle, high)
    assert low <= optimum <= high


def test_the_size_guard_refuses_before_anything_is_allocated():
    tracemalloc.start()
    try:
        with pytest.raises(FixFailedError, match=r"20,479,500,000 non-zeros.*budget is 8\.0 GiB"):
            check_size(20 * 999, 1_025_000, 20 * 999 * 1_025_000)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10 * 2**20


def test_rows_are_refused_before_they_are_made():
    rng = np.random.default_rng(0)
    classes, width, points = 1000, 1025, 20
    rival = np.tile(np.arange(1, classes), points)
    count = len(rival)
    left = sparse.csr_array(
        (
            np.tile([1.0, -1.0], count),
            np.stack([np.zeros(count, dtype=np.int64), rival], 1).ravel(),
            np.arange(0, 2 * count + 1, 2),
        ),
        shape=(count, classes),
    )
    rows = LayerRows(left, np.repeat(np.arange(points), classes - 1), rng.random((points, width)), np.ones(count))
    tracemalloc.start()
    try:
        with pytest.raises(FixFailedError, match="non-zeros"):
            minimal_change(rows, L1, start=np.arange(len(rows.bound)), limits=Limits(memory=2**30))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 200 * 2**20  # the rows alone would take 40 million coefficients


@pytest.mark.parametrize("norm", [L1, LINF, MIXED], ids=["l1", "linf", "mixed"])
@pytest.mark.parametrize("seed", [0, 7])
def test_less_than_the_optimum_violates_a_row(norm, seed):
    rows = last_layer(seed)
    change = minimal_change(rows, norm)
    assert (rows.values(0.99 * change.values) < rows.bound - 1e-6).any()


def test_elastic_gives_up_one_of_two_equal_points_with_different_labels():
    left = sparse.csr_array(
        np.array([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])
    )
    inputs = np.array([[1.0, 0.5], [1.0, 0.5], [0.2, 1.0]])
    rows = LayerRows(left, np.array([0, 0, 1, 1, 2]), inputs, np.full(5, 0.1))
    assert minimal_change(rows, L1, box=3.0).status is Status.INFEASIBLE
    status, groups = conflicting_groups(rows, box=3.0)
    assert status is Status.OPTIMAL
    assert groups.tolist() == [1]
    keep = ~np.isin(rows.group, groups)
    change = minimal_change(rows, L1, box=3.0, keep=keep)
    assert change.is_optimal
    assert (rows.values(change.values) >= rows.bound - 1e-7)[keep].all()


def test_elastic_gives_up_nothing_that_can_be_met():
    status, groups = conflicting_groups(last_layer(0), box=10.0)
    assert status is Status.OPTIMAL
    assert groups.size == 0


def test_tiny_and_huge_rows_are_scaled():
    # Unscaled, HiGHS drops the first row's coefficients (below 1e-9) and the requirement with them.
    matrix = sparse.csr_array(np.array([[4e-10, 1e-10], [3e6, 1e6]]))
    rows = MatrixRows(matrix, np.array([1e-10, 1.5e6]), np.arange(2))
    change = minimal_change(rows, L1)
    assert change.size == pytest.approx(0.5, rel=1e-6)
    only_tiny = MatrixRows(matrix[[0]], np.array([8e-8]), np.zeros(1, dtype=np.int64))
    assert minimal_change(only_tiny, L1).size == pytest.approx(200.0, rel=1e-6)


def test_a_solver_keeps_its_basis_when_costs_change():
    rng = np.random.default_rng(0)
    matrix = sparse.csr_array(rng.normal(size=(30, 10)))
    program = LinearProgram(
        np.zeros(10), np.full(10, -1.0), np.ones(10), matrix, np.full(30, -np.inf), np.full(30, 0.5)
    )
    solver = Solver(program, Method.PRIMAL_SIMPLEX)
    for _ in range(5):
        cost = rng.normal(size=10)
        solver.set_cost(cost)
        expected = linprog(cost, A_ub=matrix.toarray(), b_ub=np.full(30, 0.5), bounds=(-1, 1))
        assert solver.solve().objective == pytest.approx(expected.fun, rel=1e-8)


def test_unbounded_and_infeasible_are_told_apart():
    infinite = np.full(2, np.inf)
    program = LinearProgram(np.array([-1.0, 0.0]), -infinite, infinite, no_rows(2), np.empty(0), np.empty(0))
    found = solve(program, Method.DUAL_SIMPLEX)
    assert found.status is Status.UNBOUNDED
    assert found.values.size == 0
    contradiction = sparse.csr_array(np.array([[1.0, 0.0], [1.0, 0.0]]))
    program = LinearProgram(
        np.array([0.0, -1.0]), -infinite, infinite, contradiction, np.array([1.0, -np.inf]), np.array([np.inf, 0.0])
    )
    assert solve(program, Method.DUAL_SIMPLEX).status is Status.INFEASIBLE


def test_shapes_must_fit():
    with pytest.raises(ValueError, match="lengths"):
        LinearProgram(np.zeros(3), np.zeros(2), np.zeros(2), no_rows(2), np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="within the bounds"):
        ChangeProgram(np.ones(2), np.full(2, 2.0), L1)


def test_of_equal_points_always_the_later_one_is_given_up():
    rng = np.random.default_rng(0)
    inputs = np.repeat(rng.uniform(0.1, 1.0, size=(6, 8)), 2, axis=0)
    left = np.tile(np.array([[1.0, -1.0], [-1.0, 1.0]]), (6, 1))
    order = rng.permutation(12)
    rows = LayerRows(sparse.csr_array(left[order]), np.arange(12), inputs[order], np.full(12, 0.1))
    pair = order // 2
    later = [max(np.flatnonzero(pair == each)) for each in range(6)]
    _, groups = conflicting_groups(rows, box=3.0)
    assert groups.tolist() == sorted(later)
