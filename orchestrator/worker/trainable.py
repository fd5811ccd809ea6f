"""The Ray Tune trainable: a process that takes one trial after another and stores what became of each.

A trial's row is written here, before Tune hears of the end, so that the death of the driver loses at most the trials
in flight. Importing torch costs seconds and a trial may cost less: the process lives as long as the study.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from fixers import registry
from fixers.cache import Cache, DirectoryCache
from orchestrator.base.kernels import make_repeatable
from orchestrator.cluster import packing
from orchestrator.cluster.luggage import FOLDER, Luggage
from orchestrator.cluster.node_events import pause_when_full
from orchestrator.cluster.packing import wall_in
from orchestrator.cluster.plugins import Plugin
from orchestrator.cluster.presence import check_images
from orchestrator.storage.store import Store
from orchestrator.study.objectives import COLUMNS
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects import weights
from orchestrator.subjects.reading.roots import DataRoot, use_cache_dir
from orchestrator.subjects.subject import Subject, SubjectDefinition
from orchestrator.trial import outcomes
from orchestrator.trial.attempts import Phase
from orchestrator.trial.baseline import Baseline
from orchestrator.trial.columns import identity_columns, verdict_columns
from orchestrator.trial.measures import surroundings
from orchestrator.trial.trial import Bench, TrialRecord, TrialSettings, run_trial
from orchestrator.trial.types import run_type_trial
from orchestrator.worker.logtail import CHARACTERS, CHARACTERS_WHEN_OK, LogTail, stream_files
from orchestrator.worker.memory import oom_kills
from orchestrator.worker.monitor import RunningTrial
from orchestrator.worker.shared_cache import SharedCache
from orchestrator.worker.watchdog import Watchdog, seconds_allowed

SECONDS_BETWEEN_PROGRESS = 0.5


@dataclass(frozen=True)
class WorkerContext:
    """What every worker of a study is given; small, the subjects are references into the object store."""

    store: Store
    settings: TrialSettings
    subjects: Mapping[str, Any]
    """By name: reference to a (subject, baseline)."""
    definitions: Mapping[str, SubjectDefinition]
    accuracy_original: Mapping[str, float]
    """Test accuracy of the original model by subject, a fraction."""
    monitor: Any
    """Handle of the monitor actor."""
    cache_folder: str
    run: int
    """Number of the run."""
    data_root: DataRoot | None
    """Of the datasets on the nodes."""
    plugins: tuple[Plugin, ...]
    """Approaches from elsewhere, with their code."""
    luggage: Luggage
    """Code of the subjects."""
    most_bytes: int | None = None
    """Host memory that a trial's process may take."""


class ProcessSpoiltError(Exception):
    """Raised after a trial whose row is stored, so that Tune discards the process, which must not take another."""


