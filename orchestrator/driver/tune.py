"""Trials on Ray Tune: it asks for one after another, starts each where there is room, and tells what became of it.

Tune keeps every trial that it ever ran in memory, so it is given waves of them. Its state is of no use: results are
rows, and rows are the state.
"""

import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import ray.exceptions
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.search import Searcher

from analysis.contract.errors import UserError
from orchestrator.driver.control import handlers_kept
from orchestrator.driver.trial_order import InOrder
from orchestrator.study.trials import TrialSpec
from orchestrator.worker.memory import give_back_memory
from orchestrator.worker.trainable import TrialWorker, WorkerContext, spec_config

TRIALS_PER_WAVE = 1000
"""Trials of one call of Tune; the next wave starts new workers. At least ``TRIALS_PER_LANE`` for every lane, so that
the end of a wave, at which lanes idle, is seldom."""
TRIALS_PER_LANE = 20
NEVER: Final = 10**9
"""Seconds."""
PASSED_ON: Final = {"RAY_CHDIR_TO_TRIAL_DIR"}
"""Variables of the environment that Ray hands to workers."""
_TALKATIVE: Final = ("execution.tune_controller", "tune", "analysis.experiment_analysis")


class TrialSource(Protocol):
    """The trials of a study, as Tune needs them."""

    def next_trial(self) -> tuple[TrialSpec, Mapping[str, float]] | None:
        """The next trial, with what it gets of a node; None when there is none at the moment."""

    def more_may_come(self) -> bool:
        """Whether waiting for another one may be worth it."""

    def in_flight(self) -> Collection[TrialSpec]:
        """The trials that were handed out and aren't settled."""

    def completed(self, trial_id: str, row: Mapping[str, Any], reason_code: str | None) -> None:
        """A trial has its row, of which these are some columns."""

    def lost(self, spec: TrialSpec, error: BaseException) -> None:
        """The worker of a trial is gone."""

    def drained(self, spec: TrialSpec) -> None:
        """The node of a trial was drained, and Tune runs the trial again."""


def run_wave(
    trials: TrialSource, context: WorkerContext, name: str, lanes: int, callbacks: Sequence[tune.Callback]
) -> bool:
    """Run a wave of trials to its end.

    Args:
        trials: where they come from.
        context: what every worker is given.
        name: of the study.
        lanes: trials that can run at once.
        callbacks: told by Tune after the rows are stored.

    Returns:
        Whether it came to its end, and another may follow. Tune takes Ctrl-C for a wish to end, and returns.
    """
    # Tune's loggers and its experiment checkpoints are of no use.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(2 * lanes)
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(NEVER)
    # It would wait for the trials in flight, without a word.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Tune would hand credentials of AWS to Ray as settings of the workers, which Ray writes into logs that anybody may
    # read. On this machine workers have the driver's environment; a node of a cluster has its own.
    class_cache.ENV_VARS_TO_PROPAGATE = PASSED_ON
    log = TuneLog()
    searcher = PlanSearcher(trials, max(TRIALS_PER_WAVE, TRIALS_PER_LANE * lanes))
    with tempfile.TemporaryDirectory(prefix="fixstudy-tune-") as scratch, log.attached():
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialWorker, context=context), placement),
            tune_config=tune.TuneConfig(search_alg=searcher, scheduler=InOrder(), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=scratch,
                verbose=0,
                # The collector comes first: it stores the rows that the others show.
                callbacks=[Collector(trials, log), *callbacks],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        try:
            with handlers_kept():
                tuner.fit()
        except Exception as error:
            # Tune wraps what is raised in its callbacks, at any depth.
            causes = list(_causes(error))
            for cause in causes:
                if isinstance(cause, UserError):
                    raise cause from None
            # Tune gives up as a whole when Ray's memory monitor kills a worker: it only expects actor errors.
            if not (causes and isinstance(causes[0], ray.exceptions.OutOfMemoryError)):
                raise
            for spec in trials.in_flight():
                trials.lost(spec, causes[0])
            return True
        del tuner
    give_back_memory()
    return not searcher.left and not trials.in_flight()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an exception was raised from or while handling, nearest first."""
    seen = {id(error)}
    following = error.__cause__ or error.__context__
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


class Stateless:
    """Tune pickles what it is given to restore it later; a study resumes from its rows instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PlanSearcher(Stateless, Searcher):
    """Hands trials to Tune, one whenever there is room, until a wave is full.

    Args:
        trials: where they come from.
        most: trials of the wave.
    """

    def __init__(self, trials: TrialSource, most: int) -> None:
        super().__init__(metric="done", mode="max")
        self._trials = trials
        self.left = most
        """Trials that still belong to the wave; 0 when it is over."""

    def suggest(self, trial_id: str) -> Any:
        """Config of the next trial; None while there is none, ``FINISHED`` when there will be none."""
        offered = self._trials.next_trial() if self.left else None
        if offered is not None:
            self.left -= 1
            return spec_config(*offered)
        if self.left and self._trials.more_may_come():
            return None
        self.left = 0
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the rows are the truth, and :class:`Collector` tells of them."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study resumes from its rows."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study resumes from its rows."""


class TuneLog(logging.Filter):
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


class Collector(Stateless, tune.Callback):
    """Tells what became of the trials that Tune ran.

    Args:
        trials: told.
        log: knows what a trial failed with.
    """

    def __init__(self, trials: TrialSource, log: TuneLog) -> None:
        self._trials = trials
        self._log = log

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its worker stored its row."""
        result = trial.last_result
        self._trials.completed(trial.config["spec"]["trial_id"], json.loads(result["row"]), result.get("reason_code"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its worker is gone."""
        spec = TrialSpec(**trial.config["spec"])
        self._trials.lost(spec, self._log.last_error or RuntimeError("Ray gave no reason."))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune begins a trial again by itself only where its node was drained as a cloud takes back a spot machine."""
        self._trials.drained(TrialSpec(**trial.config["spec"]))


def placement(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """What a trial gets of a node, for Tune."""
    return tune.PlacementGroupFactory([config["resources"]])
