"""What a sweep searches: the values of each parameter, and the rungs of successive halving."""

from typing import Any

from orchestrator.study import points
from orchestrator.study.schema import Adaptation, FixerEntry


def space_of(entry: FixerEntry) -> dict[str, list[Any]]:
    """Values that the adaptation of an entry tries, by parameter."""
    import fixers

    if entry.adapt is None:
        return {}
    own = fixers.get(entry.name).search_space()
    return entry.adapt.space or {name: list(values) for name, values in own.items() if name not in entry.params}


def rungs_of(entry: FixerEntry) -> tuple[str, list[int]]:
    """The parameter by which asha stops early (see :meth:`fixers.Fixer.effort`), and its values, ascending.

    The highest is the entry's own, or the largest one in the space of the adaptation.

    Raises:
        fixers.FixerError: the approach has no such parameter, or no room for two rungs.
    """
    import fixers

    cls, adapt = fixers.get(entry.name), entry.adapt or Adaptation()
    effort = cls.effort()
    if effort is None:
        able = ", ".join(name for name, other in fixers.all_fixers().items() if other.effort())
        raise fixers.ParameterError(
            f"asha cuts the parameter 'epochs', 'generations' or 'iterations' short, and {cls.name} has none of these; "
            f"use search: random, grid or optuna. Those that have: {able}."
        )
    full = int(getattr(cls.build(entry.params, entry.preset), effort))
    full = max(map(int, adapt.space.get(effort, [full])))
    least = int(cls.parameter_infos()[effort].low or 1)
    rungs = points.rungs(full, least=least, reduction=adapt.reduction, budget=adapt.most_trials)
    if len(rungs) < 2:
        raise fixers.ParameterError(
            f"asha needs two rungs at least, and {effort} = {full} of {cls.name} with a budget of {adapt.budget} and a "
            f"reduction of {adapt.reduction} gives one; raise {effort} or the budget, or use search: random."
        )
    return effort, rungs
