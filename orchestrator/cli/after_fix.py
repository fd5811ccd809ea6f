"""What ``fixstudy fix`` does after the fix, a mitigation or a certificate, and the figures that it prints."""

import json
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import fixers
from analysis.contract.errors import UserError
from analysis.report.card import model_unchanged
from fixers import mitigations
from fixers.certificates import Budget, Calibration, Ladder, fewest_samples
from orchestrator.base.units import duration
from orchestrator.cli.options import Guard, read_values
from orchestrator.trial.calibration import set_aside
from orchestrator.trial.combine import Combined, Price, certified, mitigated
from orchestrator.trial.trial import Bench, TrialRecord


class Step(ABC):
    """What is done around the fix against what it breaks."""

    def before(self, bench: Bench, console: Console) -> Bench:
        """What the fix is run on.

        Raises:
            UserError: the step can't be taken afterwards.
        """
        return bench

    @abstractmethod
    def after(self, bench: Bench, record: TrialRecord) -> Combined:
        """Take the step.

        Args:
            bench: from :meth:`before`.
            record: of the fix.
        """


@dataclass
class _Mitigate(Step):
    mitigation: mitigations.Mitigation
    same_architecture: bool

    def before(self, bench: Bench, console: Console) -> Bench:
        self.check(len(bench.subject.data.valid))
        return bench

    def after(self, bench: Bench, record: TrialRecord) -> Combined:
        return mitigated(bench, record, self.mitigation)

    def check(self, valid: int) -> None:
        unmet = self.mitigation.unmet(mitigations.Facts(2, self.same_architecture, valid))
        if unmet is not None:
            raise UserError(unmet.reason)


@dataclass
class _Certify(Step):
    budget: Budget
    ladder: Ladder
    share: float
    aside: Calibration | None = None

    def before(self, bench: Bench, console: Console) -> Bench:
        subject, self.aside = set_aside(bench.subject, share=self.share, seed=bench.spec.seed)
        n, fewest = self.aside.n, fewest_samples(self.budget.max_nfr, self.budget.confidence)
        if n < fewest:
            console.print(Text(f"The original will be kept: {self._too_few(n, fewest)}.", style="yellow"))
        return replace(bench, subject=subject)

    def after(self, bench: Bench, record: TrialRecord) -> Combined:
        assert self.aside is not None  # before() was called
        return certified(bench, record, self.aside, self.budget, self.ladder)

    def _too_few(self, n: int, fewest: int) -> str:
        assert self.aside is not None  # before() was called
        share = math.ceil(100 * fewest / round(n / self.share))
        advice = (
            f"give --calibration {share}%" if share <= 60 else f"a repair split of {fewest / self.share:.0f} would do"
        )
        return (
            f"to certify {100 * self.budget.max_nfr:g} % takes at least {fewest} {self.aside.of_what}, and "
            f"{100 * self.share:g} % of the repair split are {n}; {advice}"
        )


def step_after(guard: Guard, fixer: type[fixers.Fixer]) -> Step | None:
    """The step that options ask for; None without one.

    Raises:
        UserError: they contradict each other, or the fixer.
    """
    if guard.mitigation is not None and guard.max_nfr is not None:
        raise UserError("Give either --mitigate or --max-nfr: a mitigated model can't be certified yet.")
    if guard.settings and guard.mitigation is None:
        raise UserError("--set is for a mitigation; name one with --mitigate.")
    if guard.mitigation is not None:
        built = mitigations.get(guard.mitigation).build(read_values(guard.settings))
        step = _Mitigate(built, not fixer.extends_architecture)
        # The data come later; what the fixer alone rules out is said at once.
        step.check(valid=sys.maxsize)
        return step
    if guard.max_nfr is None:
        return None
    for option, value in (
        ("max-nfr", guard.max_nfr),
        ("confidence", guard.confidence),
        ("calibration", guard.calibration),
    ):
        if not 0 < value < 1:
            raise UserError(f"--{option} is more than 0 and less than 100%, but got {value:g}.")
    if guard.ladder == "weights" and fixer.extends_architecture:
        raise UserError(f"--ladder weights needs the original's architecture, which {fixer.name} extends; use outputs.")
    return _Certify(Budget(guard.max_nfr, guard.confidence), guard.ladder, guard.calibration)


