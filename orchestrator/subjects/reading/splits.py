"""Dividing samples into splits: stratified, seeded, and never two copies of one image in two splits.

Samples are brought into one order in which every class (and every group of the sensitive attribute) is spread evenly;
a split is a contiguous range of that order. So each split has each stratum in proportion, to within one sample, and so
has each beginning of a split, which is what a limited subject takes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from fixers import Split

SplitName = Literal["train", "valid", "repair", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)

Indices = npt.NDArray[np.int64]
Digests = npt.NDArray[np.void]


class Samples(Protocol):
    """Inputs of a pool, in memory or decoded on demand."""

    def __len__(self) -> int:
        """Number of samples N."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""

    def digests(self) -> Digests:
        """Content hash (N,) of each input, 16 bytes each; equal exactly when the inputs are the same."""

    def split(self, labels: npt.NDArray[np.int64], indices: Indices) -> Split:
        """The split of the samples at ``indices``, sharing no storage with other splits."""


@dataclass(frozen=True)
class Pool:
    """Labelled samples that one or more splits are taken from."""

    samples: Samples
    labels: npt.NDArray[np.int64]
    """(N,) class labels."""
    groups: npt.NDArray[np.int8] | None = None
    """(N,) group of the sensitive attribute, 0 or 1."""
    metadata: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Further columns (N,), for the analysis of failures."""
    call: Callable[[int], str] | None = None
    """What the user calls the sample at a position."""
    remarks: tuple[str, ...] = ()
    """What may be a mistake of how the samples were read, in sentences."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SplitPlan:
    """Which pool each split is taken from, and in which proportions.

    The sizes are those of the complete dataset. Where a pool has fewer samples (a part of a dataset, or a limit) the
    splits that share it shrink in proportion.
    """

    train: tuple[str, float]
    """(pool, size)."""
    valid: tuple[str, float]
    repair: tuple[str, float]
    test: tuple[str, float]
    seed: int = 0

    @property
    def by(self) -> str | None:
        """Column of which each value is in one split only; None for samples one by one."""
        return None

    def parts(self) -> dict[SplitName, tuple[str, float]]:
        """Pool and size of each split."""
        return {"train": self.train, "valid": self.valid, "repair": self.repair, "test": self.test}


@dataclass(frozen=True)
class GroupedSplitPlan(SplitPlan):
    """A plan by which all samples of a patient, say, are in one split."""

    column: str = ""
    """Of the metadata."""

    @property
    def by(self) -> str | None:
        """The column."""
        return self.column


class Division(NamedTuple):
    """Samples divided into four splits."""

    indices: dict[SplitName, Indices]
    """Positions of each split's samples in its pool."""
    digests: dict[SplitName, Digests]
    """Content hash of each split's samples."""
    notes: tuple[str, ...]
    """What was found of copies, in sentences."""


def divide(pools: Mapping[str, Pool], plan: SplitPlan, limit: int | None = None) -> Division:
    """Choose the samples of each split.

    Copies of one input stay together: all in one split if they are in one pool, and where pools share an input the
    one for test keeps it, before those for repair, valid and train.

    Args:
        pools: by the names that the plan uses.
        plan: proportions and seed.
        limit: at most this many samples over all four splits, in the same proportions.

    Raises:
        UserError: a split would be empty, or samples can't be divided by the plan's column.
    """
    digests, notes = _without_copies_across(pools, plan)
    if plan.by is not None:
        _check_column(pools, digests, plan.by)
    result: dict[SplitName, Indices] = {}
    for name, own in digests.items():
        sharing = {split: size for split, (pool, size) in plan.parts().items() if pool == name}
        if plan.by is None:
            result |= _divide_pool(pools[name], own, sharing, plan.seed)
        else:
            result |= _divide_whole(pools[name], own, sharing, plan.seed, plan.by)
    total = sum(map(len, result.values()))
    if limit is not None and limit < total:
        result = {split: indices[: round(len(indices) * limit / total)] for split, indices in result.items()}
    for split, indices in result.items():
        if len(indices) == 0:
            raise UserError(
                f"The {split} split would be empty: {total} samples"
                + ("" if limit is None else f" limited to {limit}")
                + " don't fill four splits; give more samples or other proportions."
            )
    return Division(
        {split: result[split] for split in SPLIT_NAMES},
        {split: digests[plan.parts()[split][0]][result[split]] for split in SPLIT_NAMES},
        tuple(notes),
    )


