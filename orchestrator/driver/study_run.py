"""Running the trials of a study that is loaded: which comes next, and the row of every one, whatever became of it."""

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from ray import tune

from analysis.contract.errors import UserError
from orchestrator.base.background import repeating
from orchestrator.cluster import capacity, packing, plugins
from orchestrator.cluster.packing import GpuParts, MemoryParts, Packing
from orchestrator.driver import pictures
from orchestrator.driver.control import Stopping, StudyStoppedError
from orchestrator.driver.loaded import Loaded
from orchestrator.driver.lost_trials import Again, LostTrial, judge, last_words
from orchestrator.driver.observer import StudyObserver
from orchestrator.driver.remote_calls import TrialsOnRay, ask
from orchestrator.driver.tune import run_wave
from orchestrator.storage.compaction import BackgroundCompaction
from orchestrator.study.objectives import COLUMNS, Figures
from orchestrator.study.trials import TrialSpec
from orchestrator.trial import outcomes
from orchestrator.trial.columns import identity_columns, verdict_columns
from orchestrator.trial.outcomes import Verdict
from orchestrator.trial.trial import TrialSettings
from orchestrator.worker.monitor import RunningTrial
from orchestrator.worker.shared_cache import forget
from orchestrator.worker.trainable import WorkerContext

SECONDS_BETWEEN_LOOKS = 5.0
"""For trials whose process is stopped."""


