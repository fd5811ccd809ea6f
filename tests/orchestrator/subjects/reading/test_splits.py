"""Dividing: by content, in proportion, the same every time."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.splits import (
    SPLIT_NAMES,
    GroupedSplitPlan,
    Pool,
    SplitPlan,
    divide,
    row_digests,
    stratified_order,
)
from orchestrator.subjects.subject import assemble

PLAN = SplitPlan(("all", 0.5), ("all", 0.1), ("all", 0.2), ("all", 0.2))
TWO_POOLS = SplitPlan(("train", 900), ("train", 100), ("test", 50), ("test", 50))


def pool(n: int, n_classes: int = 3, seed: int = 0, **more: Any) -> Pool:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)
    return Pool(ArraySamples(images), generator.integers(0, n_classes, n), **more)


@given(st.integers(40, 400), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_beginning_of_the_order_has_each_stratum_in_proportion(n: int, n_strata: int, seed: int) -> None:
    strata = np.random.default_rng(seed).integers(0, n_strata, n)
    order = stratified_order(strata, seed)
    assert sorted(order) == list(range(n))
    share = np.bincount(strata, minlength=n_strata) / n
    for length in (n // 4, n // 2, n - 3):
        found = np.bincount(strata[order[:length]], minlength=n_strata)
        # One sample for the stratum's own rounding, and as much as all strata can shift the beginning together.
        assert (abs(found - share * length) <= 1 + n_strata).all()


def test_splits_have_the_sizes_of_the_plan_and_are_disjoint_by_content() -> None:
    samples = pool(1000)
    indices, _, notes = divide({"all": samples}, PLAN)
    assert {name: len(rows) for name, rows in indices.items()} == {
        "train": 500, "valid": 100, "repair": 200, "test": 200,
    }  # fmt: skip
    assert not notes
    digests = row_digests(samples.samples.array)  # type: ignore[attr-defined]
    content = [set(digests[indices[name]].tolist()) for name in SPLIT_NAMES]
    assert len(set.union(*content)) == sum(map(len, content)) == 1000


def test_copies_never_end_up_in_two_splits() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)[generator.integers(0, 200, 600)]
    copied = Pool(ArraySamples(images), generator.integers(0, 3, 600))
    data = assemble({"all": copied}, PLAN, "copies")
    content = [
        set(row_digests(split.inputs(torch.arange(len(split)), torch.device("cpu")).numpy()).tolist())
        for split in data.splits().values()
    ]
    assert sum(map(len, content)) == len(set.union(*content))
    assert sum(len(split) for split in data.splits().values()) == 600
    assert any("have copies; copies were kept in one split" in note for note in data.notes)
    assert any("with another label" in note for note in data.notes)


def test_what_the_test_pool_has_disappears_from_the_training_pool() -> None:
    train, test = pool(1000), pool(100, seed=1)
    train.samples.array[:7] = test.samples.array[:7]  # type: ignore[attr-defined]
    indices, _, notes = divide({"train": train, "test": test}, TWO_POOLS)
    assert not {*range(7)} & {*indices["train"].tolist(), *indices["valid"].tolist()}
    assert len(indices["repair"]) + len(indices["test"]) == 100
    assert "7 inputs of part 'train'" in notes[0]


@pytest.mark.parametrize("n", [200, 1000, 5000])
def test_a_part_of_a_dataset_is_divided_in_the_proportions_of_the_whole(n: int) -> None:
    indices, _, _ = divide({"train": pool(n), "test": pool(n // 10, seed=1)}, TWO_POOLS)
    sizes = [len(indices[name]) for name in SPLIT_NAMES]
    assert sizes == [round(0.9 * n), round(0.1 * n), n // 20, n // 20]


def test_a_limit_keeps_proportions_and_classes() -> None:
    samples = pool(4000, n_classes=4)
    full, _, _ = divide({"all": samples}, PLAN)
    limited, _, _ = divide({"all": samples}, PLAN, limit=400)
    assert [len(limited[name]) for name in SPLIT_NAMES] == [200, 40, 80, 80]
    for name in SPLIT_NAMES:
        assert set(limited[name]) <= set(full[name])
        share = np.bincount(samples.labels[limited[name]]) / len(limited[name])
        assert abs(share - np.bincount(samples.labels) / 4000).max() < 0.06


def test_a_limited_subject_forgets_the_rest() -> None:
    samples = pool(4000)
    full = assemble({"all": samples}, PLAN, "x")
    limited = assemble({"all": samples}, PLAN, "x", limit=400)
    assert limited.train._inputs.nbytes == full.train._inputs.nbytes // 10  # type: ignore[attr-defined]
    for name in SPLIT_NAMES:
        rows = torch.arange(len(limited.splits()[name]))
        torch.testing.assert_close(limited.splits()[name].inputs(rows, "cpu"), full.splits()[name].inputs(rows, "cpu"))


def test_the_sensitive_attribute_is_stratified_too() -> None:
    groups = (np.random.default_rng(5).random(2000) < 0.1).astype(np.int8)
    data = assemble({"all": pool(2000, n_classes=2, groups=groups)}, PLAN, "x")
    assert data.test_groups is not None
    labels = data.test.labels.numpy()
    for label in (0, 1):
        assert 15 <= data.test_groups[labels == label].sum() <= 25  # 10 % of about 200


def test_the_hash_tells_contents_labels_and_order_apart() -> None:
    first = pool(300)
    hashes = {assemble({"all": first}, PLAN, "x").split_hash}
    assert assemble({"all": pool(300)}, PLAN, "y").split_hash in hashes
    changed = pool(300)
    changed.samples.array[17, 0, 0, 0] ^= 1  # type: ignore[attr-defined]
    relabelled = Pool(first.samples, (first.labels + 1) % 3)
    other_seed = SplitPlan(PLAN.train, PLAN.valid, PLAN.repair, PLAN.test, seed=1)
    for pools, plan in ((changed, PLAN), (relabelled, PLAN), (first, other_seed)):
        hashes.add(assemble({"all": pools}, plan, "x").split_hash)
    assert len(hashes) == 4


def test_too_few_samples_for_four_splits_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"The valid split would be empty: 4 samples don't fill four splits"):
        divide({"all": pool(4)}, PLAN)


BY_PATIENT = GroupedSplitPlan(("all", 0.5), ("all", 0.1), ("all", 0.2), ("all", 0.2), column="patient")


def of_patients(n: int, n_patients: int, seed: int = 0) -> Pool:
    patients = np.random.default_rng(seed + 1).integers(0, n_patients, n)
    return pool(n, 2, seed, metadata={"patient": patients})


@given(st.integers(300, 600), st.integers(40, 90), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_by_a_column_each_of_its_values_is_in_one_split_and_classes_are_in_proportion(
    n: int, k: int, seed: int
) -> None:
    own = of_patients(n, k, seed)
    indices = divide({"all": own}, BY_PATIENT).indices
    homes = [set(own.metadata["patient"][indices[name]].tolist()) for name in SPLIT_NAMES]
    assert sum(map(len, homes)) == len(set().union(*homes))
    assert sorted(np.concatenate(list(indices.values()))) == list(range(n))
    share = own.labels.mean()
    for name, wanted in zip(SPLIT_NAMES, (0.5, 0.1, 0.2, 0.2), strict=True):
        assert len(indices[name]) == pytest.approx(wanted * n, abs=0.08 * n)
        if name != "valid":
            assert own.labels[indices[name]].mean() == pytest.approx(share, abs=0.12)


def test_patients_that_share_an_image_are_in_one_split() -> None:
    own = of_patients(300, 60)
    images = own.samples.array.copy()  # type: ignore[attr-defined]
    first, second = (np.flatnonzero(own.metadata["patient"] == patient)[0] for patient in (3, 7))
    images[second] = images[first]
    own = Pool(ArraySamples(images), own.labels, metadata=own.metadata)
    indices = divide({"all": own}, BY_PATIENT).indices
    home = {patient: name for name in SPLIT_NAMES for patient in own.metadata["patient"][indices[name]].tolist()}
    assert home[3] == home[7]


def test_a_column_that_is_missing_or_cuts_across_parts_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"by 'patient', which the samples don't have; name it under metadata \(none\)"):
        divide({"all": pool(100)}, BY_PATIENT)
    plan = GroupedSplitPlan(("a", 0.5), ("a", 0.1), ("b", 0.2), ("b", 0.2), column="patient")
    with pytest.raises(UserError, match="is in the parts 'b' and 'a'"):
        divide({"a": of_patients(100, 9), "b": of_patients(100, 9, 5)}, plan)


def test_plans_without_a_column_are_known_by_the_same_name_as_ever() -> None:
    # It is part of the key under which trained originals are kept.
    assert (
        repr(PLAN)
        == "SplitPlan(train=('all', 0.5), valid=('all', 0.1), repair=('all', 0.2), test=('all', 0.2), seed=0)"
    )
    assert "column='patient'" in repr(BY_PATIENT)
