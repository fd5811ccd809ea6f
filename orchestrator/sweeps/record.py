"""What a sweep leaves behind: its record beside the rows, and a study file in which its choice is fixed.

``fixstudy adapt study.yaml --fixer arachne --subject mnist`` runs stage one of a study for one fixer and subject alone.
Its trials are those of the whole study, in the same results folder: running the study afterwards doesn't repeat them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fixers
from analysis.contract.errors import UserError
from fixers.fixer import suggest
from orchestrator.storage.store import Store
from orchestrator.study import yaml_text
from orchestrator.study.objectives import COLUMNS, Figures
from orchestrator.study.reading import parse_study
from orchestrator.study.schema import Adaptation, FixerEntry, Study, subject_name
from orchestrator.study.subject_files import with_subjects
from orchestrator.sweeps.sweep import Candidate, Choice


def record_name(fixer: str, subject: str) -> str:
    """Name of the file in the results folder that says what a sweep chose, and why."""
    return f"adaptation-{fixer}-{subject}.json"


def record(entry: FixerEntry, subject: str, choice: Choice) -> dict[str, Any]:
    """The chosen configuration and its runner-ups with their figures on valid and the reason, as JSON values."""
    adapt = entry.adapt or Adaptation()
    return {
        "fixer": entry.name,
        "subject": subject,
        "search": adapt.search,
        "budget": adapt.budget,
        "objective": adapt.objective,
        "chosen": json.loads(choice.best.params),
        "reason": choice.reason,
        "pareto_set": list(choice.pareto),
        "configurations": [_configuration(candidate) for candidate in choice.ranking],
    }


def _configuration(candidate: Candidate) -> dict[str, Any]:
    figures = asdict(candidate.figures)
    return {
        "trial_id": candidate.spec.trial_id,
        "params": json.loads(candidate.spec.params),
        "verdict": candidate.verdict,
        "score": candidate.score,
        "outcome": figures["outcome"],
        "accuracy_valid": figures["accuracy"],
        "repair_rate_valid": figures["repair_rate"],
        "negative_flip_rate_valid": figures["negative_flip_rate"],
        "fix_seconds": figures["fix_seconds"],
    }


def figures_on_valid(store: Store) -> dict[str, Figures]:
    """What the trials of sweeps gave so far, by trial."""
    rows = store.rows(["stage", *COLUMNS])
    return {row["trial_id"]: Figures.of(row) for row in rows if row["stage"] == "adapt"}


@dataclass(frozen=True)
class OneSweep:
    """Stage one of a study for one fixer and subject."""

    fixer: str
    """Name or abbreviation."""
    subject: str

    def of(self, study: Study) -> Study:
        """The study with nothing else in it. An entry that isn't adapted gets a sweep with the defaults.

        Raises:
            UserError: the study doesn't have the fixer or the subject, or runs the fixer over a grid of its own.
        """
        subjects = {subject_name(spec): spec for spec in study.subjects}
        if self.subject not in subjects:
            raise UserError(f"The study has no subject '{self.subject}'{suggest(self.subject, subjects)}")
        try:
            name = fixers.get(self.fixer).name
        except fixers.FixerError as error:
            raise UserError(str(error)) from error
        entries = [entry for entry in study.fixers if entry.name == name]
        adapted = [entry for entry in entries if entry.adapt] or entries
        if not adapted:
            names = {entry.name for entry in study.fixers}
            raise UserError(f"The study has no fixer '{self.fixer}'{suggest(name, names)}")
        if len(adapted) > 1:
            raise UserError(f"The study has {name} {len(adapted)} times; leave adapt in one of these entries only.")
        entry = adapted[0]
        if entry.grid:
            raise UserError(f"The study runs {name} over a grid; put adapt in its place to sweep it on valid.")
        entry = entry if entry.adapt else entry.model_copy(update={"adapt": Adaptation()})
        return study.model_copy(update={"subjects": [subjects[self.subject]], "fixers": [entry]})


def chosen(store: Store, sweep: OneSweep) -> dict[str, Any]:
    """The record of a sweep.

    Raises:
        UserError: there is none, because the fixer can't be applied.
    """
    fixer = fixers.get(sweep.fixer).name
    content = store.read_bytes(record_name(fixer, sweep.subject))
    if content is None:
        reasons = {
            row["reason"]
            for row in store.rows(["fixer", "subject", "outcome", "reason"])
            if (row["fixer"], row["subject"], row["outcome"]) == (fixer, sweep.subject, "UNADAPTABLE")
        }
        raise UserError(" ".join(sorted(reasons)) or f"There is no adaptation of {fixer} to {sweep.subject} yet.")
    found: dict[str, Any] = json.loads(content)
    return found


def lines_of(found: Mapping[str, Any], *, most: int = 5) -> list[str]:
    """A record of a sweep in lines for people: what was chosen, why, and the first runners-up."""
    chosen_params, configurations = found["chosen"], found["configurations"]
    varied = [name for name in chosen_params if len({json.dumps(item["params"][name]) for item in configurations}) > 1]

    def line(item: Mapping[str, Any]) -> str:
        params = ", ".join(f"{name}={item['params'][name]}" for name in varied) or "the default"
        figures = "" if item["accuracy_valid"] is None else f", accuracy on valid {item['accuracy_valid']:.4f}"
        return f"  {params}{figures}: {item['verdict']}"

    more = len(configurations) - most
    return [
        f"{found['fixer']} on {found['subject']}: {found['reason']}.",
        *(line(item) for item in configurations[:most]),
        *([f"  and {more} more in {record_name(found['fixer'], found['subject'])}"] if more > 0 else []),
    ]


def write_study(source: str | Path, target: str | Path, found: Mapping[str, Any]) -> None:
    """Write a study file that runs nothing but the chosen configuration on its subject, with the source's settings.

    Args:
        source: the study file that was adapted.
        target: must lie in the same folder, where relative paths start.
        found: from :func:`chosen`.

    Raises:
        UserError: the target would be the source, lies elsewhere, or can't be written.
    """
    check_target(source, target)
    source = Path(source)
    text = with_subjects(yaml_text.read_file(source, "study file"), str(source), source.parent)
    data, _ = yaml_text.read(text, str(source))
    data["subjects"] = [spec for spec in data["subjects"] if subject_name(spec) == found["subject"]]
    # Results of its own: those of the source have the sweep's trials and the other fixers'.
    data["study"] = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{data['study']}-{found['fixer']}-{found['subject']}")
    # All parameters are spelt out, so a preset has nothing left to say.
    data["fixers"] = [{"name": found["fixer"], "params": dict(found["chosen"])}]
    data.pop("preset", None)
    epsilon = data["attack"].get("epsilon") if isinstance(data.get("attack"), dict) else None
    if epsilon:
        data["attack"]["epsilon"] = {name: value for name, value in epsilon.items() if name == found["subject"]}
    text = (
        f"# {found['fixer']} adapted to {found['subject']} by fixstudy adapt {source.name}\n"
        f"# Why: {found['reason']}.\n" + yaml_text.written(data)
    )
    parse_study(text, str(target), Path(target).parent)
    Path(target).write_text(text, encoding="utf-8")


def check_target(source: str | Path, target: str | Path) -> None:
    """Refuse a place for :func:`write_study` before hours are spent.

    Raises:
        UserError: the target would be the source, lies elsewhere, or can't be written.
    """
    before, after = Path(source).resolve(), Path(target).resolve()
    if before == after:
        raise UserError(f"{target} is the study file itself; give --write another name.")
    if before.parent != after.parent:
        raise UserError(f"Paths in a study file start in its folder: write the adapted one into {before.parent}, too.")
    try:
        existed = after.exists()
        # Only opening a file tells whether it can be written: permissions say nothing of a full or read-only disk.
        after.open("a").close()
        if not existed:
            after.unlink()
    except OSError as error:
        raise UserError(
            f"{target} can't be written ({error.strerror}); mend that or give --write another name."
        ) from error
