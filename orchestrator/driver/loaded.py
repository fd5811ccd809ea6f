"""From a study to what runs of it: its subjects are loaded on the cluster, and its trials planned.

The plan is what the study says minus the trials that have a row, so there is no driver state to restore: running the
same command again is resuming.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cluster.loading_tasks import SubjectLoader
from orchestrator.driver.failure_types import find_types
from orchestrator.driver.observer import StudyObserver
from orchestrator.driver.scope import Scope
from orchestrator.planning.cost import CostModel
from orchestrator.planning.failure_types import type_cells
from orchestrator.planning.plan import Cell, Plan, make_plan, outdated
from orchestrator.planning.queue import TrialQueue
from orchestrator.planning.retry import failures_that_may_pass
from orchestrator.storage.store import Store
from orchestrator.study.schema import Study
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.sweeps.record import figures_on_valid, record, record_name
from orchestrator.sweeps.sweep import Choice


@dataclass(frozen=True)
class Loaded:
    """A study of which the subjects lie in the cluster's memory, and the trials in a queue."""

    study: Study
    """Expanded, and nothing in it but what this call runs."""
    scope: Scope
    loader: SubjectLoader
    """Of the subjects, for those that are lost."""
    references: Mapping[str, Any]
    """To (subject, baseline), by name."""
    subjects: Mapping[str, LoadedSubject]
    """What the driver knows of them."""
    plan: Plan
    queue: TrialQueue
    cost: CostModel
    """Of trials, from those that have run."""
    number: int
    """Of this run: larger than that of every row before it."""

    @property
    def planned(self) -> int:
        """Trials of this run with those that are done already, as far as that is known: sweeps may end early."""
        plan = self.plan
        most = plan.planned if self.scope.has_final_trials else plan.planned_without_sweeps_finals
        return most - self.queue.unplanned


def load_and_plan(study: Study, scope: Scope, loader: SubjectLoader, observer: StudyObserver) -> Loaded:
    """Load the subjects, in parallel, and plan what is missing; missing originals are trained.

    Raises:
        UserError: a node lacks something, or two subjects are the same.
    """
    observer.event("loading subjects, training missing originals")
    store = loader.store
    references, subjects = loader.load_all()
    for subject in subjects.values():
        store.write_subject(subject.row)
        for sentence in subject.cautions:
            observer.caution(sentence)
    grouped = find_types(study, references, subjects, loader)
    plan = make_plan(study, subjects, store.done(), type_cells(study, grouped, subjects))
    if scope.retry_failures and (again := failures_that_may_pass(plan, store)):
        store.set_aside(again)
        observer.event(f"{len(again)} failed trials run again; their rows are kept in retried/")
        plan = replace(plan, done=plan.done - again)
    number = 1 + max((row["run"] or 0 for row in store.rows(["run"])), default=0)
    if others := outdated(plan, store).total():
        observer.event(f"{others} rows are of other code of their approach: they stay, and their trials run again")
    figures = figures_on_valid(store) if any(entry.adapt for entry in study.fixers) else {}
    cost = CostModel(store, subjects)

    def on_chosen(cell: Cell, choice: Choice) -> None:
        if scope.records_choices:
            _record(store, cell, choice)

    queue = TrialQueue(study, plan, subjects, figures, cost, on_chosen, final=scope.has_final_trials)
    return Loaded(study, scope, loader, references, subjects, plan, queue, cost, number)


def _record(store: Store, cell: Cell, choice: Choice) -> None:
    content = json.dumps(record(cell.entry, cell.subject, choice), indent=1)
    store.write_bytes(record_name(cell.entry.name, cell.subject), content.encode())