class StudyRun:
    """One call of ``fixstudy run``, from the moment its subjects are loaded.

    Args:
        loaded: what runs.
        stopping: what `fixstudy stop` has asked for.
        observer: told what is going on, and of each row as it appears.
        show_in: services that show the trials, with their targets (see :mod:`orchestrator.driver.loggers`).
    """

    def __init__(
        self, loaded: Loaded, stopping: Stopping, observer: StudyObserver, show_in: Mapping[str, str | None]
    ) -> None:
        self._loaded = loaded
        self._study, self._queue = loaded.study, loaded.queue
        self._store, self._monitor = loaded.loader.store, loaded.loader.monitor
        self._stopping = stopping
        self._observer = observer
        self._show_in = show_in
        self._references = dict(loaded.references)
        self._lost_subjects: set[str] = set()
        """No node holds them any more; they are loaded again before the next trial."""
        self._packing = Packing()
        self._compaction = BackgroundCompaction(self._store)
        self.rows: set[str] = set()
        """Trials that have got their row in this run."""

    def run(self) -> None:
        """Run what is missing. Ray must be initialised.

        Raises:
            StudyStoppedError: somebody stopped the study.
            KeyboardInterrupt: somebody ended the command.
            UserError: a trial fits on no node, or storage or a node failed for good.
        """
        loaded, queue = self._loaded, self._queue
        with self._compaction:
            self._note_plan()
            self._observer.planned(loaded.planned, queue.done_before, self._running)
            self._store_unadaptable()
            if not queue.exhausted:
                self._observer.event(f"running {queue.left} trials")
                trials = TrialsOnRay(queue, self._monitor)
                ending = repeating(lambda: self._end_overdue(trials), SECONDS_BETWEEN_LOOKS, "overdue")
                with self._stopping.of(trials), ending:
                    self._run_trials()
            forget(self._store)
            self._note_plan()
            if self._study.pictures and loaded.scope.has_final_trials:
                loader = loaded.loader
                pictures.draw(self._references, self._store, loader.luggage, loader.cache_dir, self._observer.event)

    # What Tune asks for, and what it tells (see tune.TrialSource).

    def next_trial(self) -> tuple[TrialSpec, Mapping[str, float]] | None:
        """The next trial, with what it gets of a node; None when there is none at the moment."""
        while not (self._lost_subjects or self._stopping.stopped) and (spec := self._queue.next()) is not None:
            if spec.trial_id not in self._stopping.cancelled:
                return spec, self._packing.resources(spec.fixer, spec.subject)
            self._settle_cancelled(spec, None)
        return None

    def more_may_come(self) -> bool:
        """Whether waiting for another trial may be worth it: the next wave begins when lost subjects are there."""
        if self._lost_subjects:
            return False
        return bool(self._queue.in_flight) if self._stopping.stopped else not self._queue.exhausted

    def in_flight(self) -> Collection[TrialSpec]:
        """The trials that were handed out and aren't settled."""
        return list(self._queue.in_flight.values())

    def completed(self, trial_id: str, row: Mapping[str, Any], reason_code: str | None) -> None:
        """A trial has its row, of which these are some columns."""
        self._packing.learn(row)
        if self._loaded.cost.learn(row):
            self._queue.reorder()
        self._queue.finish(trial_id, Figures.of(row))
        self._tell_row(trial_id, row["outcome"], reason_code)

    def lost(self, spec: TrialSpec, error: BaseException) -> None:
        """Give a trial whose worker is gone its row, or another run where it wasn't to blame."""
        trial_id, queue = spec.trial_id, self._queue
        seen: RunningTrial | None = ask(lambda: self._monitor.last_seen.remote(trial_id), None)
        trial = LostTrial.of(error, seen, queue.runs[trial_id], queue.ran_alone(trial_id))
        judged = judge(trial, self._study.time_limit)
        if judged is Again.SUBJECT:
            self._lost_subjects.add(spec.subject)
            queue.again(trial_id)
            return
        verdict = self._stored_verdict(trial_id)
        if verdict is None:
            if self._stopping.stopped:
                # It has no row, so it runs when the study goes on.
                queue.in_flight.pop(trial_id)
                return
            if trial_id in self._stopping.cancelled:
                self._settle_cancelled(spec, seen)
                return
            if isinstance(judged, Again):
                self._observer.event(f"{spec.fixer} on {spec.subject} {judged.value}")
                (queue.again_alone if judged is Again.ALONE else queue.again)(trial_id)
                return
            verdict = judged
            self._store_end(spec, verdict, seen, trial.runs)
        # From the row, as after a restart: the worker may have stored figures before it went.
        queue.finish(trial_id, Figures.of(self._store.row(trial_id, list(COLUMNS)) or {}))
        self._tell_row(trial_id, verdict.outcome, verdict.reason_code)

    def drained(self, spec: TrialSpec) -> None:
        """The node of a trial was drained, and Tune runs the trial again."""
        self._observer.event(f"{spec.fixer} on {spec.subject} lost its node, which was drained, and runs again")

    def _end_overdue(self, trials: TrialsOnRay) -> None:
        if overdue := trials.overdue(self._study.time_limit):
            trials.end(overdue)

    def _run_trials(self) -> None:
        loader = self._loaded.loader
        context = WorkerContext(
            store=self._store,
            settings=TrialSettings.of(self._study),
            subjects=self._references,
            definitions=dict(loader.definitions),
            accuracy_original={name: subject.accuracy["test"] for name, subject in self._loaded.subjects.items()},
            monitor=self._monitor,
            cache_folder=str(loader.cache_dir / "intermediate"),
            run=self._loaded.number,
            data_root=loader.data_root,
            plugins=plugins.packed(self._study.plugins),
            luggage=loader.luggage,
            most_bytes=self._study.resources.memory,
        )
        lanes = self._pack()
        while not self._queue.exhausted and not self._stopping.stopped:
            self._load_lost_subjects()
            if not run_wave(self, context, self._study.study, lanes, self._loggers()):
                break
        if self._stopping.stopped:
            raise StudyStoppedError
        if not self._queue.exhausted:
            # Tune takes Ctrl-C for a wish to end and returns as if all were done.
            raise KeyboardInterrupt

    def _pack(self) -> int:
        """Settle what trials get; how many may run at once."""
        asked, whole = self._study.resources, self._loaded.loader.gpus
        base = {"CPU": asked.cpu, "memory": float(asked.memory or 0)}
        smallest = {**base, "GPU": whole / asked.share_gpu}
        capacity.lanes({**base, "GPU": whole})
        rows = self._store.rows(list(packing.COLUMNS))
        on_gpus = GpuParts(1, None)
        if asked.share_gpu > 1 and whole == 1:
            on_gpus = GpuParts(asked.share_gpu, capacity.smallest_gpu(), rows)
        self._packing = Packing(base, whole, on_gpus, MemoryParts(capacity.memory(smallest), rows))
        return capacity.lanes(smallest)

    def _load_lost_subjects(self) -> None:
        """Put new references in the place of those to subjects that trials couldn't get.

        Raises:
            UserError: no node can load one of them, or its data aren't what they were.
        """
        for name in self._lost_subjects:
            self._observer.event(f"{name} was lost with the last node that held it, and is loaded again")
            self._references[name], subject = self._loaded.loader.load_again(name)
            if subject.fingerprint != self._loaded.subjects[name].fingerprint:
                raise UserError(
                    f"The data or the model of {name} aren't what they were when the study began, so its trials "
                    "would not be comparable; see that every node has the same, then run the same command again."
                )
        self._lost_subjects.clear()

    def _loggers(self) -> list[tune.Callback]:
        if not self._show_in:
            return []
        from orchestrator.driver.loggers import build_loggers

        return [*build_loggers(self._show_in, self._study.study, self._store, self._observer.event)]

    def _running(self) -> list[RunningTrial]:
        trials: list[RunningTrial] = ask(self._monitor.running.remote, [], patience=0)
        return [trial for trial in trials if trial.trial_id not in self.rows]

    def _note_plan(self) -> None:
        """Leave the number of trials for those who only read; that of one sweep alone isn't the study's."""
        if self._loaded.scope.has_final_trials:
            self._store.write_bytes("plan.json", json.dumps({"planned": self._loaded.planned}).encode())

    def _store_unadaptable(self) -> None:
        for cell in self._loaded.plan.cells:
            if cell.unmet is None:
                continue
            verdict = outcomes.unadaptable(cell.unmet.code, cell.unmet.reason)
            for spec in cell.final:
                if spec.trial_id not in self._loaded.plan.done:
                    self._store.write_trial(self._row(spec, verdict) | {"attempts": 0})
                    self._tell_row(spec.trial_id, verdict.outcome, verdict.reason_code)

    def _settle_cancelled(self, spec: TrialSpec, seen: RunningTrial | None) -> None:
        """Give a trial that somebody stopped its row; ``seen`` is None when it hadn't begun."""
        verdict = outcomes.cancelled(seen.phase if seen else None)
        self._store_end(spec, verdict, seen, self._queue.runs.get(spec.trial_id, 0) if seen else 0)
        self._queue.finish(spec.trial_id, None)
        self._tell_row(spec.trial_id, verdict.outcome, verdict.reason_code)

    def _store_end(self, spec: TrialSpec, verdict: Verdict, seen: RunningTrial | None, runs: int) -> None:
        """Write the row that a trial's worker can't write."""
        columns = {"phase": seen.phase if seen else None, "attempts": runs, "log_tail": last_words(seen)}
        self._store.write_trial(self._row(spec, verdict) | columns)

    def _stored_verdict(self, trial_id: str) -> Verdict | None:
        row = self._store.row(trial_id, ["outcome", "reason_code", "reason"])
        return None if row is None else Verdict(row["outcome"], row["reason_code"], row["reason"])

    def _row(self, spec: TrialSpec, verdict: Verdict) -> dict[str, Any]:
        subject = self._loaded.subjects[spec.subject]
        return {
            **identity_columns(spec, subject.definition),
            **verdict_columns(verdict),
            "accuracy_original": subject.accuracy["test"],
            "accuracy_valid_original": subject.accuracy["valid"],
            "n_test": subject.row["n_test"],
            "started_at": datetime.now(UTC),
            "run": self._loaded.number,
        }

    def _tell_row(self, trial_id: str, outcome: str, reason_code: str | None) -> None:
        self.rows.add(trial_id)
        self._compaction.row()
        self._observer.row(trial_id, outcome, reason_code, self._loaded.planned)
