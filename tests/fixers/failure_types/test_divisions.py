import dataclasses

import numpy as np
import torch

from fixers import RepairProblem, TensorSplit
from fixers.failure_types import MATRIX, Division, Grouping, Pool, divide, find_types, repair


def test_parts_are_disjoint_and_64_16_and_20_percent_of_each_type_and_of_c(by_cause, planted):
    for kind in (-1, 0, 1, 2, 3):
        counts = [int(((by_cause.types == kind) & (by_cause.roles == role)).sum()) for role in (1, 2, 3)]
        total = sum(counts)
        assert total == int((by_cause.types == kind).sum())
        assert all(abs(count - share * total) <= 1 for count, share in zip(counts, (0.64, 0.16, 0.2), strict=True))
    assert torch.equal(by_cause.types >= 0, planted.problem.wrong)


def test_a_type_of_fewer_than_five_is_set_aside_and_trains_and_judges_nothing(planted):
    pool = planted.pool
    types = torch.zeros(len(pool.failures), dtype=torch.int64)
    types[:4] = 1
    division = divide(pool, types)
    assert division.repairable == [0]
    assert set(division.roles[division.types == 1].tolist()) == {0}
    assert len(division.problem([1]).failures) == 0


def test_labels_of_what_judges_change_no_weight(planted, by_cause):
    model = repair(by_cause, MATRIX, [0], "quick", steps=30)
    labels = planted.problem.repair.labels.clone()
    labels[by_cause.judging] = (labels[by_cause.judging] + 1) % 10
    other = dataclasses.replace(by_cause, pool=_relabelled(by_cause.pool, labels))
    again = repair(other, MATRIX, [0], "quick", steps=30)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def _relabelled(pool: Pool, labels: torch.Tensor) -> Pool:
    own = pool.problem
    inputs = own.repair.batch().inputs
    problem = RepairProblem(own.original, train=own.train, valid=own.valid, repair=TensorSplit(inputs, labels))
    changed = Pool(problem)
    # The order is that of the pool before; it is a function of content, which changed.
    changed.__dict__["_facts"] = pool._facts
    return changed


def test_samples_in_another_order_get_the_same_types_and_roles(planted):
    problem = planted.problem
    order = torch.randperm(len(problem.repair), generator=torch.Generator().manual_seed(1))
    moved = RepairProblem(
        problem.original, train=problem.train, valid=problem.valid, repair=problem.repair.select(order)
    )
    assert len(np.unique(order)) == len(problem.repair)
    first, second = (_typed(Pool(one)) for one in (problem, moved))
    assert torch.equal(first.types[order], second.types)
    assert torch.equal(first.roles[order], second.roles)


def _typed(pool: Pool) -> Division:
    return divide(pool, find_types(pool, Grouping("features")).assigned)
