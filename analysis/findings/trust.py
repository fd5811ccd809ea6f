"""What the results say against themselves, in the words that every form of a report carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.findings import words
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Problem:
    """One finding of the query `integrity`."""

    severity: str
    """error: the figures aren't to be trusted; warning: comparisons with them are uneven."""
    subject: str | None
    fixer: str | None
    trial_id: str | None
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether figures contradict each other."""
        return self.severity == "error"

    @property
    def place(self) -> str:
        """Where it is: a fixer on a subject, a trial, or the whole study."""
        return " on ".join(part for part in (self.fixer, self.subject) if part) or self.trial_id or "the study"

    def concerns(self, subject: str, fixer: str | None = None) -> bool:
        """Whether figures of a subject (of one fixer on it) rest on what is contradicted."""
        return self.subject in (None, subject) and (fixer is None or self.fixer in (None, fixer))


def problems(con: "duckdb.DuckDBPyConnection") -> list[Problem]:
    """All findings of the query `integrity`, errors first.

    Args:
        con: from `analysis.open`.
    """
    names = Problem.__dataclass_fields__
    return [Problem(**{name: row[name] for name in names}) for row in answer(con, "integrity").to_pylist()]


def sentences(found: Sequence[Problem]) -> list[str]:
    """One sentence per kind of finding, with the places."""
    grouped: dict[tuple[bool, str], list[str]] = {}
    for problem in found:
        grouped.setdefault((not problem.is_error, problem.detail), []).append(problem.place)
    return [
        f"{'Uneven' if uneven else 'Not to be trusted'}: {words.some(list(dict.fromkeys(places)), 5)}. {detail}"
        for (uneven, detail), places in sorted(grouped.items())
    ]
