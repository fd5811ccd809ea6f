"""Which fixer to use on a subject, in words: the best RR among those that stay within limits of harm and time.

The rule is simple on purpose, so that a reader can redo it by hand: of the fixers whose repairs are measurable and
whose NFR, rise of ASR and time stay within the limits by their estimates, take the one with the highest RR. Around it
stands what the rule can't know: whose interval crosses a limit, how close the runner-up is, and who couldn't run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from analysis.contract.errors import ResultsError
from analysis.findings import trust
from analysis.findings.cells import Cell, Findings, Subject
from analysis.findings.find import find
from analysis.findings.limits import Limits, Support, judge
from analysis.findings.words import NBSP, capital, conjunction, number, percent, seconds, some, span
from analysis.statistics.paired import Interval

__all__ = ["Advice", "Limits", "Support", "advise", "decide", "interval_json", "name"]

_LISTED: Final = 3
"""Fixers named one by one before the rest is counted."""


_NO_ASR: Final = "ASR was not measured here (no attack, or data that attacks don't apply to), so nothing limits it."


@dataclass(frozen=True, repr=False)
class Advice:
    """An answer for one subject.

    Attributes:
        subject: name of the subject.
        limits: what was allowed.
        chosen: the recommended fixer, None when none qualifies.
        runner_up: the next best within the limits.
        certain: the best whose whole intervals are within the limits, None when there is none.
        difference: RR of chosen - runner-up with its 95 % interval.
        rejected: fixers that repair measurably and are beyond a limit by an estimate, highest RR first.
        lead: the answer, in how many seeds it held, and whether the data can decide about the limits.
        details: more sentences: who would repair more and is beyond a limit, side effects, the runner-up, who is surely
            within the limits.
        others: who else was passed over, who couldn't run, and why.
        caveats: what the data cannot tell, the same for most subjects of a study.
    """

    subject: str
    limits: Limits
    chosen: Support | None
    runner_up: Support | None
    certain: Support | None
    difference: Interval | None
    rejected: tuple[Support, ...]
    lead: str
    details: tuple[str, ...]
    others: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    @property
    def is_decided(self) -> bool:
        """Whether the data tell the recommended fixer from its runner-up and from the limits, and it held in all seeds.

        Without a recommendation, whether all that repair are surely beyond a limit.
        """
        better = self.rejected
        if self.chosen is not None:
            repaired = _estimate(self.chosen.cell.repair_rate)
            better = tuple(v for v in better if _estimate(v.cell.repair_rate) > repaired)
        if any(support.within_limits == "undecided" for support in better):
            return False
        if self.chosen is None:
            return bool(better)
        if _unusable(self.chosen.cell):
            return False
        return self.chosen.within_limits == "yes" and (self.difference is None or self.difference.low > 0)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.subject}: {self.lead}",
                *(f"- {sentence}" for sentence in (*self.details, *self.others, *self.caveats)),
                *self._asked(),
            ]
        )

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return str(self)

    def _asked(self) -> Iterable[str]:
        """The limits, where the answer depends on them."""
        if self.chosen is not None or self.rejected:
            yield f"Asked for: the fixer with the highest RR that {self.limits}; other limits may give another answer."

    def to_json(self) -> dict[str, Any]:
        """The answer for machines: fractions, and intervals as {low, estimate, high}."""
        return {
            "subject": self.subject,
            "limits": {
                "max_nfr": self.limits.max_nfr,
                "max_asr_rise": self.limits.max_asr_rise,
                "max_time_seconds": self.limits.max_time,
            },
            "decided": self.is_decided,
            "recommended": _option(self.chosen),
            "runner_up": _option(self.runner_up),
            "surely_within_limits": _option(self.certain),
            "repair_rate_difference": interval_json(self.difference),
            "passed_over": [_option(support) for support in self.rejected],
            "answer": self.lead,
            "details": list(self.details),
            "others": list(self.others),
            "caveats": list(self.caveats),
        }


def advise(
    results: str | Path,
    subject: str,
    max_nfr: float = Limits.max_nfr,
    max_asr_rise: float | None = Limits.max_asr_rise,
    max_time: float | None = None,
) -> Advice:
    """Which fixer to use on a subject.

    Args:
        results: the study's folder.
        subject: name of the subject; may be empty when the study has only one.
        max_nfr: largest NFR, a fraction of all test samples.
        max_asr_rise: largest rise of ASR, a difference of fractions, None for any; not applied where no fixer's was
            measured.
        max_time: longest median time of the fix in seconds, None for any.

    Raises:
        ResultsError: the folder can't be read, or the study has no such subject.
    """
    from analysis.warehouse.connection import open_results

    with open_results(results) as con:
        found = chosen_subject(find(con), subject, str(results))
        doubted = [problem for problem in trust.problems(con) if problem.is_error and problem.concerns(found.name)]
    advice = decide(found, Limits(max_nfr, max_asr_rise, max_time))
    return replace(advice, caveats=(*advice.caveats, *trust.sentences(doubted)))


def chosen_subject(findings: Findings, name: str, results: str) -> Subject:
    """The subject of that name, or the only one where none is named.

    Raises:
        ResultsError: there is none of that name, or none is named and there are several.
    """
    names = [subject.name for subject in findings.subjects]
    if not name and len(names) == 1:
        return findings.subjects[0]
    subject = findings.subject(name)
    if subject is None:
        known = f"it has {some(names, 10)}" if names else "it has none yet"
        asked = f"no subject '{name}'" if name else "more than one subject, and none was named"
        raise ResultsError(f"The study in {results} has {asked if names else 'no subject to advise on'}; {known}.")
    return subject


def decide(subject: Subject, limits: Limits | None = None) -> Advice:
    """The answer for one subject.

    Args:
        subject: from `analysis.findings.find.find`.
        limits: what a fix may cost; the defaults of `Limits` when not given.
    """
    limits = limits or Limits()
    asked = limits.max_asr_rise is not None
    if asked and subject.ok and all(cell.asr_rise is None for cell in subject.ok):
        # No attack was asked for, or none applies to such data: that is no doubt about any of the fixers.
        limits = replace(limits, max_asr_rise=None)
    supports = sorted(
        (judge(cell, limits) for cell in subject.ok),
        key=lambda v: (-_estimate(v.cell.repair_rate), _estimate(v.cell.negative_flip_rate), v.cell.fixer),
    )
    repairing = [v for v in supports if v.cell.trade_off != "d"]
    within = [v for v in repairing if v.is_within]
    rejected = tuple(v for v in repairing if not v.is_within)
    chosen = within[0] if within else None
    runner_up = within[1] if len(within) > 1 else None
    certain = next((v for v in within if v.within_limits == "yes"), None)
    passed = tuple(_passed_over(chosen, rejected))
    without_asr = asked and limits.max_asr_rise is None
    difference = None
    if chosen and runner_up:
        difference = subject.difference(chosen.cell, runner_up.cell)["repair_rate"]
    return Advice(
        subject.name,
        limits,
        chosen,
        runner_up,
        certain,
        difference,
        rejected,
        _lead(subject, chosen, rejected),
        (*passed[:1], *_details(chosen, runner_up, certain, difference), *([_NO_ASR] if without_asr else [])),
        (*passed[1:], *_failures(subject)),
        tuple(_caveats(chosen)),
    )


def _lead(subject: Subject, chosen: Support | None, rejected: Sequence[Support]) -> str:
    if chosen is not None:
        use = f"Use {name(chosen.cell)}: it {_repairs(chosen.cell)}{_and_breaks(chosen)}.{_unusable(chosen.cell)}"
        if not chosen.doubts:
            return use
        return f"{use} It may meet the limits, but the data cannot decide: it {conjunction(chosen.doubts)}."
    if not subject.cells:
        if subject.is_adapting:
            return "No final trial has finished on this subject yet; so far there is only adaptation."
        return "No fixer has been run on this subject yet."
    if subject.has_nothing_to_repair:
        return "The original fails on no test sample: there is nothing to repair."
    if not subject.ok:
        return "Keep the original model: no fixer gave a usable model here."
    if rejected:
        best = rejected[0]
        none = "surely stays" if any(v.within_limits == "undecided" for v in rejected) else "stays"
        return (
            f"Keep the original model: no fixer {none} within the limits. "
            f"{name(best.cell)} {_repairs(best.cell)}{best.reservation}."
        )
    return "Keep the original model: no fixer repairs more of the failures than could be chance."


def _details(
    chosen: Support | None, runner_up: Support | None, certain: Support | None, difference: Interval | None
) -> Iterable[str]:
    if chosen is not None:
        if sides := _side_effects(chosen.cell):
            yield f"{capital(sides)}."
        if runner_up is not None and difference is not None:
            said = f"{number(100 * difference.estimate)} points of RR ({span(difference)})"
            tail = f"a lead of {said}" if difference.low > 0 else f"they differ by {said}, so the data cannot decide"
            other = runner_up.cell
            doubt = _unusable(other)
            doubt += f" It may meet the limits: it {conjunction(runner_up.doubts)}." if runner_up.doubts else ""
            yield f"Runner-up: {name(other)} repairs {_rate(other)}{_and_breaks(runner_up)}; {tail}.{doubt}"
        if chosen.doubts and certain is not None and certain is not runner_up:
            best = certain.cell
            yield f"Surely within the limits: {name(best)} repairs {_rate(best)} and {_breaks(best)}.{_unusable(best)}"
        elif chosen.doubts and certain is None:
            yield "No fixer that repairs measurably is surely within the limits."


def _passed_over(chosen: Support | None, rejected: Sequence[Support]) -> Iterable[str]:
    """Who repairs more than the chosen one and is beyond a limit."""
    # Without a choice the lead has named the first of the rejected already.
    passed = [
        support
        for support in rejected[0 if chosen else 1 :]
        if chosen is None or _estimate(support.cell.repair_rate) > _estimate(chosen.cell.repair_rate)
    ]
    for support in passed[:_LISTED]:
        more = "repairs more," if chosen else "repairs"
        yield f"{name(support.cell)} {more} {_rate(support.cell)}{support.reservation}."
    if len(passed) > _LISTED:
        rest = [support.cell for support in passed[_LISTED:]]
        verb, whose = (
            ("repairs", "is beyond a limit by its estimate")
            if len(rest) == 1
            else ("repair", "are beyond a limit by their estimates")
        )
        yield f"{_names(rest)} {verb}{' more too' if chosen else ''} but {whose}."


def _caveats(chosen: Support | None) -> Iterable[str]:
    if chosen is None:
        return
    if len(chosen.cell.ok_runs) == 1:
        yield "One seed only: how much another run would differ is not known."


def _failures(subject: Subject) -> Iterable[str]:
    """Who has no usable model here, with the reason; fixers with the same reason share a sentence."""
    endings = {
        "UNADAPTABLE": "could not run",
        "FAILURE": "did not finish",
        "CORRUPTED": "ruined the model",
        "OK": "gave no figures",
    }
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in subject.cells:
        if not cell.is_ok:
            groups.setdefault((cell.outcome, (cell.reason or "").strip()), []).append(cell)
    for (outcome, reason), cells in list(groups.items())[:_LISTED]:
        why = reason.removeprefix(f"{cells[0].abbreviation} can't be applied: ").rstrip(".")
        yield f"{_names(cells)} {endings[outcome]}" + (f": {why}." if why else ".")
    if len(groups) > _LISTED:
        rest = [cell for cells in list(groups.values())[_LISTED:] for cell in cells]
        yield f"No usable model either from {_names(rest)}; the reasons are under Outcomes."


def name(cell: Cell) -> str:
    """How a fixer is called in a sentence: the study's abbreviation, with the registry name where it says more."""
    plain = cell.fixer.replace("_", "").casefold()
    if cell.abbreviation.casefold() in (cell.fixer.casefold(), plain):
        return cell.abbreviation
    return f"{cell.abbreviation} ({cell.fixer})"


