"""Ways to repair types: fine-tuning with and without what is right, on one type or on all, and EWC; or any approach.

Runs are compared by optimiser steps on failures: ``steps`` is the most that a run takes, whatever its number of
failures, and it is judged on the samples that select twenty times on the way. (The paper gives runs on all types n
times the steps of those on one, and ten times the epochs.)
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from torch import nn

from fixers.apply import fix
from fixers.errors import ParameterError
from fixers.failure_types.divisions import Division
from fixers.fixer import suggest
from fixers.registry import get

TUNING: Final[Mapping[str, Mapping[str, Any]]] = {
    # The paper takes one failure a step at 1e-6, for up to 100 epochs of at most 1,000; sixteen at once at sixteen
    # times the rate take about as long a way.
    "study": {"steps": 2000, "batch_size": 16, "learning_rate": 1.6e-5},
    "quick": {"steps": 200, "batch_size": 16, "learning_rate": 1e-3},
}
"""Steps at most, failures of a step (and right samples of the step after it) and learning rate of Adam, by preset."""
_SELECTIONS: Final = 20
_ONE_TO_ONE: Final = {"correct_share": 0.5}
_NONE_CORRECT: Final = {"correct_share": 0.0}


@dataclass(frozen=True)
class Repair:
    """A way to repair failure types."""

    name: str
    fixer: str
    """Registry name of the approach that does it."""
    scope: Literal["single", "all"]
    """One model for each type, or one for all of them."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Of the approach, as far as they make it this way; for an approach of its own right, as given."""
    preset: str | None = None
    tunes: bool = True
    """Whether it is tuned by steps on failures, as :data:`TUNING` says."""

    def parameters(self, n_failures: int, given: Mapping[str, Any] | None = None, preset: str = "study") -> str:
        """Hyper-parameters of the approach as canonical JSON.

        Args:
            n_failures: that train.
            given: in place of the defaults, ``steps`` among them.
            preset: of :data:`TUNING`.

        Raises:
            ParameterError: the approach has no such parameter or value.
        """
        values = dict(given or {})
        if self.tunes:
            values = {**TUNING.get(preset, TUNING["study"]), **values}
            steps, at_once = _whole(values, "steps"), _whole(values, "batch_size")
            per_epoch = min(math.ceil(n_failures / at_once), max(1, steps // _SELECTIONS))
            epochs = math.ceil(steps / per_epoch)
            values |= {"steps_per_epoch": per_epoch, "epochs": epochs, "patience": epochs, "holdout": 0.0}
            if self.params.get("correct_share"):
                values["batch_size"] = 2 * at_once
        return get(self.fixer).build({**values, **self.params}, self.preset).canonical_parameters()


def _whole(values: dict[str, Any], name: str) -> int:
    value = values.pop(name) if name == "steps" else values[name]
    if type(value) is not int or value < 1:
        raise ParameterError(f"'{name}' of a repair must be a whole number of at least 1, but got {value!r}.")
    return value


MATRIX: Final = Repair("matrix", "finetune", "single", {**_ONE_TO_ONE, "preserve": 0.9})
"""What Learnability and Independence are measured by: tuned on a type and on what is right in equal parts, and only
weights that keep 0.9 of the right samples count. Where there are none the result is the original."""
REPAIRS: Final = {
    repair.name: repair
    for repair in (
        Repair("single", "finetune", "single", {**_NONE_CORRECT, "preserve": 0.0}),
        Repair("single_and_correct", "finetune", "single", {**_ONE_TO_ONE, "preserve": 0.0}),
        Repair("all", "finetune", "all", {**_NONE_CORRECT, "preserve": 0.0}),
        Repair("all_and_correct", "finetune", "all", {**_ONE_TO_ONE, "preserve": 0.0}),
        Repair("ewc", "ewc", "all", {"preserve": 0.0}),
    )
}
"""The rows of the paper's Table 2. They are selected on failures alone."""


def repair_named(name: str, preset: str | None = None) -> Repair:
    """A way of repair by its name, or any registered approach, which repairs all types at once.

    Raises:
        ParameterError: there is neither.
    """
    from fixers.registry import all_fixers

    if name == MATRIX.name:
        return MATRIX
    if name in REPAIRS:
        return REPAIRS[name]
    try:
        approach = get(name)
    except LookupError:
        known = suggest(name, [MATRIX.name, *REPAIRS, *all_fixers()])
        raise ParameterError(f"There is no repair '{name}'{known}") from None
    own = preset if preset in approach.presets else None
    return Repair(approach.name, approach.name, "all", preset=own, tunes=False)


def repair(division: Division, way: Repair, types: list[int], preset: str = "study", **given: Any) -> nn.Module:
    """Repair some types of a pool.

    Args:
        division: who trains and who selects.
        way: of repair.
        types: one of them, or all.
        preset: of :data:`TUNING`.
        given: hyper-parameters in place of the defaults.

    Returns:
        The repaired model; the original where no weights qualified.
    """
    problem = division.problem(types)
    params = json.loads(way.parameters(len(problem.failures), given, preset))
    return fix(get(way.fixer).build(params), problem)
