"""First come, first served, at a cost that doesn't grow with the number of trials."""

from collections import deque
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler


class InOrder(FIFOScheduler):
    """Starts trials in the order in which the searcher gave them.

    Tune's own looks through every trial that ever ran, finished ones included, at every step. Ours never pauses a trial
    or runs one a second time (a study plans another one), so what has left the front of the queue never comes back.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waiting: deque[Trial] = deque()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Queue a trial."""
        self._waiting.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first trial that hasn't started."""
        while self._waiting and self._waiting[0].status != Trial.PENDING:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its scheduler to restore it later; a study resumes from its rows.
        return {}
