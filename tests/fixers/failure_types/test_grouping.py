import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score

from fixers import FixFailedError, RepairProblem
from fixers.failure_types import Grouping, Pool, divide, find_types
from fixers.failure_types.grouping import silhouettes


@pytest.fixture(autouse=True)
def without_umap(monkeypatch, request):
    """Principal components, unless a test asks for UMAP: compiling it takes most of a minute."""
    if "umap" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "umap", None)


@pytest.fixture
def umap():
    return pytest.importorskip("umap")


def predicted(planted):
    failures = planted.problem.repair.select(planted.pool.failures)
    return failures.labels, planted.problem.outputs(planted.problem.original, failures).argmax(dim=1)


def agreement(types, truth):
    return adjusted_mutual_info_score(np.asarray(truth), types.assigned.numpy())


def test_features_find_the_causes_that_were_planted(planted):
    types = find_types(planted.pool, Grouping("features"))
    assert 3 <= types.count <= 6
    assert agreement(types, planted.cause_of_failures()) > 0.7
    assert agreement(types, predicted(planted)[0]) < 0.2
    assert "umap-learn isn't installed" in types.facts["reduction"]


def test_gradients_follow_the_label_side_of_an_error(planted):
    types = find_types(planted.pool, Grouping("gradients", normalise=True))
    labels, decided = predicted(planted)
    assert agreement(types, labels) > 0.4
    assert agreement(types, labels) > agreement(types, decided)


@pytest.mark.slow
def test_umap_finds_the_causes_too_and_the_same_types_in_every_run(planted, umap):
    first, second = (find_types(Pool(planted.problem), Grouping("features")) for _ in range(2))
    assert first.facts["reduction"] == "UMAP"
    assert agreement(first, planted.cause_of_failures()) > 0.7
    assert torch.equal(first.assigned, second.assigned)
    assert torch.equal(first.place, second.place)


@pytest.mark.parametrize("by", ["gradients", "features", "random", "confusion", "metadata", "hudd"])
def test_types_are_numbered_by_size_and_every_failure_has_one(planted, by):
    small = RepairProblem(
        planted.problem.original, train=planted.problem.train, valid=planted.problem.valid,
        repair=planted.problem.repair.select(torch.arange(0, 1200, 5)),
    )  # fmt: skip
    pool = Pool(small)
    types = find_types(pool, Grouping(by, column="cause"), {"cause": planted.cause[::5]})
    sizes = torch.bincount(types.assigned).tolist()
    assert sum(sizes) == len(pool.failures)
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0
    assert types.place.shape == (len(pool.failures), 2)
    assert types.place.isfinite().all()


def test_confusion_is_label_and_prediction_and_metadata_has_the_columns_values(planted):
    types = find_types(planted.pool, Grouping("confusion"))
    labels, decided = predicted(planted)
    for label, other, kind in zip(labels.tolist(), decided.tolist(), types.assigned.tolist(), strict=True):
        assert types.names[kind] == f"{label} as {other}"
    types = find_types(planted.pool, Grouping("metadata", column="cause"), {"cause": planted.cause})
    assert [types.names[kind] for kind in types.assigned.tolist()] == planted.cause_of_failures().tolist()


def test_new_failures_get_the_type_of_the_nearest_centre_where_no_label_is_needed(planted):
    types = find_types(planted.pool, Grouping("features"))
    division = divide(planted.pool, types.assigned)
    rule = types.nearest_centre(division)
    judging = division.judging[division.types[division.judging] >= 0]
    hits = rule(planted.problem.repair.select(judging)) == division.types[judging]
    assert rule.accuracy == pytest.approx(hits.double().mean().item())
    assert rule.accuracy > 0.9
    assert find_types(planted.pool, Grouping("gradients")).nearest_centre(division) is None


def test_silhouettes_are_those_of_scikit_learn():
    points = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    found = {k: torch.arange(80) % k for k in (2, 5)} | {3: torch.tensor([2] + [0, 1] * 39 + [0])}
    for k, score in silhouettes(points, found).items():
        assert score == pytest.approx(silhouette_score(points.numpy(), found[k].numpy()), abs=1e-6)


def test_too_few_failures_are_one_type_and_none_or_no_column_is_a_sentence(planted):
    problem = planted.problem

    def of(rows):
        few = problem.repair.select(rows)
        return Pool(RepairProblem(problem.original, train=problem.train, valid=problem.valid, repair=few))

    right, wrong = (~problem.wrong).nonzero().squeeze(1), problem.wrong.nonzero().squeeze(1)
    types = find_types(of(torch.cat([right[:9], wrong[:3]])), Grouping("features"))
    assert types.count == 1
    assert types.facts["one_type"] == "3 failures are too few for 3 types, so they are one."
    with pytest.raises(FixFailedError, match="there are no failures"):
        find_types(of(right[:9]), Grouping("features"))
    with pytest.raises(FixFailedError, match=r"no metadata 'tissue'; there are: cause\."):
        find_types(planted.pool, Grouping("metadata", column="tissue"), {"cause": planted.cause})
