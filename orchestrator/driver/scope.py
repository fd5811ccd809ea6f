"""Which trials of a study one call runs."""

from dataclasses import dataclass

from orchestrator.planning.profile import first_trials
from orchestrator.study.schema import Study
from orchestrator.sweeps.record import OneSweep


@dataclass(frozen=True)
class Scope:
    """All that is missing, unless something else is said."""

    sweep: OneSweep | None = None
    """Just this adaptation, and no final trials."""
    profile: bool = False
    """Just the first trial of every fixer on every subject."""
    retry_failures: bool = False
    """Also what failed for reasons that may pass (see :mod:`orchestrator.planning.retry`)."""

    @property
    def has_final_trials(self) -> bool:
        """Whether sweeps are followed by the trials of what they chose, and the study is whole afterwards."""
        return self.sweep is None and not self.profile

    @property
    def records_choices(self) -> bool:
        """Whether what a sweep chose is recorded; a sweep of one trial, for its measurements, chooses nothing."""
        return not self.profile

    def of(self, study: Study) -> Study:
        """The study with nothing else in it.

        Raises:
            UserError: the study doesn't have the sweep's fixer or subject.
        """
        part = study if self.sweep is None else self.sweep.of(study)
        part = first_trials(part) if self.profile else part
        # Sweeps and profiles are of fixers.
        return part if self.has_final_trials else part.model_copy(update={"failure_types": [], "repairs": []})


EVERYTHING = Scope()