def _rate(cell: Cell) -> str:
    return (
        f"{percent(cell.repair_rate.estimate)} ({span(cell.repair_rate)})" if cell.repair_rate else "an unknown share"
    )


def _repairs(cell: Cell) -> str:
    failures = f"the {cell.n_wrong} failures" if cell.n_wrong else "the failures"
    return f"repairs {_rate(cell)} of {failures}"


def _breaks(cell: Cell) -> str:
    rate = cell.negative_flip_rate
    if rate is None:
        return "its breakage is not known"
    if rate.estimate == 0:
        return "breaks nothing that worked"
    return f"breaks {percent(rate.estimate)} ({span(rate)}) of all test samples"


def _and_breaks(support: Support) -> str:
    """What it breaks, unless its doubts are about to say so."""
    return "" if support.doubts_breakage else f" and {_breaks(support.cell)}"


def _unusable(cell: Cell) -> str:
    """A sentence on the seeds that its figures leave out, after a space; empty when all are OK."""
    others = {outcome: n for outcome, n in cell.outcomes.items() if outcome != "OK"}
    if not others:
        return ""
    counts = conjunction([f"{n} {outcome}" for outcome, n in others.items()])
    return f" In {sum(others.values())} of {cell.n_seeds} seeds it gave no usable model: {counts}."


