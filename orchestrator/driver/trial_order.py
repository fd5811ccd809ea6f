"""First come, first served, at a cost that doesn't grow with the number of trials, and with every lane in use."""

from collections import deque
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler


class InOrder(FIFOScheduler):
    """Starts trials in the order in which the searcher gave them.

    Tune's own looks through every trial that ever ran, finished ones included, at every step. Ours never pauses a trial
    or runs one a second time (a study plans another one), so what has left the front of the queue never comes back.

    A process that is done with its trial gets the first one for which no other process is being started. Tune's own
    would give it the first of all, and end the process that starts up for that one: where trials are over sooner than
    a process has imported torch, one lane does all the work, and the others start processes for nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waiting: deque[Trial] = deque()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Queue a trial."""
        self._waiting.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first trial that nothing is being done about; if there is none, the first that hasn't started."""
        while self._waiting and self._waiting[0].status != Trial.PENDING:
            self._waiting.popleft()
        pending = (trial for trial in self._waiting if trial.status == Trial.PENDING)
        first = self._waiting[0] if self._waiting else None
        return next((trial for trial in pending if not _is_starting(tune_controller, trial)), first)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its scheduler to restore it later; a study resumes from its rows.
        return {}


def _is_starting(tune_controller: Any, trial: Trial) -> bool:
    """Whether a process is coming up for a trial: it has its resources, but hasn't taken the trial yet."""
    # A scheduler is given a wrapper that hides which trial has which process.
    controller = tune_controller._tune_controller
    actor = controller._trial_to_actor.get(trial)
    return actor is not None and controller._actor_manager.is_actor_started(actor)
