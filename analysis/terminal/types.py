"""`fixstudy types`: what kinds of failures a study found, in words."""

from pathlib import Path

from analysis.contract.errors import UserError
from analysis.findings.failure_types import TypeGrouping, type_groupings
from analysis.warehouse.connection import open_results


def describe_types(results: str | Path, subject: str | None = None) -> str:
    """How many types each grouping found, what is in each, which are worth repairing, and what it costs.

    Args:
        results: the study's folder or URI.
        subject: only this one; all when not given.

    Raises:
        UserError: the study has no failure types, or none of that subject.
    """
    with open_results(results, datasets=("failure_types", "type_trials", "type_matrix")) as con:
        found = type_groupings(con)
    if not found:
        raise UserError(f"{results} has no failure types; name groupings under failure_types in its study file.")
    own = [one for one in found if subject in (None, one.subject)]
    if not own:
        there = ", ".join(sorted({one.subject for one in found}))
        raise UserError(f"{results} has no failure types of '{subject}'; there are those of {there}.")
    return "\n\n".join(_paragraph(one) for one in own) + "\n"


def _paragraph(one: TypeGrouping) -> str:
    quality = one.quality
    lines = [f"{one.subject} by {one.name}: {len(one.types)} types of {len(one.failures)} failures (seed {one.seed})"]
    if quality.get("learnability") is not None:
        independent = quality.get("independence")
        said = "not known for one type" if independent is None else f"{independent:.2f}"
        over = "" if quality["n_seeds"] == 1 else f"; means over {quality['n_seeds']} seeds"
        lines.append(
            f"  Learnability {quality['learnability']:.2f}, Independence {said}, {quality['accuracy_c']:.0%} of what "
            f"was right is kept{over}"
        )
    tuned = [kind for kind in one.types if kind.own is not None]
    for kind in tuned or one.types:
        if kind.own is None:
            worth = "not tuned on"
        else:
            kept = "" if kind.right is None else f", keeps {kind.right:.0%} of what was right"
            worth = f"{'worth repairing' if kind.worth_it else 'not worth it'}: repairs {kind.own:.0%}{kept}"
        lines.append(f"  F{kind.number}, {kind.n} failures, {kind.words}; {worth}")
        if kind.note:
            lines.append(f"    {kind.note}")
    for repair in sorted({row["repair"] for row in one.repairs} - {"matrix"}):
        cost = {row["type_of_test"]: row["accuracy"] for row in one.repairs if row["repair"] == repair}
        types = [accuracy for test, accuracy in cost.items() if test.isdigit()]
        repaired = f"repairs {sum(types) / len(types):.0%} of a type on average" if types else "repairs nothing"
        kept = f", keeps {cost['C']:.0%} of what was right" if "C" in cost else ""
        lines.append(f"  {repair}: {repaired}{kept}")
    if tuned and len(tuned) < len(one.types):
        lines.append(f"  {len(one.types) - len(tuned)} more types weren't tuned on")
    return "\n".join([*lines, *(f"  {sentence}" for sentence in one.unmet)])
