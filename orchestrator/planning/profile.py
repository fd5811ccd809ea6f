"""Measuring before packing: the first trial of every fixer on every subject."""

from orchestrator.study.schema import FixerEntry, Study


def first_trials(study: Study) -> Study:
    """The study with one trial per entry and subject.

    They belong to the study, so running it doesn't repeat them. Only successive halving begins with shortened trials,
    which would measure nothing but the beginning; in its place the default configuration runs in full.
    """
    return study.model_copy(update={"seeds": study.seeds[:1], "fixers": [_first(entry) for entry in study.fixers]})


def _first(entry: FixerEntry) -> FixerEntry:
    adapt = entry.adapt and entry.adapt.model_copy(update={"budget": 1})
    if adapt and adapt.search == "asha":
        adapt = adapt.model_copy(update={"search": "random"})
    return entry.model_copy(update={"grid": {name: values[:1] for name, values in entry.grid.items()}, "adapt": adapt})