def print_figures(record: TrialRecord, combined: Combined | None, console: Console) -> None:
    """Before and after on test, a column for each model, and in words what became of samples."""
    row = record.row
    rows = {"fixed": row}
    if combined is not None:
        rows["mitigated" if combined.certificate is None else "certified"] = combined.record.row
    table = Table(title=f"{row['fixer']} on {row['subject']}, test split of {row['n_test']:,}")
    for column in ("", "original", *rows):
        table.add_column(column, justify="left" if not column else "right")

    def add(head: str, figure: str, form: str) -> None:
        known = [row.get(f"{figure}_original"), *(each.get(f"{figure}_fixed") for each in rows.values())]
        if any(value is not None for value in known):
            table.add_row(head, *("-" if value is None else format(value, form) for value in known))

    add("accuracy", "accuracy", ".2%")
    add(f"attack success (PGD, {row.get('n_attacked')} samples)", "asr", ".1%")
    add("AAOD (unfairness)", "aaod", ".4f")
    if combined is not None:
        for head in ("repaired", "broken"):
            table.add_row(head, "", *(str(each[f"n_{head}"]) for each in rows.values()))
    console.print(table)
    console.print(_told(row), highlight=False)
    if row["reason"]:
        console.print(Text(f"{row['outcome']}: {row['reason']}"))
    notes = json.loads(row["notes"])
    if unchanged := model_unchanged(notes):
        console.print(Text(f"{row['fixer']} {unchanged}", style="yellow"))
    if notes:
        console.print(Text("notes: " + ", ".join(f"{name} = {value}" for name, value in notes.items()), style="dim"))
    if combined is not None:
        _print_combined(row, combined, console)


def _told(row: dict[str, Any]) -> str:
    repaired = "" if row["repair_rate"] is None else f" (RR {row['repair_rate']:.1%})"
    return (
        f"repaired {row['n_repaired']} of {row['n_wrong']} failures{repaired}, "
        f"broke {row['n_broken']} of {row['n_test']} (NFR {row['negative_flip_rate']:.2%}), "
        f"in {duration(row['fix_seconds'])}"
    )


def _print_combined(row: dict[str, Any], combined: Combined, console: Console) -> None:
    other = combined.record.row
    if combined.certificate is not None:
        console.print(Text(str(combined.certificate), style="bold"))
    console.print(f"{other['abbreviation']}: {_price(row, combined.price)}", highlight=False)
    if combined.cross_fitted is not None:
        effect = combined.cross_fitted
        console.print(
            f"on valid, cross-fitted: RR {effect.repair_rate:.1%}, NFR {effect.negative_flip_rate:.2%}", highlight=False
        )
        notes = json.loads(combined.facts["mitigation_notes"])
        if notes:
            told = ", ".join(f"{name} = {value}" for name, value in notes.items())
            console.print(Text(f"calibrated on valid: {told}", style="dim"))
    if other["asr_fixed"] is None and row.get("asr_fixed") is not None:
        console.print(
            Text("No attack on the combined model: a vote hides gradients, so that one would flatter it.", style="dim")
        )
    if other["reason"]:
        console.print(Text(f"{other['outcome']}: {other['reason']}"))


def _price(row: dict[str, Any], price: Price) -> str:
    """In repairs and in work."""
    own = f" (of its own it repairs {price.new_repairs} and breaks {price.new_breaks})"
    has_own = price.new_repairs or price.new_breaks
    return (
        f"undoes {price.undone_breaks} of {row['n_broken']} breaks for {price.lost_repairs} of {row['n_repaired']} "
        f"repairs{own if has_own else ''}, at {price.macs_ratio:.2f} x the multiply-accumulates and "
        f"{price.bytes_ratio:.2f} x the bytes of the original"
    )
