"""Showing a study in TensorBoard, MLflow or Weights & Biases while it runs, through Ray's own callbacks for them.

Rows stay the truth. What is shown is read from them, a trial at a time: its hyper-parameters, its curves and its
figures. A service that fails is left alone from then on, with a sentence; the study goes on.
"""

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import LoggerCallback

from analysis.contract.errors import UserError
from orchestrator.storage.store import Store
from orchestrator.study.trials import TrialSpec

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""By service, the package that it needs."""
FIGURES = (
    "accuracy_fixed", "accuracy_original", "repair_rate", "negative_flip_rate", "asr_fixed", "aaod_fixed",
    "accuracy_valid_fixed", "repair_rate_valid", "negative_flip_rate_valid", "fix_seconds", "peak_host_bytes",
    "peak_device_bytes",
)  # fmt: skip
"""Columns of a trial's row that are shown."""
MOST_STEPS = 500
"""Of a trial's curves; thinned evenly above."""


@dataclass(eq=False)
class ShownTrial:
    """What Ray's callbacks read of a trial, with words of ours: the approach, the subject and the hyper-parameters."""

    trial_id: str
    config: dict[str, Any]
    local_path: str
    experiment_dir_name: str
    evaluated_params: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """All of the config is worth comparing by."""
        self.evaluated_params = self.config

    def __str__(self) -> str:
        return f"{self.config['fixer']}-{self.config['subject']}-{self.config['seed']}-{self.trial_id[:8]}"

    def init_local_path(self) -> None:
        """Make the trial's folder."""
        Path(self.local_path).mkdir(parents=True, exist_ok=True)


class StudyLogger(tune.Callback):
    """One of Ray's callbacks, told of trials in a study's words.

    Args:
        name: of the service, for sentences.
        callback: Ray's.
        study: name of the study.
        store: its results.
        folder: local folder for what the service keeps of a trial.
        on_event: told in a sentence when the service fails.
    """

    def __init__(
        self,
        name: str,
        callback: LoggerCallback,
        study: str,
        store: Store,
        folder: str,
        on_event: Callable[[str], None],
    ) -> None:
        self._name = name
        self._callback: LoggerCallback | None = callback
        self._study = study
        self._store = store
        self._folder = folder
        self._on_event = on_event
        self._shown: dict[str, Any] = {}
        """Any, because Ray's signatures name its own class; they read of it what ours has."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def setup(self, *args: Any, **info: Any) -> None:
        """Reach the service."""
        self._tell(lambda callback: callback.setup(*args, **info))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show that a trial has begun."""
        spec = TrialSpec(**trial.config["spec"])
        config = {"fixer": spec.fixer, "subject": spec.subject, "seed": spec.seed, "stage": spec.stage}
        config |= {f"params/{name}": value for name, value in json.loads(spec.params).items()}
        folder = str(Path(self._folder, spec.trial_id))
        shown: Any = ShownTrial(spec.trial_id, config, folder, self._study)
        self._shown[spec.trial_id] = shown

        def tell(callback: LoggerCallback) -> None:
            # Weights & Biases writes there from processes that don't make it.
            shown.init_local_path()
            callback.log_trial_start(shown)

        self._tell(tell)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show its curves and figures."""
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show that its process is gone, and what its row says if it has one."""
        self._end(trial)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Give the service time to send what it holds."""
        self._tell(lambda callback: callback.on_experiment_end(trials=[], **info))

    def _end(self, trial: Any) -> None:
        trial_id = trial.config["spec"]["trial_id"]
        shown = self._shown.pop(trial_id)
        row = self._store.row(trial_id, ["outcome", *FIGURES]) if self._callback is not None else None

        def tell(callback: LoggerCallback) -> None:
            last = 0
            for last, result in enumerate(self._results(trial_id), start=1):
                callback.log_trial_result(last, shown, result)
            if row is not None:
                figures = {name: row[name] for name in FIGURES if row[name] is not None}
                ok = float(row["outcome"] == "OK")
                callback.log_trial_result(last + 1, shown, {**figures, "ok": ok, "training_iteration": last + 1})
            # Without a row it was lost, and runs again as another run of the service.
            callback.log_trial_end(shown, failed=row is None or row["outcome"] == "FAILURE")

        self._tell(tell)

    def _results(self, trial_id: str) -> list[dict[str, float]]:
        """The trial's curves, as one result a step."""
        table = self._store.curves(trial_id)
        steps: dict[int, dict[str, float]] = {}
        for point in [] if table is None else table.to_pylist():
            steps.setdefault(point["step"], {})[f"progress/{point['metric']}"] = point["value"]
        every = -(-len(steps) // MOST_STEPS) or 1
        return [{**figures, "training_iteration": step} for step, figures in list(steps.items())[::every]]

    def _tell(self, action: Callable[[LoggerCallback], None]) -> None:
        if self._callback is None:
            return
        try:
            action(self._callback)
        except Exception as error:
            # A server that is down, a full quota, a key that has expired: no reason to end a study of hours.
            self._callback = None
            self._on_event(f"{self._name} failed and is left alone from now on: {type(error).__name__}: {error}")


def parse_services(wanted: Sequence[str]) -> dict[str, str | None]:
    """Services by name with their targets, from ``name`` or ``name=target``.

    Raises:
        UserError: a name is none of ours, or its package isn't installed.
    """
    services: dict[str, str | None] = {}
    for text in wanted:
        name, _, target = text.partition("=")
        if name not in PACKAGES:
            near = difflib.get_close_matches(name, PACKAGES, 1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UserError(f"--log knows {', '.join(PACKAGES)} and not '{name}'{hint}")
        if find_spec(PACKAGES[name]) is None:
            raise UserError(f"--log {name} needs a package that isn't here: pip install 'fixstudy[{name}]'")
        services[name] = target or None
    return services


def build_loggers(
    services: Mapping[str, str | None], study: str, store: Store, on_event: Callable[[str], None]
) -> list[StudyLogger]:
    """The callbacks of a study.

    Args:
        services: as :func:`parse_services` gives them.
        study: name of the study.
        store: its results.
        on_event: told when a service fails.
    """
    here = store.local_path or Path.cwd()
    loggers = []
    for name, target in services.items():
        folder = Path(target, study) if name == "tensorboard" and target else here / name
        loggers.append(StudyLogger(name, _callback(name, target, study), study, store, str(folder.resolve()), on_event))
    return loggers


def _callback(name: str, target: str | None, study: str) -> LoggerCallback:
    """Ray's callback; imported here, because each imports its service."""
    callback: LoggerCallback
    if name == "tensorboard":
        from ray.tune.logger import TBXLoggerCallback

        callback = TBXLoggerCallback()
    elif name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callback = MLflowLoggerCallback(tracking_uri=target, experiment_name=study)
    else:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callback = WandbLoggerCallback(project=target or os.environ.get("WANDB_PROJECT") or study)
    return callback