class TrialWorker(tune.Trainable):
    """Runs one trial per step; reused for the next by ``reset_config``."""

    def setup(self, config: dict[str, Any], context: WorkerContext | None = None) -> None:
        """Once per process."""
        if context is None:
            raise ValueError("TrialWorker needs a WorkerContext; see tune.with_parameters.")
        self._context = context
        use_cache_dir(Path(context.cache_folder).parent)
        pause_when_full(context.store, context.monitor)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: dict[str, tuple[Subject, Baseline]] = {}
        local = DirectoryCache(context.cache_folder)
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        self._cache: Cache = SharedCache(local, context.store) if several else local
        self._watchdog = Watchdog(self._expired, context.most_bytes, self._grown)
        self._phase: Phase = "load"
        self._since = self._last_progress = time.monotonic()
        for plugin in context.plugins:
            plugin.load(Path(context.cache_folder).with_name("plugins"))
        context.luggage.unpack_code(Path(context.cache_folder).with_name(FOLDER))
        # The first look-up imports every approach; that isn't part of anybody's fixing time.
        registry.all_fixers()
        prepare_torch(self._device)
        self._gpu_share = ray.get_runtime_context().get_assigned_resources().get("GPU") or None
        if self._device.type == "cuda" and self._gpu_share is not None:
            wall_in(self._gpu_share)
        self._given = {
            "cores_given": cores_given(),
            "cores_of_node": _cores_of_node(),
            "gpu_shared": self._gpu_share is not None and self._gpu_share < 1,
            "gpu_share": self._gpu_share,
            "gpu": ",".join(map(str, ray.get_gpu_ids())) or None,
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process."""
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial of the current config to its end."""
        self._spec = TrialSpec(**self.config["spec"])
        self._oom_kills = oom_kills()
        self._log, self._streams = LogTail(), stream_files()
        with self._log.listening():
            record = self._run()
        self._watchdog.disarm()
        record.row["log_tail"] = self._log.text(CHARACTERS_WHEN_OK if record.row["outcome"] == "OK" else CHARACTERS)
        record.row |= {"run": self._context.run, **self._given}
        try:
            self._store(record)
        except Exception:
            # Whoever judges what is raised here asks where that was.
            ray.get(self._tell("store"))
            raise
        if record.spoilt is not None:
            raise ProcessSpoiltError(f"Trial {self._spec.trial_id} has its row, and {record.spoilt}.")
        return {
            "done": True,
            "outcome": record.row["outcome"],
            "reason_code": record.row["reason_code"],
            # As text: Tune keeps statistics of every number that it is given, for every trial that it ever ran.
            "row": json.dumps({name: record.row.get(name) for name in (*COLUMNS, *packing.COLUMNS)}),
        }

    def _run(self) -> TrialRecord:
        if self._spec.subject not in self._loaded:
            self._enter("load")
        started = time.monotonic()
        subject, baseline = self._subject(self._spec.subject)
        load_seconds = time.monotonic() - started
        bench = Bench(self._spec, subject, baseline, self._context.settings, self._device, self._cache)
        if self._spec.stage == "type":
            record = run_type_trial(bench, self._context.store, self._enter, self._progress)
        else:
            record = run_trial(bench, on_phase=self._enter, on_progress=self._progress)
        record.row["load_seconds"] = load_seconds
        return record

    def _subject(self, name: str) -> tuple[Subject, Baseline]:
        if name not in self._loaded:
            # The arrays inside stay in shared memory; this maps them, it doesn't copy them.
            loaded = ray.get(self._context.subjects[name])
            check_images(loaded[0], self._context.data_root)
            self._loaded[name] = loaded
            # Built here, because that is loading and not anybody's fixing time.
            _ = self._loaded[name][0].original
        return self._loaded[name]

    def _store(self, record: TrialRecord) -> None:
        store, trial_id = self._context.store, self._spec.trial_id
        files = {}
        if record.state is not None:
            files[f"models/{trial_id}.safetensors"] = weights.content(record.state, {"trial_id": trial_id})
        store.write_trial(record.row, record.predictions, record.curves, files, record.matrix)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._since = phase, time.monotonic()
        if phase in ("load", "fix"):
            self._began = datetime.now(UTC)
        # A phase that is over before the first message is due isn't worth one.
        self._last_progress = self._since
        self._watchdog.arm(seconds_allowed(phase, self._context.settings.time_limit))
        self._tell(phase)

    def _tell(self, phase: Phase) -> ray.ObjectRef[None]:
        """Tell the monitor which phase this is."""
        spec = self._spec
        told: ray.ObjectRef[None] = self._context.monitor.phase.remote(
            RunningTrial(
                trial_id=spec.trial_id,
                label=f"{spec.fixer} on {spec.subject}, seed {spec.seed}",
                phase=phase,
                node_id=ray.get_runtime_context().get_node_id(),
                pid=os.getpid(),
                oom_kills=self._oom_kills,
                host=socket.gethostname(),
                streams=self._streams,
            )
        )
        return told

    def _progress(self, step: int, figures: Mapping[str, float]) -> None:
        if time.monotonic() - self._last_progress > SECONDS_BETWEEN_PROGRESS:
            self._last_progress = time.monotonic()
            self._context.monitor.progress.remote(self._spec.trial_id, step, dict(figures))

    def _expired(self, stack: str) -> None:
        """Called by the watchdog's thread: store the row that the main thread can't."""
        self._store_end(outcomes.judge_killed_by_watchdog(self._phase, time.monotonic() - self._since), stack)

    def _grown(self, stack: str, taken: int) -> None:
        """Likewise, of a trial that took more memory than allowed."""
        verdict = outcomes.judge_memory_limit(self._phase, taken, self._context.most_bytes or 0)
        self._store_end(verdict, stack, peak_host_bytes=taken, peak_own_bytes=taken)

    def _store_end(self, verdict: outcomes.Verdict, stack: str, **columns: Any) -> None:
        seconds = time.monotonic() - self._since
        row = {
            **identity_columns(self._spec, self._context.definitions[self._spec.subject]),
            **surroundings(self._device),
            **self._given,
            **verdict_columns(verdict),
            "accuracy_original": self._context.accuracy_original[self._spec.subject],
            "phase": self._phase,
            "attempts": 1,
            "fix_seconds": seconds if self._phase == "fix" else None,
            "started_at": self._began,
            "run": self._context.run,
            "traceback": stack[-outcomes.TRACEBACK_CHARACTERS :],
            "log_tail": self._log.text(),
            **columns,
        }
        self._context.store.write_trial(row)


def prepare_torch(device: torch.device) -> None:
    """Settings of a process that runs trials: its share of the cores, and repeatable kernels on a GPU."""
    torch.set_num_threads(max(1, int(cores_given() or 1)))
    make_repeatable(device)


def cores_given() -> float | None:
    """Cores that Ray gave this process; None when it gave none."""
    cores: float | None = ray.get_runtime_context().get_assigned_resources().get("CPU")
    return cores


def _cores_of_node() -> float | None:
    """Cores of this node that Ray gives away, which may be fewer than the machine has."""
    here = ray.get_runtime_context().get_node_id()
    return next((node["Resources"].get("CPU") for node in ray.nodes() if node["NodeID"] == here), None)


def spec_config(spec: TrialSpec, resources: Mapping[str, float]) -> dict[str, Any]:
    """A trial as Tune's config, with what it gets of a node."""
    return {"spec": asdict(spec), "resources": dict(resources)}
