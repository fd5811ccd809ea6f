"""What a study found of failure types: how good each way of dividing is, what is in the types, what repairs cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from analysis.warehouse.queries import rows

if TYPE_CHECKING:
    import duckdb

CORRUPTED_BELOW: Final = 0.9
"""Accuracy on what was right, below which a repair isn't worth it (a relative fall of 10 % from 1)."""
_LARGE: Final = 0.5
"""Share of a type from which on something may name it."""
_CONFUSION: Final = ("label and prediction", "label", "prediction")
_PAIR, *_SIDES = _CONFUSION


@dataclass(frozen=True)
class FailureType:
    """One type of a grouping and seed."""

    number: int
    n: int
    words: str
    """What is in it, as far as the data say."""
    own: float | None
    """Accuracy on it of the model tuned on it."""
    others: float | None
    """Mean accuracy of that model on the other types."""
    right: float | None
    """Its accuracy on what the original gets right."""
    note: str | None
    """What is to be known of that model, as a sentence."""

    @property
    def worth_it(self) -> bool:
        """Whether a repair of it alone helps more often than not, and keeps what was right."""
        return (self.own or 0.0) >= 0.5 and (self.right or 0.0) >= CORRUPTED_BELOW


@dataclass(frozen=True)
class TypeGrouping:
    """The types that one grouping found in the failures of a subject."""

    subject: str
    name: str
    quality: Mapping[str, Any]
    """Of the queries `learnability` and `independence`: means over seeds and both spreads."""
    seed: int
    """The first, of which the rest is: types of another seed are others."""
    types: tuple[FailureType, ...]
    matrix: Mapping[tuple[int, str], tuple[float, int]]
    """Accuracy and samples by type tuned on and type of test."""
    failures: Sequence[Mapping[str, Any]]
    """Rows of `failure_types`."""
    composition: Sequence[Mapping[str, Any]]
    """Rows of the query `type_composition`."""
    repairs: Sequence[Mapping[str, Any]]
    """Rows of the query `type_repairs`."""
    unmet: tuple[str, ...]
    """Why models weren't tuned, as sentences."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """How the types were found."""
        found: Mapping[str, Any] = json.loads(self.failures[0]["facts"]) if self.failures else {}
        return found


def type_groupings(con: "duckdb.DuckDBPyConnection") -> list[TypeGrouping]:
    """What was found of each grouping of each subject, in alphabetical order."""
    told = _by_grouping(con.sql("FROM latest_type_trials ORDER BY trial_id").to_arrow_table().to_pylist())
    if not told:
        return []
    learned = {(row["subject"], row["grouping"]): row for row in rows(con, "learnability")}
    independent = {(row["subject"], row["grouping"]): row for row in rows(con, "independence")}
    failures = _by_grouping(con.sql("FROM latest_failure_types ORDER BY sample_id").to_arrow_table().to_pylist())
    composition = _by_grouping(rows(con, "type_composition"))
    matrix, repairs = _by_grouping(rows(con, "type_matrix")), _by_grouping(rows(con, "type_repairs"))
    found = []
    for key, trials in sorted(told.items()):
        seed = min(row["seed"] for row in trials)
        own = [row for row in composition.get(key, []) if row["seed"] == seed]
        cells = {
            (row["type"], row["type_of_test"]): (row["accuracy"], row["n"])
            for row in matrix.get(key, [])
            if row["seed"] == seed
        }
        notes = {
            row["type"]: row["note"]
            for row in trials
            if row["repair"] == "matrix" and row["seed"] == seed and row["note"]
        }
        independence = independent.get(key, {})
        quality = {
            **learned.get(key, {}),
            **{name: independence.get(name) for name in ("independence",)},
            "independence_over_types": independence.get("spread_over_types"),
            "independence_over_seeds": independence.get("spread_over_seeds"),
        }
        found.append(
            TypeGrouping(
                *key, quality, seed, _types(own, cells, notes), cells,
                [row for row in failures.get(key, []) if row["seed"] == seed], own, repairs.get(key, []),
                tuple(sorted({row["reason"] for row in trials if row["outcome"] == "UNADAPTABLE"})),
            )
        )  # fmt: skip
    return found


def _by_grouping(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        grouped.setdefault((row["subject"], row["grouping"]), []).append(row)
    return grouped


def _types(
    composition: Sequence[Mapping[str, Any]],
    matrix: Mapping[tuple[int, str], tuple[float, int]],
    notes: Mapping[int, str],
) -> tuple[FailureType, ...]:
    found = []
    for number in sorted({row["type"] for row in composition}):
        own = [row for row in composition if row["type"] == number]
        others = [
            accuracy for (tuned, test), (accuracy, _) in matrix.items()
            if tuned == number and test.isdigit() and test != str(number)
        ]  # fmt: skip
        found.append(
            FailureType(
                number, own[0]["n_type"], in_words(own),
                matrix.get((number, str(number)), (None, 0))[0],
                sum(others) / len(others) if others else None,
                matrix.get((number, "C"), (None, 0))[0],
                notes.get(number),
            )
        )  # fmt: skip
    return tuple(found)


def in_words(composition: Sequence[Mapping[str, Any]]) -> str:
    """A type by what at least half of it has in common and the others have least: of confusion, and of metadata."""

    def best(aspects: Sequence[str]) -> Mapping[str, Any] | None:
        large = [row for row in composition if row["aspect"] in aspects and row["share"] >= _LARGE and row["value"]]
        # What all failures have in common names nothing.
        telling = [row for row in large if row["lift"] > 1.05]
        return max(telling, key=lambda row: (row["lift"], row["n"], str(row["value"])), default=None)

    metadata = sorted({row["aspect"] for row in composition} - set(_CONFUSION))
    parts = []
    for row in (best([_PAIR]) or best(_SIDES), best(metadata)):
        if row is not None:
            said = row["value"] if row["aspect"] == "label and prediction" else f"{row['aspect']} {row['value']}"
            parts.append(f"{'mostly ' if row['share'] < 0.9 else ''}{said} ({row['n']} of {row['n_type']})")
    return ", ".join(parts) or "a mixture"