def _side_effects(cell: Cell) -> str:
    parts = []
    if cell.accuracy is not None and cell.accuracy_original is not None:
        parts.append(f"accuracy {_moves(cell.accuracy_original, cell.accuracy.estimate)}")
    if cell.asr is not None and cell.asr_original is not None and cell.asr_rise is not None:
        noise = " (within its error)" if abs(cell.asr_rise.estimate) <= cell.asr_rise.half_width else ""
        parts.append(f"ASR {_moves(cell.asr_original, cell.asr.estimate)}{noise}")
    if cell.aaod is not None and cell.aaod_original is not None and cell.aaod_rise is not None:
        rise = cell.aaod_rise
        noise = " (within its error)" if rise.estimate and abs(rise.estimate) <= rise.half_width else ""
        before, after = f"{cell.aaod_original:.3f}", f"{cell.aaod.estimate:.3f}"
        verb = "rises" if rise.estimate > 0 else "falls"
        parts.append(f"AAOD stays at {after}" if before == after else f"AAOD {verb} from {before} to {after}{noise}")
    if cell.seconds is not None:
        parts.append(f"the fix takes {seconds(cell.seconds)}")
    return ", ".join(parts)


def _moves(before: float, after: float) -> str:
    if f"{100 * before:.1f}" == f"{100 * after:.1f}":
        return f"stays at {100 * after:.1f}{NBSP}%"
    return f"{'rises' if after > before else 'falls'} from {100 * before:.1f} to {100 * after:.1f}{NBSP}%"


