"""What Ray Tune asks of a study, and what it tells it."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import Searcher

from orchestrator.planning.queue import TrialQueue
from orchestrator.study.objectives import Figures
from orchestrator.study.trials import TrialSpec
from orchestrator.worker.trainable import spec_config

if TYPE_CHECKING:
    from orchestrator.driver.study_run import StudyRun


class _Stateless:
    """Tune pickles what it is given to restore it later; a study resumes from its rows instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _PlanSearcher(_Stateless, Searcher):
    """Hands the queue's trials to Tune, one whenever there is room, until a wave is full."""

    def __init__(self, run: "StudyRun", queue: TrialQueue, wave: int) -> None:
        super().__init__(metric="done", mode="max")
        self._run = run
        self._queue = queue
        self.left = wave
        """Trials that still belong to the wave."""

    def suggest(self, trial_id: str) -> Any:
        """Config of the next trial; None while there is none, ``FINISHED`` when there will be none."""
        if self._run.lost:
            # The next wave begins when they are there again.
            self.left = 0
        if not self.left:
            return Searcher.FINISHED
        if self._run.stopping.stopped:
            return None if self._queue.in_flight else Searcher.FINISHED
        while (spec := self._queue.next()) is not None:
            if spec.trial_id not in self._run.stopping.cancelled:
                self.left -= 1
                return spec_config(spec, self._run.packing.resources(spec.fixer, spec.subject))
            self._run.settle_cancelled_trial(spec, None, self._queue)
        return Searcher.FINISHED if self._queue.exhausted else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the rows are the truth, and :class:`_Collector` looks after the queue."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study resumes from its rows."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study resumes from its rows."""


class _TuneLog(logging.Filter):
    """Takes Tune's log messages off the screen, and the exceptions out of them.

    Tune's callbacks learn that a trial failed but not with what; the exception is logged right before. (The file that
    Tune pickles it into leaves out Ray's own out-of-memory error, the one that matters most.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the exception, drop the message."""
        if record.exc_info and record.exc_info[1] is not None:
            self.last_error = record.exc_info[1]
        return False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to Tune until the block ends."""
        loggers = [logging.getLogger(f"ray.tune.{name}") for name in _TALKATIVE]
        for logger in loggers:
            logger.addFilter(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(self)


_TALKATIVE = ("execution.tune_controller", "tune", "analysis.experiment_analysis")


class _Collector(_Stateless, tune.Callback):
    """Keeps the queue up to date and writes the rows of trials whose worker can't."""

    def __init__(self, study: "StudyRun", queue: TrialQueue, log: _TuneLog) -> None:
        self._run = study
        self._queue = queue
        self._log = log

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        trial_id = trial.config["spec"]["trial_id"]
        row = json.loads(result["row"])
        self._run.packing.learn(row)
        if self._run.cost.learn(row):
            self._queue.reorder()
        self._queue.finish(trial_id, Figures.of(row))
        self._run.on_row(trial_id, result["outcome"], result.get("reason_code"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        spec = TrialSpec(**trial.config["spec"])
        self._run.settle_lost_trial(spec, self._log.last_error or RuntimeError("Ray gave no reason."), self._queue)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune begins a trial again by itself only where its node was drained as a cloud takes back a spot machine."""
        spec = TrialSpec(**trial.config["spec"])
        self._run.on_event(f"{spec.fixer} on {spec.subject} lost its node, which was drained, and runs again")


def _placement(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([config["resources"]])
