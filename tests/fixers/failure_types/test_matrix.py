import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fixers.failure_types import (
    MATRIX,
    REPAIRS,
    accuracies_by_type,
    divide,
    independence,
    quality,
    repair,
    type_accuracies,
)

PUBLISHED = {
    # Figure 2 of the paper without the column C, and Table 1: mean and spread of Learnability and of Independence.
    "tissue": (
        """.95 .60 .88 .98 .79 .00 .05
           .48 .87 .56 .34 .85 .03 .10
           .42 .67 .84 .50 .62  0   0
           .82 .33 .88 .99 .41  0  .06
           .66 1.0 .64 .44 .94 .01 .04
            0   0   0   0  .04 .93 .58
           .01  0   0  .06  0  .38 .90""",
        (0.9171, 0.0471), (0.5783, 0.1633),
    ),
    "gradient": (
        """.89 .06 .17 .03 .24 .25 .24 .03
           .07 .93 .02 .45 .00 .43 .07 .36
           .21 .06 .92 .00 .84 .18 .46 .20
           .40 .63 .02 .97 .02 .40 .27 .16
           .26 .01 .85 .03 .98 .13 .72 .34
           .26 .52 .26 .03 .03 .88 .01 .17
           .11 .07 .49 .00 .66 .00 .95 .37
           .00 .39 .36 .00 .31 .28 .30 .89""",
        (0.9263, 0.0357), (0.6900, 0.0362),
    ),
    "random": (
        """.66 .65 .63 .63 .63 .65
           .64 .68 .64 .64 .66 .66
           .64 .64 .63 .63 .64 .64
           .65 .66 .66 .65 .66 .67
           .62 .62 .61 .60 .63 .62
           .63 .63 .62 .63 .63 .66""",
        (0.6517, 0.0177), (0.0140, 0.0172),
    ),
    "catheter gradient": (
        """.84 .78 .36 .30 .36 .01
           .08 .88 .25 .22 .38 .01
           .20 .71 .74 .39 .35 .91
           .11 .65 .27 .93 .39 .31
           .15 .75 .38 .43 .63 .08
           .20 .49 .42 .19 .48 .98""",
        (0.8333, 0.1177), (0.4797, 0.1748),
    ),
}  # fmt: skip


BRIEF = {"steps": 60, "learning_rate": 2e-3}


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def tuned_on_each(division):
    models = [repair(division, MATRIX, [kind], "quick", **BRIEF) for kind in division.repairable]
    return [type_accuracies(model, division)[0] for model in models]


@pytest.fixture(scope="module")
def rows(by_cause):
    return tuned_on_each(by_cause)


@pytest.mark.parametrize(("text", "learned", "independent"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_papers_matrices_give_its_table(text, learned, independent):
    matrix = [[float(value) for value in line.split()] for line in text.splitlines()]
    table = quality(matrix).table()
    assert table["learnability"] == pytest.approx(learned, abs=5e-4)
    assert table["independence"] == pytest.approx(independent, abs=5e-4)


def test_special_cases_of_independence_are_those_of_the_papers_code():
    nan = math.nan
    matrix = [[0.0, 0.5, 0.9], [0.9, 0.3, nan], [nan, nan, 0.8]]
    found = independence(matrix)
    assert found[0] == 0.0
    assert found[1] == pytest.approx(0.3 - 0.9)
    assert np.isnan(found[2])
    assert np.isnan(independence([[nan, 0.1], [0.2, 0.3]])[0])


def test_the_column_of_all_is_the_mean_of_the_others_by_their_shares():
    generator = torch.Generator().manual_seed(0)
    types = torch.randint(-1, 4, (500,), generator=generator)
    right = torch.rand(500, generator=generator) < 0.3
    accuracy, counts = accuracies_by_type(right, types, 4)
    parts = [0, 1, 2, 3, "C"]
    assert sum(counts[part] for part in parts) == counts["All"] == 500
    share_weighted = sum(counts[part] * accuracy[part] for part in parts) / 500
    assert accuracy["All"] == pytest.approx(share_weighted, abs=1e-6)


def test_planted_types_are_independent_and_the_same_failures_shuffled_are_not(by_cause, rows):
    pool = by_cause.pool
    shuffled = by_cause.types[pool.failures][
        torch.randperm(len(pool.failures), generator=torch.Generator().manual_seed(0))
    ]
    at_random = tuned_on_each(divide(pool, shuffled))
    means = [
        quality([[row[j] for j in range(4)] for row in found]).table()["independence"][0] for found in (rows, at_random)
    ]
    assert means[0] > 0.4
    assert abs(means[1]) < 0.08


def test_halves_of_one_cause_repair_each_other(by_cause):
    pool = by_cause.pool
    types = by_cause.types[pool.failures]
    half = (types == 0) & (torch.arange(len(types)) % 2 == 0)
    division = divide(pool, torch.where(half, 4, types))
    found = type_accuracies(repair(division, MATRIX, [0], "quick", **BRIEF), division)[0]
    assert found[4] - max(found[1], found[2], found[3]) > abs(found[0] - found[4])


def test_before_a_repair_nothing_of_a_type_is_right_and_all_of_c_is(by_cause):
    accuracy, counts = type_accuracies(by_cause.pool.problem.original, by_cause)
    assert [accuracy[kind] for kind in range(4)] == [0.0] * 4
    assert accuracy["C"] == 1.0
    assert counts == {0: 30, 1: 30, 2: 30, 3: 30, "C": 120, "All": 240}


def test_right_samples_in_training_keep_what_is_right(by_cause, rows):
    def of(name, kinds):
        return type_accuracies(repair(by_cause, REPAIRS[name], kinds, "quick", **BRIEF), by_cause)[0]

    without = [of("single", [kind]) for kind in (0, 1)]
    mixed = [of("single_and_correct", [kind]) for kind in (0, 1)]
    gain = np.mean([with_c["C"] - alone["C"] for with_c, alone in zip(mixed, without, strict=True)])
    loss = np.mean(
        [alone[kind] - with_c[kind] for kind, (with_c, alone) in enumerate(zip(mixed, without, strict=True))]
    )
    assert gain > 0.05
    assert loss < 0.1
    assert of("all_and_correct", [0, 1, 2, 3])["C"] - of("all", [0, 1, 2, 3])["C"] > 0.05


def test_ewc_without_strength_is_fine_tuning_and_with_much_of_it_gives_the_original_back(by_cause):
    everything = [0, 1, 2, 3]
    plain = repair(by_cause, REPAIRS["all"], everything, "quick", steps=40)
    loose = repair(by_cause, REPAIRS["ewc"], everything, "quick", steps=40, strength=0.0)
    assert torch.equal(weights(plain), weights(loose))
    along = []
    for strength in (0.0, 10.0, 1e3, 1e5, 1e9):
        model = repair(
            by_cause,
            REPAIRS["ewc"],
            everything,
            "quick",
            steps=60,
            learning_rate=1e-4,
            strength=strength,
            fisher_samples=200,
        )
        accuracy, counts = type_accuracies(model, by_cause)
        along.append(
            (accuracy["C"], sum(accuracy[k] * counts[k] for k in everything) / sum(counts[k] for k in everything))
        )
    right, repaired = zip(*along, strict=True)
    assert all(after >= before - 0.03 for before, after in pairwise(right))
    assert all(after <= before + 0.03 for before, after in pairwise(repaired))
    assert right[-1] >= 0.99
    assert repaired[-1] <= 0.03