def stratified_order(strata: npt.NDArray[np.int64], seed: int) -> Indices:
    """Positions (N,) in an order that spreads every stratum evenly from beginning to end.

    The i-th of a stratum's m members, shuffled, stands at (i + u) / m, with one uniform u per stratum.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(strata))
    by_stratum = shuffled[np.argsort(strata[shuffled], kind="stable")]
    _, starts, counts = np.unique(strata[by_stratum], return_index=True, return_counts=True)
    rank = np.arange(len(strata)) - np.repeat(starts, counts)
    place = (rank + np.repeat(generator.random(len(counts)), counts)) / np.repeat(counts, counts)
    return by_stratum[np.argsort(place, kind="stable")]


def row_digests(rows: npt.NDArray[Any]) -> Digests:
    """Content hash (N,) of each row of an array."""
    rows = np.ascontiguousarray(rows)
    joined = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    return np.frombuffer(joined, dtype=np.dtype("V16"))


def split_hash(columns: Mapping[str, Sequence[npt.NDArray[Any]]]) -> str:
    """One hash of what the splits hold: for each split its content hashes, labels and groups, in order."""
    digest = hashlib.sha256()
    for split in SPLIT_NAMES:
        for column in columns[split]:
            digest.update(f"{split}/{column.dtype.str}/{len(column)}/".encode())
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:32]


def _without_copies_across(pools: Mapping[str, Pool], plan: SplitPlan) -> tuple[dict[str, Digests], list[str]]:
    """Digests of each pool, ``_GONE`` where a pool for a later split has the same input; and notes on copies."""
    # Test samples are the most precious: what they contain disappears from the pools before them.
    names = list(dict.fromkeys(plan.parts()[split][0] for split in reversed(SPLIT_NAMES)))
    digests, notes = {}, []
    taken: set[bytes] = set()
    for name in names:
        digests[name] = pools[name].samples.digests()
        content = digests[name].tolist()
        elsewhere = np.array([value in taken for value in content], dtype=bool)
        part = f"of part '{name}' " if len(names) > 1 else ""
        if elsewhere.any():
            digests[name] = np.where(elsewhere, _GONE, digests[name])
            notes.append(f"{elsewhere.sum()} inputs {part}are copies of inputs for a later split and were left out.")
        _, kind, counts = np.unique(digests[name], return_inverse=True, return_counts=True)
        copied = (counts[kind] > 1) & ~elsewhere
        if copied.any():
            notes.append(f"{copied.sum()} inputs {part}have copies; copies were kept in one split.")
            labels = np.unique(np.stack([kind[copied], pools[name].labels[copied]]), axis=1)[0]
            n_contradicting = int((np.unique(labels, return_counts=True)[1] > 1).sum())
            if n_contradicting:
                notes.append(f"{n_contradicting} inputs {part}have copies with another label.")
        taken.update(content)
    return digests, notes


_GONE = np.zeros((), dtype=np.dtype("V16"))


def _divide_pool(pool: Pool, digests: Digests, sizes: Mapping[SplitName, float], seed: int) -> dict[SplitName, Indices]:
    present = np.flatnonzero(digests != _GONE)
    groups = np.zeros(len(pool), dtype=np.int64) if pool.groups is None else pool.groups.astype(np.int64)
    strata = pool.labels[present] * (int(groups.max(initial=0)) + 1) + groups[present]
    order = present[stratified_order(strata, seed)]

    cuts = np.cumsum(list(sizes.values())) / sum(sizes.values()) * len(order)
    home = np.searchsorted(np.rint(cuts), np.arange(len(order)), side="right")
    # A copy goes where the first of its kind went.
    _, first, kind = np.unique(digests[order], return_index=True, return_inverse=True)
    home = home[first][kind]
    return {split: order[home == position] for position, split in enumerate(sizes)}


def _check_column(pools: Mapping[str, Pool], used: Mapping[str, Digests], by: str) -> None:
    """See that all pools have a column and share none of its values: what is divided already can't be put right."""
    home: dict[str, str] = {}
    for name in used:
        if by not in pools[name].metadata:
            there = ", ".join(pools[name].metadata) or "none"
            raise UserError(
                f"Splits are to be by '{by}', which the samples don't have; name it under metadata ({there})."
            )
        for value in {str(value) for value in pools[name].metadata[by].tolist()}:
            if (other := home.setdefault(value, name)) != name:
                raise UserError(
                    f"Splits are to be by '{by}', and its value {value} is in the parts '{other}' and '{name}'; take "
                    "the splits from one part, or divide the parts by it."
                )


def _divide_whole(
    pool: Pool, digests: Digests, sizes: Mapping[SplitName, float], seed: int, by: str
) -> dict[SplitName, Indices]:
    """Divide so that all samples with one value of a column, and all copies of one input, are in one split.

    The largest come first, each where the numbers of the classes then are nearest to what they should be.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    present = np.flatnonzero(digests != _GONE)
    texts = np.array([str(value) for value in pool.metadata[by].tolist()])
    values = np.unique(texts[present], return_inverse=True)[1]
    contents = np.unique(digests[present], return_inverse=True)[1]
    n_values = int(values.max(initial=-1)) + 1
    size = n_values + int(contents.max(initial=-1)) + 1
    links = coo_matrix((np.ones(len(present)), (values, n_values + contents)), (size, size))
    together = connected_components(links, directed=False)[1][values]  # one number for all that must stay together

    n_classes = int(pool.labels.max(initial=0)) + 1
    counts = np.zeros((int(together.max(initial=-1)) + 1, n_classes))
    np.add.at(counts, (together, pool.labels[present]), 1)
    shares = np.array(list(sizes.values())) / sum(sizes.values())
    wanted = shares[:, None] * counts.sum(axis=0)
    have, home = np.zeros_like(wanted), np.zeros(len(counts), dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    for own in shuffled[np.argsort(-counts[shuffled].sum(axis=1), kind="stable")]:
        after = np.square(have + counts[own] - wanted).sum(axis=1) - np.square(have - wanted).sum(axis=1)
        home[own] = int(np.argmin(after / np.maximum(wanted.sum(axis=1), 1)))
        have[home[own]] += counts[own]
    result: dict[SplitName, Indices] = {}
    for place, split in enumerate(sizes):
        rows = present[home[together] == place]
        result[split] = rows[stratified_order(pool.labels[rows], seed)]
    return result
