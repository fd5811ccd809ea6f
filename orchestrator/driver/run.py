"""A whole study: load, plan, run what is missing, tidy up. The command line and tests call the same functions."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster import ray_session
from orchestrator.driver import frozen
from orchestrator.driver.control import Stopping
from orchestrator.driver.observer import StudyObserver
from orchestrator.driver.scope import EVERYTHING, Scope
from orchestrator.planning.plan import needs_history
from orchestrator.storage.sole_driver import sole_driver
from orchestrator.storage.store import Store
from orchestrator.study import subjects
from orchestrator.study.reading import load_study
from orchestrator.study.schema import Study, subject_name
from orchestrator.subjects.reading import roots


@dataclass(frozen=True)
class Summary:
    """What a call of :func:`run_study` did."""

    results: str
    planned: int
    ran: int
    outcomes: Mapping[str, int]
    """Rows of the whole study by outcome."""
    seconds: float
    subject_loads: Mapping[str, int]
    """How often each subject was read from its files, over the whole cluster."""


def default_results(study: Study) -> str:
    """Where results go when nothing else is said."""
    return f"results/{study.study}"


def run_study(
    path: str | Path,
    *,
    results: str | None = None,
    address: str | None = None,
    data_root: str | None = None,
    display: StudyObserver | None = None,
    scope: Scope = EVERYTHING,
    show_in: Mapping[str, str | None] | None = None,
) -> Summary:
    """Run what is missing of a study.

    Args:
        path: study file.
        results: folder or URI; ``results/<study>`` when not given.
        address: of a Ray cluster; one on this machine when not given.
        data_root: folder of datasets; ``FIXSTUDY_DATA`` when not given.
        display: told of progress; a full storage is waited for only where somebody is told.
        scope: which trials; all that is missing when not given.
        show_in: services that show the trials, with their targets (see :mod:`orchestrator.driver.loggers`).

    Raises:
        UserError: the study file, the data or the results folder are not as they must be.
        StudyStoppedError: somebody stopped it.
        ResultsVanishedError: somebody deleted results while it ran.
    """
    began, observer = time.monotonic(), display or StudyObserver()
    whole = load_study(path)
    definitions = subjects.definitions(whole, Path(path).parent)
    study = scope.of(whole)
    definitions = {name: definitions[name] for name in map(subject_name, study.subjects)}
    if scope.sweep is not None:
        (entry,) = study.fixers
        if entry not in whole.fixers and entry.adapt is not None:
            observer.event(
                f"the study doesn't say how to adapt {entry.name}, so it is the default: {entry.adapt.search}, "
                f"{entry.adapt.budget} trials"
            )
    store = Store(results or default_results(study))
    store.create()
    if display is not None:
        store.wait_when_full(observer.event, lambda: observer.event("there is space again; the study goes on"))
    stopping = Stopping(store, on_event=observer.event)
    with sole_driver(store, on_wait=observer.event), stopping.listening(), stopping.heeding_signals():
        frozen.freeze(study, definitions, Path(path), store)
        store.tidy()
        observer.event("starting Ray" if address is None else f"joining Ray at {address}")
        with ray_session.ray_running(address) as dashboard, stopping.heeding_signals():
            if dashboard is not None:
                observer.dashboard(f"http://{dashboard}")

            # These import Ray, which reads the settings of its environment that are made by now.
            from orchestrator.cluster import capacity, loading_tasks, luggage, node_events
            from orchestrator.driver import loaded, remote_calls, study_run

            monitor = remote_calls.start_monitor()
            try:
                with node_events.relayed(monitor, observer.event):
                    loader = loading_tasks.SubjectLoader(
                        definitions,
                        luggage.packed(definitions, with_files=ray_session.joins(address)),
                        store,
                        roots.data_root(data_root),
                        roots.usable_cache_dir(),
                        needs_history(study),
                        capacity.gpus_of_trial(study.resources.gpu),
                        monitor,
                        observer.event,
                    )
                    ready = loaded.load_and_plan(study, scope, loader, observer)
                    run = study_run.StudyRun(ready, stopping, observer, show_in or {})
                    run.run()
            finally:
                observer.ended()
            loads: dict[str, int] = remote_calls.ask(monitor.loads.remote, {})
        if study.keep_models == "best":
            keep_best_models(store)
        # Workers of a driver that was killed may have written on for a moment after this one began.
        store.tidy()
        store.compact()
        frozen.check_that_nothing_vanished(store, run.rows)
    return Summary(store.uri, ready.planned, len(run.rows), count_outcomes(store), time.monotonic() - began, loads)


def count_outcomes(store: Store) -> dict[str, int]:
    """Rows by outcome."""
    counts: dict[str, int] = {}
    for row in store.rows(["outcome"]):
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    return counts


def keep_best_models(store: Store) -> None:
    """Delete the fixed models that aren't the best of their fixer and subject, judged on valid."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in store.rows(["fixer", "subject", "stage", "outcome", "accuracy_valid_fixed"]):
        # Trials of a sweep have no model, and one may be as good as the final trial that repeats it.
        if row["stage"] != "final" or row["outcome"] != "OK" or row["accuracy_valid_fixed"] is None:
            continue
        key = row["fixer"], row["subject"]
        # Ties go to the smaller id, so that every call keeps the same one.
        rank = (-row["accuracy_valid_fixed"], row["trial_id"])
        if key not in best or rank < (-best[key]["accuracy_valid_fixed"], best[key]["trial_id"]):
            best[key] = row
    kept = {row["trial_id"] for row in best.values()}
    for trial_id in store.model_ids() - kept:
        store.delete(f"models/{trial_id}.safetensors")