def _names(cells: Sequence[Cell]) -> str:
    return conjunction([name(cell) for cell in cells])


def _estimate(interval: Interval | None) -> float:
    return interval.estimate if interval else 0.0


def interval_json(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval for JSON; None for what is unknown, because JSON has no nan."""
    if interval is None:
        return None
    return {key: value if value == value else None for key, value in interval._asdict().items()}


def _option(support: Support | None) -> dict[str, Any] | None:
    if support is None:
        return None
    cell = support.cell
    return {
        "fixer": cell.fixer,
        "abbreviation": cell.abbreviation,
        "level": cell.level,
        "params": cell.params,
        "seeds": len(cell.ok_runs),
        "seeds_run": cell.n_seeds,
        "outcomes": dict(cell.outcomes),
        "repair_rate": interval_json(cell.repair_rate),
        "n_wrong": cell.n_wrong,
        "negative_flip_rate": interval_json(cell.negative_flip_rate),
        "n_test": cell.n_test,
        "accuracy_original": cell.accuracy_original,
        "accuracy_fixed": interval_json(cell.accuracy),
        "n_attacked": cell.n_attacked,
        "asr_rise": interval_json(cell.asr_rise),
        "aaod_rise": interval_json(cell.aaod_rise),
        "fix_seconds": cell.seconds,
        "trade_off": cell.trade_off,
        "within_limits": support.within_limits,
        "checks": [check.to_json() for check in support.checks],
        "violations": list(support.violations),
        "doubts": list(support.doubts),
    }
