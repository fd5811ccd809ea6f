"""Running what is missing of a study on Ray Tune.

Ray does the distributing; this module decides which trial comes next, and turns a dead worker into an outcome. The
plan is what the study says minus the trials that have a row, so there is no driver state to restore: running the
same command again is resuming.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.base.errors import UserError
from orchestrator.cluster import capacity, luggage, packing, plugins
from orchestrator.cluster.loading_tasks import SubjectLoader
from orchestrator.cluster.luggage import Luggage
from orchestrator.cluster.node_events import relayed
from orchestrator.cluster.packing import GpuParts, MemoryParts, Packing
from orchestrator.cluster.presence import NodeLacksImagesError
from orchestrator.driver import pictures
from orchestrator.driver.control import Stopping, StudyStoppedError, handlers_kept
from orchestrator.driver.remote_calls import Flight, ask
from orchestrator.driver.trial_order import InOrder
from orchestrator.driver.tune import _Collector, _placement, _PlanSearcher, _TuneLog
from orchestrator.planning.cost import CostModel
from orchestrator.planning.plan import Cell, Plan, make_plan, needs_history, outdated
from orchestrator.planning.queue import TrialQueue
from orchestrator.planning.retry import failures_that_may_pass
from orchestrator.storage.patience import StorageError
from orchestrator.storage.store import Store
from orchestrator.study.objectives import COLUMNS, Figures
from orchestrator.study.schema import Study
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.subject import SubjectDefinition
from orchestrator.sweeps.record import figures_on_valid, record, record_name
from orchestrator.sweeps.sweep import Choice
from orchestrator.trial import outcomes
from orchestrator.trial.columns import identity_columns, verdict_columns
from orchestrator.trial.outcomes import Verdict
from orchestrator.trial.trial import TrialSettings
from orchestrator.worker.logtail import read_streams
from orchestrator.worker.memory import give_back_memory
from orchestrator.worker.monitor import Monitor, RunningTrial
from orchestrator.worker.shared_cache import forget
from orchestrator.worker.trainable import TrialWorker, WorkerContext, oom_kills

MOST_RUNS_OF_A_TRIAL = 3
"""A trial whose node is lost runs again, until it has taken this many nodes with it."""
MOST_RUNS_AFTER_A_DEATH = 2
"""A trial whose process ended without a trace runs again, until it has ended this many: the kill may have come from
outside, and Ray can't tell that from a crash."""
TRIALS_PER_WAVE = 1000
"""Trials of one call of Tune, which keeps every trial it ever ran in memory; the next wave starts new workers. At least
``TRIALS_PER_LANE`` for every lane, so that the end of a wave, at which lanes idle, is seldom."""
TRIALS_PER_LANE = 20
NEVER = 10**9
"""Seconds."""

SECONDS_FOR_LAST_WORDS = 30.0


