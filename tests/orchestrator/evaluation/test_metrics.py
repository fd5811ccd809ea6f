import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.evaluation import metrics

CLASSES = 4


@st.composite
def columns(draw, width=3, classes=CLASSES):
    """Integer columns of one length, the first of them labels; predictions may be -1, no class."""
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, classes - 1), *[st.integers(-1, classes - 1)] * (width - 1)),
            min_size=1,
            max_size=60,
        )
    )
    return tuple(np.array(column) for column in zip(*rows, strict=True))


@st.composite
def grouped(draw):
    labels, predictions = draw(columns(width=2))
    groups = draw(st.lists(st.integers(0, 1), min_size=len(labels), max_size=len(labels)))
    return labels, predictions, np.array(groups)


both_groups = grouped().filter(lambda data: 0 < data[2].sum() < len(data[2]))


def brute_force_aaod(labels, predictions, groups, n_classes):
    gaps, undefined = {"tpr": [], "fpr": []}, set()
    for c in range(n_classes):
        rates = {"tpr": [], "fpr": []}
        for g in (0, 1):
            rows = [(y, p) for y, p, h in zip(labels, predictions, groups, strict=True) if h == g]
            for kind, members in (
                ("tpr", [p for y, p in rows if y == c]),
                ("fpr", [p for y, p in rows if y != c]),
            ):
                if not members:
                    undefined.add(c)
                rates[kind].append(sum(p == c for p in members) / len(members) if members else 0.0)
        for kind, (first, second) in rates.items():
            gaps[kind].append(abs(first - second))
    return (sum(gaps["tpr"]) + sum(gaps["fpr"])) / n_classes / 2, len(undefined)


@given(columns())
def test_accuracy_repair_rate_and_nfr_account_for_each_other(data):
    effect = metrics.Effect.of(*data)
    repaired = (effect.repair_rate or 0.0) * (1 - effect.accuracy_original)
    assert effect.accuracy_fixed == pytest.approx(effect.accuracy_original + repaired - effect.negative_flip_rate)
    labels, original, fixed = data
    assert effect.accuracy_original == np.mean(labels == original) == metrics.accuracy(labels, original)
    assert effect.accuracy_fixed == np.mean(labels == fixed) == metrics.accuracy(labels, fixed)


@given(columns(), st.randoms(use_true_random=False))
def test_order_and_names_of_classes_dont_matter(data, random):
    effect = metrics.Effect.of(*data)
    order = random.sample(range(len(data[0])), len(data[0]))
    assert metrics.Effect.of(*(column[order] for column in data)) == effect
    renamed = np.array([*random.sample(range(CLASSES), CLASSES), -1])
    assert metrics.Effect.of(*(renamed[column] for column in data)) == effect


@given(both_groups, st.randoms(use_true_random=False))
def test_aaod_is_that_of_the_definition(data, random):
    value = metrics.aaod(*data, CLASSES)
    assert value == pytest.approx(brute_force_aaod(*data, CLASSES))
    labels, predictions, groups = data
    assert metrics.aaod(labels, predictions, 1 - groups, CLASSES) == pytest.approx(value)
    assert 0 <= value.value <= 1
    order = random.sample(range(len(labels)), len(labels))
    assert metrics.aaod(*(column[order] for column in data), CLASSES) == pytest.approx(value)
    renamed = np.array([*random.sample(range(CLASSES), CLASSES), -1])
    assert metrics.aaod(renamed[labels], renamed[predictions], groups, CLASSES) == pytest.approx(value)


@given(columns(width=2))
def test_aaod_of_equal_groups_is_zero(data):
    doubled = [np.concatenate([column, column]) for column in data]
    groups = np.repeat([0, 1], len(data[0]))
    value = metrics.aaod(*doubled, groups, CLASSES)
    assert value is not None and value.value == 0.0


def test_aaod_of_two_classes_is_the_usual_one():
    # Group 0: TPR 1/2 and FPR 1/2 of class 1; group 1: TPR 1 and FPR 0. Class 0 mirrors class 1.
    labels, predictions = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 1, 0, 1, 0])
    groups = np.array([0, 0, 0, 0, 1, 1])
    assert metrics.aaod(labels, predictions, groups, 2) == (0.5, 0)


def test_a_class_that_a_group_lacks_is_counted():
    # Group 1 has no class 2: its TPR counts as 0, against 1 in group 0.
    labels = np.array([0, 1, 2, 0, 1])
    assert metrics.aaod(labels, labels, np.array([0, 0, 0, 1, 1]), 3) == (pytest.approx(1 / 6), 1)


@given(columns(width=2), st.sampled_from([0, 1]))
def test_one_group_alone_has_no_aaod(data, group):
    assert metrics.aaod(*data, np.full(len(data[0]), group), CLASSES) is None


def test_rates_have_the_denominators_of_the_study():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    original = np.array([0, 0, 0, 1, 1, 1, 0, 0])  # 3 of 8 wrong
    fixed = np.array([0, 0, 1, 1, 1, 1, 1, 1])  # 2 of the 3 repaired, 1 of the 5 broken
    effect = metrics.Effect.of(labels, original, fixed)
    assert effect.repair_rate == pytest.approx(2 / 3)
    assert effect.negative_flip_rate == pytest.approx(1 / 8)
    assert effect == metrics.Effect(n_test=8, n_wrong=3, n_repaired=2, n_broken=1)


def test_nothing_to_repair_is_no_rate_of_zero():
    labels = np.array([0, 1])
    assert metrics.Effect.of(labels, labels, labels[::-1]).repair_rate is None
    assert metrics.Effect.of(labels, labels[::-1], labels[::-1]).repair_rate == 0.0


def test_torch_and_numpy_agree():
    labels, original, fixed = (torch.randint(0, 3, (50,), generator=torch.manual_seed(i)) for i in range(3))
    effect = metrics.Effect.of(labels, original, fixed)
    assert effect == metrics.Effect.of(labels.numpy(), original.numpy(), fixed.numpy())


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [([], [], "no samples"), ([0, 1], [0], "one length"), ([[0]], [[0]], "one length")],
)
def test_what_is_no_sample_is_refused(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        metrics.accuracy(np.array(labels), np.array(predictions))


@pytest.mark.parametrize(
    ("labels", "groups"), [([0, 2], [0, 1]), ([-1, 0], [0, 1]), ([0, 1], [0, 2]), ([0, 1], [-1, 0])]
)
def test_aaod_refuses_other_labels_and_groups(labels, groups):
    with pytest.raises(ValueError, match="must be"):
        metrics.aaod(np.array(labels), np.array([0, 0]), np.array(groups), 2)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (5, 6, 0, 0), (5, 2, 3, 0), (5, 2, 0, 4), (5, 2, -1, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError):
        metrics.Effect(*counts)
