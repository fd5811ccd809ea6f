"""A gate for continuous integration: whether a fixer keeps its limits on a subject, as far as the data can say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from analysis.contract.errors import ResultsError
from analysis.findings import trust
from analysis.findings.advise import chosen_subject, name
from analysis.findings.cells import Cell
from analysis.findings.find import find
from analysis.findings.limits import Limits, Standing, Support, judge
from analysis.findings.words import capital, some
from analysis.warehouse.connection import open_results

Verdict = Literal["met", "broken", "undecided"]


@dataclass(frozen=True)
class Gate:
    """Limits held against a fixer on a subject.

    Attributes:
        subject: name of the subject.
        fixer: registry name.
        limits: what was asked for.
        support: the limits one by one; None where there are no figures to hold them against.
        trouble: why nothing can be said, or why it can't be trusted: an outcome that isn't OK, figures that contradict
            each other.
    """

    subject: str
    fixer: str
    limits: Limits
    support: Support | None
    trouble: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Whether all limits are kept for sure, one is broken for sure, or the data cannot decide."""
        if self.support is None or self.trouble or self.support.violations:
            return "broken"
        return "undecided" if self.support.doubts else "met"

    def sentences(self) -> list[tuple[str, Standing]]:
        """One for each limit, or for what stands in the way of all."""
        found: list[tuple[str, Standing]] = [(sentence, "broken") for sentence in self.trouble]
        for check in self.support.checks if self.support else ():
            found.append(
                (f"{capital(_STANDINGS[check.standing])}: {self.fixer} {check} on {self.subject}.", check.standing)
            )
        return found

    def __str__(self) -> str:
        return "\n".join(sentence for sentence, _ in self.sentences())

    def to_json(self) -> dict[str, Any]:
        """For machines: fractions and seconds."""
        checks = self.support.checks if self.support else ()
        return {
            "subject": self.subject,
            "fixer": self.fixer,
            "verdict": self.verdict,
            "checks": [check.to_json() for check in checks],
            "trouble": list(self.trouble),
        }

    def to_junit(self, *, undecided_fails: bool = True) -> str:
        """JUnit's XML, a case for each limit.

        Args:
            undecided_fails: whether a limit that the data cannot decide is a failure, or skipped.
        """
        suite = ElementTree.Element("testsuite", name=f"fixstudy {self.fixer} on {self.subject}")
        cases = [(sentence, standing, "trouble") for sentence, standing in self.sentences()[: len(self.trouble)]]
        checks = self.support.checks if self.support else ()
        told = self.sentences()[len(self.trouble) :]
        cases += [(sentence, standing, check.name) for (sentence, standing), check in zip(told, checks, strict=True)]
        for sentence, standing, limit in cases:
            case = ElementTree.SubElement(suite, "testcase", classname=f"{self.subject}.{self.fixer}", name=limit)
            if standing != "met":
                kind = "failure" if standing == "broken" or undecided_fails else "skipped"
                ElementTree.SubElement(case, kind, message=sentence)
        kinds = [len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "skipped")]
        suite.attrib |= {"tests": str(len(cases)), "failures": str(kinds[0]), "skipped": str(kinds[1])}
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


_STANDINGS: dict[Standing, str] = {
    "met": "kept",
    "broken": "broken",
    "undecided": "the data cannot decide",
    "unknown": "not measured",
}


def check(results: str | Path, subject: str, fixer: str, limits: Limits) -> Gate:
    """Hold a fixer on a subject against limits.

    Args:
        results: the study's folder, or a URI of one.
        subject: name of the subject; may be empty when the study has only one.
        fixer: registry name or abbreviation.
        limits: what it may cost, and what it must reach.

    Raises:
        ResultsError: the results can't be read, or have no such subject or fixer.
    """
    with open_results(results) as con:
        found = chosen_subject(find(con), subject, str(results))
        doubted = [problem for problem in trust.problems(con) if problem.is_error and problem.concerns(found.name)]
    cell = next((cell for cell in found.cells if fixer in (cell.fixer, cell.abbreviation)), None)
    if cell is None:
        known = some([cell.fixer for cell in found.cells], 10) or "none yet"
        raise ResultsError(f"The study in {results} has no fixer '{fixer}' on {found.name}; it has {known}.")
    trouble = tuple(trust.sentences(doubted))
    if not cell.is_ok:
        return Gate(found.name, cell.fixer, limits, None, (_no_figures(cell), *trouble))
    return Gate(found.name, cell.fixer, limits, judge(cell, limits), trouble)


def _no_figures(cell: Cell) -> str:
    reason = f": {cell.reason.rstrip('.')}" if cell.reason else ""
    return f"{name(cell)} gives no usable model on {cell.subject} ({cell.outcome}{reason})."
