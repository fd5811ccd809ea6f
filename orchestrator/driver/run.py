"""A whole study: load, plan, run what is missing, tidy up. The command line and tests call the same functions."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster import ray_session
from orchestrator.driver import frozen
from orchestrator.driver.control import Stopping
from orchestrator.driver.observer import StudyObserver
from orchestrator.planning.profile import first_trials
from orchestrator.storage.compaction import BackgroundCompaction
from orchestrator.storage.sole_driver import sole_driver
from orchestrator.storage.store import Store
from orchestrator.study import subjects
from orchestrator.study.reading import load_study
from orchestrator.study.schema import Study
from orchestrator.subjects.reading import roots
from orchestrator.sweeps.record import OneSweep
from orchestrator.worker.monitor import RunningTrial


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
    retry_failures: bool = False,
    only: OneSweep | None = None,
    profile: bool = False,
    show_in: Mapping[str, str | None] | None = None,
) -> Summary:
    """Run what is missing of a study.

    Args:
        path: study file.
        results: folder or URI; ``results/<study>`` when not given.
        address: of a Ray cluster; one on this machine when not given.
        data_root: folder of datasets; ``FIXSTUDY_DATA`` when not given.
        display: told of progress; a full storage is waited for only where somebody is told.
        retry_failures: run again what failed for reasons that may pass (see :mod:`orchestrator.planning.retry`).
        only: run just this adaptation, and no final trials.
        profile: run just the first trial of every fixer on every subject.
        show_in: services that show the trials, with their targets (see :mod:`orchestrator.driver.loggers`).

    Raises:
        UserError: the study file, the data or the results folder are not as they must be.
        StudyStoppedError: somebody stopped it.
    """
    began = time.monotonic()
    study = load_study(path)
    definitions = subjects.definitions(study, Path(path).parent)
    told: Callable[[str], None] = display.event if display is not None else lambda sentence: None
    if only is not None:
        whole, study = study, only.of(study)
        definitions = {name: definitions[name] for name in definitions if name == only.subject}
        (entry,) = study.fixers
        if entry not in whole.fixers and entry.adapt is not None:
            told(
                f"the study doesn't say how to adapt {entry.name}, so it is the default: {entry.adapt.search}, "
                f"{entry.adapt.budget} trials"
            )
    if profile:
        study = first_trials(study)
    store = Store(results or default_results(study))
    store.create()
    if display is not None:
        store.wait_when_full(display.event, functools.partial(display.event, "there is space again; the study goes on"))
    stopping = Stopping(store, on_event=told)
    with sole_driver(store, on_wait=told), stopping.listening():
        frozen.freeze(study, definitions, Path(path), store)
        store.tidy()
        if display is not None:
            display.event("starting Ray" if address is None else f"joining Ray at {address}")
        with ray_session.ray_running(address) as dashboard, stopping.heeding_signals():
            if dashboard is not None and display is not None:
                display.dashboard(f"http://{dashboard}")

            from orchestrator.driver.remote_calls import ask
            from orchestrator.driver.study_run import StudyRun

            rows: set[str] = set()
            upkeep = BackgroundCompaction(store)

            def on_row(trial_id: str, outcome: str, reason_code: str | None) -> None:
                rows.add(trial_id)
                upkeep.row()
                if display is not None:
                    display.row(trial_id, outcome, reason_code, run.planned)

            run = StudyRun(
                study,
                definitions,
                store,
                ray_session.data_root(data_root),
                roots.usable_cache_dir(),
                stopping,
                on_row=on_row,
                final=only is None and not profile,
                records_choices=not profile,
                retry_failures=retry_failures,
                show_in=show_in or {},
                joined=ray_session.joins(address),
            )
            if display is not None:
                shown = display
                run.on_event = shown.event

                def running() -> list[RunningTrial]:
                    trials: list[RunningTrial] = ask(run.monitor.running.remote, [], patience=0)
                    return [trial for trial in trials if trial.trial_id not in rows]

                run.on_plan = lambda planned, done: shown.planned(planned, done, running)
            try:
                with upkeep:
                    run.run()
            finally:
                if display is not None:
                    display.ended()
            loads: dict[str, int] = ask(run.monitor.loads.remote, {})
        if study.keep_models == "best":
            keep_best_models(store)
        # Workers of a driver that was killed may have written on for a moment after this one began.
        store.tidy()
        store.compact()
    return Summary(store.uri, run.planned, len(rows), count_outcomes(store), time.monotonic() - began, loads)


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
