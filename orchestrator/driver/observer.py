"""What a study tells whoever watches it."""

from collections.abc import Callable

from orchestrator.worker.monitor import RunningTrial


class StudyObserver:
    """What a running study tells; nothing is done about it here."""

    def event(self, sentence: str) -> None:
        """Something worth a line happened."""

    def caution(self, sentence: str) -> None:
        """Whoever reads the figures of a subject must know this."""

    def dashboard(self, url: str) -> None:
        """Ray shows itself at this address."""

    def planned(self, planned: int, done_before: int, running: Callable[[], list[RunningTrial]]) -> None:
        """The plan is known: its trials, those that have a row already, and how to ask for the ones in flight."""

    def row(self, trial_id: str, outcome: str, reason_code: str | None, planned: int) -> None:
        """A trial has its row, and this is what is known of the plan by now."""

    def ended(self) -> None:
        """No trial runs any more, and nobody is left to ask which ones do."""