@dataclass
class StudyRun:
    """One call of ``fixstudy run``.

    Args:
        study: expanded.
        definitions: of its subjects.
        store: its results.
        data_root: folder of datasets on the nodes.
        cache_dir: folder for originals and intermediate results on the nodes.
        stopping: what `fixstudy stop` has asked for.
        on_row: told of each row as it appears: trial id, outcome, reason code.
        on_event: told in a sentence what is going on.
        on_plan: told how many trials there are, as far as that is known, and how many of them are done already.
    """

    study: Study
    definitions: Mapping[str, SubjectDefinition]
    store: Store
    data_root: DataRoot | None
    cache_dir: Path
    stopping: Stopping
    on_row: Callable[[str, str, str | None], None] = lambda trial_id, outcome, reason: None
    on_event: Callable[[str], None] = lambda sentence: None
    on_plan: Callable[[int, int], None] = lambda planned, done: None
    joined: bool = True
    """Whether Ray runs on other machines too, which may lack files of this one."""
    luggage: Luggage = field(default_factory=Luggage)
    """What the subjects take along, from :meth:`load_subjects` on."""
    monitor: Any = None
    """Handle of the monitor actor while the study runs."""
    loader: SubjectLoader = field(init=False)
    """Of the subjects, from :meth:`load_subjects` on."""
    subjects: dict[str, LoadedSubject] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    """Subjects that no node holds any more; they are loaded again before the next trial."""
    plan: Plan | None = None
    queue: TrialQueue | None = None
    cost: CostModel = field(init=False)
    """Of trials, from those that have run."""
    packing: Packing = field(default_factory=Packing)
    """What every trial gets of a node."""
    number: int = 1
    """Of this run: larger than that of every row before it."""
    final: bool = True
    """Whether final trials run; without them only adaptations do."""
    records_choices: bool = True
    """Whether what a sweep chose is recorded; a sweep of one trial, for its measurements, chooses nothing."""
    retry_failures: bool = False
    """Whether trials that failed for reasons that may pass run again."""
    show_in: Mapping[str, str | None] = field(default_factory=dict)
    """Services that the trials are shown in, with their targets (see :mod:`orchestrator.driver.loggers`)."""

    def load_subjects(self) -> dict[str, Any]:
        """Load all subjects on the cluster, in parallel; missing originals are trained there.

        Returns:
            References to (subject, baseline), by name.
        """
        self.luggage = luggage.packed(self.definitions, with_files=self.joined)
        self.loader = SubjectLoader(
            self.definitions,
            self.luggage,
            self.store,
            self.data_root,
            self.cache_dir,
            needs_history(self.study),
            self._gpus(),
            self.monitor,
            # The name, not the method: a display may take its place after the run was made.
            lambda sentence: self.on_event(sentence),
        )
        references, self.subjects = self.loader.load_all()
        for subject in self.subjects.values():
            self.store.write_subject(subject.row)
        return references

    def load_lost_subjects(self, references: dict[str, Any]) -> None:
        """Put new references in the place of those to subjects that trials couldn't get.

        Raises:
            UserError: no node can load one of them, or its data aren't what they were.
        """
        for name in self.lost:
            self.on_event(f"{name} was lost with the last node that held it, and is loaded again")
            references[name], loaded = self.loader.load_again(name)
            if loaded.fingerprint != self.subjects[name].fingerprint:
                raise UserError(
                    f"The data or the model of {name} aren't what they were when the study began, so its trials "
                    "would not be comparable; see that every node has the same, then run the same command again."
                )
        self.lost.clear()

    def run(self) -> None:
        """Run what is missing. Ray must be initialised."""
        # Beside the driver: a lost worker node must not take the monitor with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.monitor = ray.remote(num_cpus=0, max_restarts=-1)(Monitor).options(scheduling_strategy=here).remote()
        with relayed(self.monitor, lambda sentence: self.on_event(sentence)):
            self._run()

    def _run(self) -> None:
        self.on_event("loading subjects, training missing originals")
        references = self.load_subjects()
        plan = self._without_failures(make_plan(self.study, self.subjects, self.store.done()))
        self.number = 1 + max((row["run"] or 0 for row in self.store.rows(["run"])), default=0)
        if others := outdated(plan, self.store).total():
            self.on_event(f"{others} rows are of other code of their approach: they stay, and their trials run again")
        figures = figures_on_valid(self.store) if any(entry.adapt for entry in self.study.fixers) else {}
        self.cost = CostModel(self.store, self.subjects)
        queue = TrialQueue(self.study, plan, self.subjects, figures, self.cost, self._chosen, final=self.final)
        self.plan, self.queue = plan, queue
        self._note_plan()
        self.on_plan(self.planned, queue.done_before)
        self._store_unadaptable(plan)
        if not queue.exhausted:
            self.on_event(f"running {queue.left} trials")
            with self.stopping.of(Flight(queue, self.monitor)):
                self._tune(queue, references)
        forget(self.store)
        self._note_plan()
        if self.study.pictures and self.final:
            pictures.draw(references, self.store, self.luggage, self.cache_dir, self.on_event)

    @property
    def planned(self) -> int:
        """Trials of this run with those that are done already, as far as that is known: sweeps may end early."""
        if self.plan is None or self.queue is None:
            return 0
        most = self.plan.planned if self.final else self.plan.planned_without_sweeps_finals
        return most - self.queue.unplanned

    def _note_plan(self) -> None:
        """Leave the number of trials for those who only read; that of one sweep alone isn't the study's."""
        if self.final:
            self.store.write_bytes("plan.json", json.dumps({"planned": self.planned}).encode())

    def _without_failures(self, plan: Plan) -> Plan:
        """The plan after what failed and may pass was set aside, if that is wanted."""
        again = failures_that_may_pass(plan, self.store) if self.retry_failures else frozenset()
        if not again:
            return plan
        self.store.set_aside(again)
        self.on_event(f"{len(again)} failed trials run again; their rows are kept in retried/")
        return replace(plan, done=plan.done - again)

    def settle_lost_trial(self, spec: TrialSpec, error: BaseException, queue: TrialQueue) -> None:
        """Give a trial whose worker is gone its row, or another run where it wasn't to blame.

        Ray's memory monitor may kill a bystander, so what it killed runs again, alone; if it is killed again the
        memory was its own. A trial whose node is lost runs again on another, and one whose process ended without a
        trace runs again once.
        """
        if isinstance(cause := getattr(error, "cause", None), StorageError | NodeLacksImagesError):
            # No fault of the trial's, and nobody could write its row: it runs when the study goes on.
            raise cause
        if isinstance(cause, ray.exceptions.ObjectLostError):
            self.lost.add(spec.subject)
            queue.again(spec.trial_id)
            return
        verdict = self._row_of(spec.trial_id)
        if verdict is None:
            seen: RunningTrial | None = ask(lambda: self.monitor.last_seen.remote(spec.trial_id), None)
            if self.stopping.stopped:
                # It has no row, so it runs when the study goes on.
                queue.in_flight.pop(spec.trial_id)
                return
            if spec.trial_id in self.stopping.cancelled:
                self.settle_cancelled_trial(spec, seen, queue)
                return
            runs, name = queue.runs[spec.trial_id], f"{spec.fixer} on {spec.subject}"
            verdict = self._judge_lost_trial(error, seen)
            if isinstance(error, ray.exceptions.OutOfMemoryError) and not queue.ran_alone(spec.trial_id):
                self.on_event(f"{name} was in the way when memory ran out and runs again, alone")
                queue.again_alone(spec.trial_id)
                return
            if _is_lost(seen) and runs < MOST_RUNS_OF_A_TRIAL:
                self.on_event(f"{name} lost its node and runs again")
                queue.again(spec.trial_id)
                return
            if verdict.reason_code == outcomes.ReasonCode.WORKER_DIED and runs < MOST_RUNS_AFTER_A_DEATH:
                self.on_event(f"{name} lost its process and runs again")
                queue.again(spec.trial_id)
                return
            columns = {"phase": seen.phase if seen else None, "attempts": runs, "log_tail": _last_words(seen)}
            self.store.write_trial(self._driver_row(spec, verdict) | columns)
        # From the row, as after a restart: the worker may have stored figures before it went.
        queue.finish(spec.trial_id, Figures.of(self.store.row(spec.trial_id, list(COLUMNS)) or {}))
        self.on_row(spec.trial_id, verdict.outcome, verdict.reason_code)

    def settle_cancelled_trial(self, spec: TrialSpec, seen: RunningTrial | None, queue: TrialQueue) -> None:
        """Give a trial that somebody stopped its row; ``seen`` is None when it hadn't begun."""
        verdict = outcomes.cancelled(seen.phase if seen else None)
        columns = {
            "phase": seen.phase if seen else None,
            "attempts": queue.runs.get(spec.trial_id, 0) if seen else 0,
            "log_tail": _last_words(seen),
        }
        self.store.write_trial(self._driver_row(spec, verdict) | columns)
        queue.finish(spec.trial_id, None)
        self.on_row(spec.trial_id, verdict.outcome, verdict.reason_code)

    def _judge_lost_trial(self, error: BaseException, seen: RunningTrial | None) -> Verdict:
        cause = getattr(error, "cause", None)
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, Exception):
            # Raised outside run_trial: storing the row failed, or the subject couldn't be mapped.
            return outcomes.judge_exception(cause, seen.phase if seen else "load")
        by_ray = isinstance(error, ray.exceptions.OutOfMemoryError)
        if seen is not None and seen.seconds > self.study.time_limit and seen.phase == "fix" and not by_ray:
            return outcomes.judge_killed_by_watchdog(seen.phase, seen.seconds)
        kills = oom_kills() - seen.oom_kills if seen is not None and _is_here(seen) else 0
        return outcomes.judge_dead_worker(error, seen.phase if seen else None, kills)

    def _row_of(self, trial_id: str) -> Verdict | None:
        row = self.store.row(trial_id, ["outcome", "reason_code", "reason"])
        return None if row is None else Verdict(row["outcome"], row["reason_code"], row["reason"])

    def _driver_row(self, spec: TrialSpec, verdict: Verdict) -> dict[str, Any]:
        subject = self.subjects[spec.subject]
        return {
            **identity_columns(spec, subject.definition),
            **verdict_columns(verdict),
            "accuracy_original": subject.accuracy["test"],
            "accuracy_valid_original": subject.accuracy["valid"],
            "n_test": subject.row["n_test"],
            "started_at": datetime.now(UTC),
            "run": self.number,
        }

    def _store_unadaptable(self, plan: Plan) -> None:
        for cell in plan.cells:
            if cell.unmet is None:
                continue
            verdict = outcomes.unadaptable(cell.unmet.code, cell.unmet.reason)
            for spec in cell.final:
                if spec.trial_id not in plan.done:
                    self.store.write_trial(self._driver_row(spec, verdict) | {"attempts": 0})
                    self.on_row(spec.trial_id, verdict.outcome, verdict.reason_code)

    def _chosen(self, cell: Cell, choice: Choice) -> None:
        if not self.records_choices:
            return
        content = json.dumps(record(cell.entry, cell.subject, choice), indent=1)
        self.store.write_bytes(record_name(cell.entry.name, cell.subject), content.encode())

    def _gpus(self) -> float:
        if self.study.resources.gpu is not None:
            return self.study.resources.gpu
        return 1.0 if capacity.has_gpus(capacity.node_resources()) else 0.0

    def _tune(self, queue: TrialQueue, references: dict[str, Any]) -> None:
        context = WorkerContext(
            store=self.store,
            settings=TrialSettings.of(self.study),
            subjects=references,
            definitions=dict(self.definitions),
            accuracy_original={name: subject.accuracy["test"] for name, subject in self.subjects.items()},
            monitor=self.monitor,
            cache_folder=str(self.cache_dir / "intermediate"),
            run=self.number,
            data_root=self.data_root,
            plugins=plugins.packed(self.study.plugins),
            luggage=self.luggage,
            most_bytes=self.study.resources.memory,
        )
        lanes = self._pack()
        # Tune's loggers and its experiment checkpoints are of no use: results are rows, and rows are the state.
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(2 * lanes)
        os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(NEVER)
        # It would wait for the trials in flight, without a word.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        wave = max(TRIALS_PER_WAVE, TRIALS_PER_LANE * lanes)
        while not queue.exhausted:
            if self.lost:
                self.load_lost_subjects(references)
            try:
                more = self._fit(queue, context, wave)
            except RuntimeError as error:
                # Tune gives up as a whole when Ray's memory monitor kills a worker: it only expects actor errors.
                cause = error.__cause__
                if not isinstance(cause, ray.exceptions.OutOfMemoryError):
                    raise
                for spec in list(queue.in_flight.values()):
                    self.settle_lost_trial(spec, cause, queue)
            else:
                if not more:
                    break
        if self.stopping.stopped:
            raise StudyStoppedError
        if not queue.exhausted:
            # Tune takes Ctrl-C for a wish to end and returns as if all were done.
            raise KeyboardInterrupt

    def _loggers(self) -> list[tune.Callback]:
        if not self.show_in:
            return []
        from orchestrator.driver import loggers

        # The name, not the method: a display may take its place after the run was made.
        return [
            *loggers.build_loggers(self.show_in, self.study.study, self.store, lambda sentence: self.on_event(sentence))
        ]

    def _pack(self) -> int:
        """Settle what trials get; how many may run at once."""
        asked, whole = self.study.resources, self._gpus()
        base = {"CPU": asked.cpu, "memory": float(asked.memory or 0)}
        smallest = {**base, "GPU": whole / asked.share_gpu}
        capacity.lanes({**base, "GPU": whole})
        rows = self.store.rows(list(packing.COLUMNS))
        on_gpus = GpuParts(1, None)
        if asked.share_gpu > 1 and whole == 1:
            on_gpus = GpuParts(asked.share_gpu, capacity.smallest_gpu(), rows)
        self.packing = Packing(base, whole, on_gpus, MemoryParts(capacity.memory(smallest), rows))
        return capacity.lanes(smallest)

    def _fit(self, queue: TrialQueue, context: WorkerContext, wave: int) -> bool:
        """Run a wave of trials to its end; whether another may follow."""
        log = _TuneLog()
        searcher = _PlanSearcher(self, queue, wave)
        with tempfile.TemporaryDirectory(prefix="fixstudy-tune-") as scratch, log.attached():
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(TrialWorker, context=context), _placement),
                tune_config=tune.TuneConfig(
                    search_alg=searcher, scheduler=InOrder(), num_samples=-1, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name=self.study.study,
                    storage_path=scratch,
                    verbose=0,
                    # The collector comes first: it stores the rows that the others show.
                    callbacks=[_Collector(self, queue, log), *self._loggers()],
                    failure_config=tune.FailureConfig(max_failures=0),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                ),
            )
            with handlers_kept():
                tuner.fit()
            del tuner
        give_back_memory()
        # Tune takes Ctrl-C for a wish to end and returns with trials in flight.
        return not searcher.left and not queue.in_flight


def _is_lost(seen: RunningTrial | None) -> bool:
    """Whether the node on which a trial was last seen is gone."""
    if seen is None:
        return False
    return not any(node["NodeID"] == seen.node_id and node["Alive"] for node in ray.nodes())


def _last_words(seen: RunningTrial | None) -> str | None:
    """What a dead worker left in the files of its node."""
    if seen is None or not seen.streams or _is_lost(seen):
        return None
    there = NodeAffinitySchedulingStrategy(seen.node_id, soft=False)
    reading = ray.remote(num_cpus=0, max_retries=0)(read_streams).options(scheduling_strategy=there)
    try:
        text: str | None = ray.get(reading.remote(seen.streams), timeout=SECONDS_FOR_LAST_WORDS)
    except ray.exceptions.RayError:
        # The node went as well, or is too busy: the row is worth more than its log.
        return None
    return text


def _is_here(seen: RunningTrial) -> bool:
    return bool(seen.node_id == ray.get_runtime_context().get_node_id())
