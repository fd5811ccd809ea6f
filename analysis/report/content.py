"""What a report says, whatever its format."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from analysis.contract.errors import UserError
from analysis.contract.folder import Folder
from analysis.contract.schema import SCHEMA_VERSION
from analysis.findings import advise, words
from analysis.findings.cells import UNFOLDED, Findings
from analysis.report import sections
from analysis.report.document import Answer, Code, Document, Fold, Paragraph, Section, Settings, Trials
from analysis.report.sections.utilisation import utilisation
from analysis.report.warnings import left_out, study_warnings
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb


TRIAL_COLUMNS: Final = (
    ("trial_id", "Trial", None), ("stage", "Stage", None), ("subject", "Subject", None), ("fixer", "Fixer", None),
    ("seed", "Seed", 0), ("outcome", "Outcome", None), ("reason_code", "Kind", None), ("accuracy_fixed", "ACC %", 2),
    ("repair_rate", "RR %", 2), ("negative_flip_rate", "NFR %", 2), ("asr_fixed", "ASR %", 1),
    ("aaod_fixed", "AAOD", 4),
    ("accuracy_valid_fixed", "Valid ACC %", 2), ("fix_seconds", "Fix, s", 2), ("attempts", "Attempts", 0),
    ("params", "Hyper-parameters", None), ("reason", "Reason", None),
)  # fmt: skip
"""Columns of the table of all trials: name, title, and digits of a number."""
_NAMED: Final = 4
"""Fixers that a sentence about all subjects names."""


def build(
    con: "duckdb.DuckDBPyConnection", findings: Findings, results: str | Path = "", *, pictures: bool = False
) -> Document:
    """Everything that the page says.

    Args:
        con: from `analysis.open`.
        findings: of the same study.
        results: the results folder, for the study file and pictures; they are left out where it isn't local.
        pictures: whether to show test images.
    """
    folder = Path(results) if results and Path(results).is_dir() else None
    body = [
        sections.outcomes(findings),
        sections.effectiveness(findings),
        sections.trade_offs(findings),
        sections.efficiency(findings),
        sections.complementarity(findings, con),
        sections.classes(findings, con),
        sections.examples(findings, con, folder if pictures else None),
        sections.failure_types(con, pictures),
        sections.comparison(findings),
        sections.seeds(findings),
        sections.adaptation(findings, con),
        sections.settings(findings, con),
        *utilisation(con),
        *_appendix(con, findings, folder),
    ]
    shown = {subject.name for subject in findings.detailed}
    others = [subject for subject in findings.subjects if subject.name not in shown]
    advices = [advise.decide(subject) for subject in (*findings.detailed, *others)]
    answers = [_answer(advice) for advice in advices]
    if not answers:
        answers = [Answer("this study", findings.nothing_yet, ("fixstudy run adds trials.",), (), False)]
    return Document(
        title=findings.study or "fixstudy",
        facts=_facts(findings),
        answers=answers[:UNFOLDED],
        overall=_overall(advices),
        question=f"Of the fixers that repair measurably, the one with the highest RR that {advise.Limits()}.",
        rule=(
            "The limits are held against the estimates; where an interval reaches across a limit, the answer says so. "
            "RR is the share of failures repaired, NFR the share of test samples broken, ASR the share of attacked "
            "images on which the attack succeeds; brackets are 95 % intervals. For other limits: fixstudy advise."
        ),
        warnings=[*study_warnings(con, findings), *left_out(findings)],
        sections=[section for section in body if section.blocks],
        more_answers=answers[UNFOLDED:],
    )


def _overall(advices: Sequence[advise.Advice]) -> str | None:
    """How often each fixer is the answer; None for so few subjects that their answers are seen at a glance."""
    if len(advices) <= 2:
        return None
    chosen = Counter(advise.name(advice.chosen.cell) for advice in advices if advice.chosen is not None)
    counts = sorted(chosen.items(), key=lambda item: (-item[1], item[0]))
    if len(counts) == len(advices):
        return f"No two of the {len(advices)} subjects have the same answer."
    parts = [f"{name} for {n}" for name, n in counts[:_NAMED]]
    if rest := sum(n for _, n in counts[_NAMED:]):
        parts.append(f"another fixer for {rest}")
    if none := len(advices) - chosen.total():
        parts.append(f"to keep the original model for {none}")
    return f"Of {len(advices)} subjects, the answer is {words.conjunction(parts)}."


def _answer(advice: advise.Advice) -> Answer:
    # Its caveats are about the study, and said once for all answers.
    return Answer(advice.subject, advice.lead, advice.details, advice.others, advice.chosen is not None)


def _facts(findings: Findings) -> list[str]:
    overview = findings.overview

    def count(n: int, noun: str) -> str:
        return f"{n:,} {noun}{'' if n == 1 else 's'}".replace(",", "\u202f")

    facts = [
        count(overview["n_fixers"], "fixer"),
        count(len(findings.subjects), "subject"),
        count(overview["n_trials"], "trial"),
        *([count(overview["n_seeds"], "seed")] if findings.cells else []),
    ]
    first, last = overview["first_day"], overview["last_day"]
    if first:
        facts.append(first if first == last else f"{first} to {last}")
    if overview["busy_seconds"]:
        facts.append(f"{words.seconds(overview['busy_seconds'])} of fixing and evaluating")
    return facts


def _appendix(con: "duckdb.DuckDBPyConnection", findings: Findings, folder: Path | None) -> list[Section]:
    blocks: list[Any] = []
    study = _study_file(folder) if folder else None
    for subject in findings.detailed:
        if subject.info:
            known = [
                (name.replace("_", " "), _plain(value)) for name, value in subject.info.items() if value is not None
            ]
            blocks.append(Fold(f"Subject {subject.name}", [Settings(known)], open=len(findings.subjects) == 1))
    overview = findings.overview
    named = (
        ("fixstudy", "fixstudy_versions"),
        ("torch", "torch_versions"),
        ("device", "devices"),
        ("attack", "attacks"),
    )
    entries = [(name, overview[column]) for name, column in named if overview[column]]
    if overview["n_hosts"]:
        entries.append(("nodes", str(overview["n_hosts"])))
    if folder and (known_commit := _commit(folder)):
        entries.append(("commit of the study file", known_commit))
    entries.append(("results schema", f"version {SCHEMA_VERSION}"))
    blocks.append(Fold("Versions and settings", [Settings(entries)], open=True))
    versions = [(row["fixer"], row["code_versions"]) for row in answer(con, "code_versions").to_pylist()]
    if versions:
        blocks.append(Fold("Code version of every fixer", [Settings(versions)], open=False))
    if study:
        blocks.append(Fold("The study file, as run", [Code(study)], open=False))
    return [
        Section("setup", "Subjects, versions, settings", blocks, ("overview", "code_versions", "integrity")),
        Section(
            "all-trials",
            "All trials",
            [
                Paragraph("Hyper-parameters are chosen on valid, and only the chosen ones are compared above."),
                Trials([title for _, title, _ in TRIAL_COLUMNS]),
            ],
            ("all_trials",),
        ),
    ]


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _study_file(folder: Path) -> str | None:
    """The study as run, when the folder has it."""
    path = folder / "study.yaml"
    # A link may lead to anything on this machine, and a report is passed on.
    is_plain = path.is_file() and not path.is_symlink()
    return path.read_text(encoding="utf-8", errors="replace") if is_plain else None


def _commit(folder: Path) -> str | None:
    """The git commit of the study file, when the driver knew it."""
    try:
        found = Folder(folder).read_json("origin.json")["commit"]
    except (OSError, UserError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
