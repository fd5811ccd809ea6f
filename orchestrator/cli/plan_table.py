"""The plan of a study without running anything: no Ray, no training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.base.units import duration
from orchestrator.driver.run import default_results
from orchestrator.planning.cost import CostModel, estimate
from orchestrator.planning.plan import Cell, Plan, make_plan, needs_history, outdated
from orchestrator.storage.store import Store
from orchestrator.study import points
from orchestrator.study.reading import load_study
from orchestrator.study.schema import Study
from orchestrator.study.search_space import space_of
from orchestrator.study.subjects import definitions
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.subjects.originals import cache_file, check_answers
from orchestrator.subjects.reading import roots
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.subject import SubjectData, SubjectDefinition
from orchestrator.trial.loading import load_subject

_UNTRAINED = "untrained-{}"
"""In place of a fingerprint; every subject has its own."""


@dataclass(frozen=True)
class Preview:
    """What ``fixstudy plan`` shows."""

    study: Study
    results: str
    subjects: Mapping[str, LoadedSubject]
    plan: Plan
    cost: CostModel
    outdated: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Rows that the results have of an approach on a subject, from other code of it, where trials are to run."""


def preview(path: str | Path, *, results: str | None = None, data_root: str | None = None) -> Preview:
    """Plan a study.

    Args:
        path: study file.
        results: folder or URI; ``results/<study>`` when not given. It need not exist.
        data_root: folder of datasets.

    Raises:
        UserError: the study file or the data are not as they must be.
    """
    study = load_study(path)
    store = Store(results or default_results(study))
    root, history = roots.data_root(data_root), needs_history(study)
    subjects = {
        name: _look(definition, store, root, history)
        for name, definition in definitions(study, Path(path).parent).items()
    }
    plan, cost = make_plan(study, subjects, store.done()), CostModel(store, subjects)
    return Preview(study, store.uri, subjects, plan, cost, outdated(plan, store))


def _look(definition: SubjectDefinition, store: Store, data_root: DataRoot | None, history: bool) -> LoadedSubject:
    """The subject with its original model if that is trained already, else without."""
    folder = roots.cache_dir() / "originals"
    data = definition.load_data(data_root)
    trained = cache_file(definition, data, folder)
    if not definition.trains_original or trained.exists() or store.read_folder("originals", trained.stem):
        if store.local_path is not None and not store.local_path.exists():
            # Looking must not create a results folder, and loading keeps the original there.
            return _untrained(definition, data, history)
        return load_subject(
            definition, store=store, data_root=data_root, cache_dir=folder, keep_history=history, data=data
        )[1]
    return _untrained(definition, data, history)


def _untrained(definition: SubjectDefinition, data: SubjectData, history: bool) -> LoadedSubject:
    check_answers(definition, definition.build_model(), data)
    facts = definition.facts(data=data, has_history=history)
    sizes = {f"n_{name}": len(split) for name, split in data.splits().items()}
    row = {**sizes, "n_parameters": sum(parameter.numel() for parameter in facts.model.parameters())}
    return LoadedSubject(definition, _UNTRAINED.format(definition.name), row, facts, {})


def print_preview(view: Preview, console: Console | None = None) -> None:
    """Print a plan as a table."""
    console = console or Console()
    plan = view.plan
    table = Table(title=f"Study {view.study.study}: {plan.planned} trials into {view.results}")
    for column in ("fixer", "subject", "trials", "done", "note"):
        table.add_column(column, justify="right" if column in ("trials", "done") else "left")
    for cell in plan.cells:
        specs = (*cell.adapt, *cell.final)
        done = sum(spec.trial_id in plan.done for spec in specs)
        total = cell.n_adapt + cell.n_final
        others = view.outdated.get((cell.entry.name, cell.subject), 0)
        table.add_row(cell.entry.name, cell.subject, str(total), str(done), _note(cell, others))
    console.print(table)
    if view.study.failure_types:
        groupings = ", ".join(item.label for item in view.study.failure_types)
        console.print(f"Beside these, failure types by {groupings}: how many trials that is shows when they are found.")
    waiting = [
        spec
        for cell in plan.cells
        if cell.unmet is None
        for spec in (*cell.adapt, *cell.final)
        if spec.trial_id not in plan.done
    ]
    seconds, unknown = estimate(waiting, view.cost, lanes=1)
    for name, subject in view.subjects.items():
        if subject.fingerprint == _UNTRAINED.format(name):
            console.print(f"The original model of {name} isn't in the results yet; run loads or trains it first.")
    if seconds:
        console.print(f"What ran before says: about {duration(seconds)} of work on one lane for the trials left.")
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        limit = duration(view.study.time_limit)
        console.print(
            f"No estimate yet for {', '.join(unknown[:3])}{more}: they never ran here; at most {limit} each.",
            highlight=False,
        )


def _note(cell: Cell, others: int) -> Text:
    if cell.unmet is not None:
        return Text(f"UNADAPTABLE: {cell.unmet.reason}", style="dim")
    if others:
        rows = f"{others} rows are" if others > 1 else "1 row is"
        return Text(f"{rows} of other code of this approach and stay; the trials run again", style="yellow")
    if cell.adapt and cell.entry.adapt:
        adapt = cell.entry.adapt
        n = f"{adapt.budget} of trials" if adapt.most_trials is None else f"{cell.n_adapt} trials"
        size = points.size(space_of(cell.entry))
        if adapt.search == "grid" and adapt.most_trials is not None and size > adapt.most_trials:
            n += f", drawn from the {size} of its grid,"
        return Text(f"{adapt.search}: {n} on valid, then {cell.n_final} with the best configuration")
    return Text("")
