"""What every approach promises; each check says, to the author of an approach, what is expected and what is there."""

import copy
import dataclasses
import inspect
import json
from functools import cached_property
from typing import Final, get_args

import torch
from torch import nn

from fixers import registry
from fixers.apply import fix
from fixers.errors import DeadlineExceededError, ParameterError, UnadaptableError
from fixers.fixer import Fixer, Level
from fixers.requirements import SubjectFacts
from fixers.testing.benches import Bench, benches
from fixers.testing.promises import Case, ContractError
from fixers.testing.runs import Pace, Run, make_run

PRESET: Final = "quick"
BUDGETS: Final = {
    "epochs": 3,
    "max_epochs": 10,
    "rounds": 2,
    "generations": 5,
    "iterations": 20,
    "probe_epochs": 5,
    "passing": 30,
}
"""The contract holds for any budget, so it is checked with a small one where an approach has these parameters."""
MOST_BATCHES: Final = 4
"""Forward passes of one unit of work, such as two models on a batch and its augmented copy."""


class FixerCase(Case):
    """An approach under test, and the fixes that several checks look at."""

    def __init__(self, fixer: type[Fixer]) -> None:
        super().__init__(fixer.name, inspect.getsourcefile(fixer))
        self.fixer = fixer

    @cached_property
    def bench(self) -> Bench:
        """The first of the small subjects to which the approach applies."""
        for candidate in benches():
            if self.fixer.unmet(candidate.facts()) is None:
                return candidate
        raise ContractError(
            f"{self.name} applies to neither a LeNet nor a residual network with batch norm; loosen its requirements."
        )

    @cached_property
    def instance(self) -> Fixer:
        """The approach with its quick preset, which every approach has, and less of everything that takes time."""
        self.expect(PRESET in self.fixer.presets, f"has no preset '{PRESET}' that takes seconds on a small subject")
        quick, infos = self.fixer.build({}, PRESET), self.fixer.parameter_infos()
        less = {name: min(value, getattr(quick, name)) for name, value in BUDGETS.items() if name in infos}
        return self.fixer.build({name: max(value, infos[name].low or 0) for name, value in less.items()}, PRESET)

    @property
    def run(self) -> Run:
        """One fix, shared by the checks that only look at its result; what it raised, each time."""
        return _given(self._run)

    @property
    def again(self) -> Run:
        """The same fix once more, from another state of torch's global generator."""
        return _given(self._again)

    @cached_property
    def _run(self) -> Run | Exception:
        return self._ended()

    @cached_property
    def _again(self) -> Run | Exception:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            return self._ended()

    def _ended(self) -> Run | Exception:
        try:
            return make_run(self.instance, self.bench)
        # Whatever somebody's code may raise.
        except Exception as error:
            return error


def _given(ended: Run | Exception) -> Run:
    if isinstance(ended, Exception):
        raise ended
    return ended


def approaches(source: str) -> list[type[Fixer]]:
    """The approach of that name, or those of a file or module.

    Raises:
        UnknownFixerError: there is no such file or module, it fails, no approach is in it, or a name is taken.
    """
    known = registry.all_fixers()
    return [known[source]] if source in known else registry.load(source)


def test_it_says_what_it_is(case: FixerCase) -> None:
    """An approach says what it is."""
    fixer, levels = case.fixer, get_args(Level)
    file = fixer.__module__.rpartition(".")[2]
    case.expect(file.endswith(fixer.name), "lies in a file of another name; name the file after the approach")
    case.expect(fixer.level in levels, f"has the level '{fixer.level}'; there are {', '.join(levels)}")
    case.expect(fixer.abbreviation, "has no abbreviation, which reports need")
    case.expect(
        any(char.isdigit() for char in fixer.reference), "has a reference without a year; name authors, title and year"
    )
    case.expect(
        "Peak memory" in (fixer.__doc__ or ""), "doesn't state its peak memory in its docstring ('Peak memory: ...')"
    )


def test_parameters_are_declared_and_every_grid_is_valid(case: FixerCase) -> None:
    """Parameters are explained, and their defaults, grids and presets are allowed."""
    for info in case.fixer.parameter_infos().values():
        case.expect(info.help, f"has no help text for '{info.name}'; a user must be able to choose a value")
        for value in (info.default, *info.grid):
            case.fixer.build({info.name: value})
    for preset in case.fixer.presets:
        case.fixer.build({}, preset)


def test_a_mistyped_parameter_gets_a_suggestion(case: FixerCase) -> None:
    """A mistyped parameter gets a suggestion."""
    names = list(case.fixer.parameter_infos())
    suggestion = f"did you mean '{names[0]}'" if names else "has no parameter"
    with case.expect_error(ParameterError, "takes a parameter that it doesn't declare", saying=suggestion):
        case.fixer.build({(names[0] + "x") if names else "anything": 1})


def test_a_value_of_the_wrong_type_is_refused(case: FixerCase) -> None:
    """A value of the wrong type is refused, with the name of its parameter."""
    for name in case.fixer.parameter_infos():
        with case.expect_error(ParameterError, f"takes an object() for '{name}'", saying=f"'{name}'"):
            case.fixer.build({name: object()})


def test_equal_settings_are_equal(case: FixerCase) -> None:
    """Equal settings are written alike, and as they are."""
    first, second = case.fixer.build({}), case.fixer.build({})
    written = first.canonical_parameters()
    case.expect(written == second.canonical_parameters(), "writes the same settings in two ways")
    case.expect(json.loads(written) == dataclasses.asdict(first), "writes other settings than it has")


def test_requirements_are_answered_without_running(case: FixerCase) -> None:
    """Requirements look at the architecture and at counts, nothing else."""
    for bench in benches():
        facts, pace = bench.facts(), Pace()
        case.expect(facts.layers, "is asked before the layers are traced")
        with pace.counting(bench.model):
            unmet = case.fixer.unmet(facts)
        # A single random input may tell more than the architecture does.
        case.expect(pace.batches <= len(case.fixer.requirements), "runs the model to answer its requirements")
        if unmet is not None:
            case.expect(unmet.code, "has a requirement without a reason code")
            case.expect(unmet.reason.endswith("."), f"gives a reason that is no sentence: {unmet.reason}")


def test_an_unmet_requirement_stops_a_fix(case: FixerCase) -> None:
    """An unmet requirement stops a fix."""
    for bench in benches():
        if case.fixer.unmet(bench.facts()) is not None:
            with case.expect_error(UnadaptableError, "fixes a model that doesn't meet its requirements"):
                fix(case.instance, bench.problem())


def test_it_fixes_a_small_model(case: FixerCase) -> None:
    """A fix of a small model ends with a fixed one."""
    case.expect(isinstance(case.run.fixed, nn.Module), "gives back something other than a model")


def test_the_given_model_is_untouched_bit_for_bit(case: FixerCase) -> None:
    """The given model stays untouched, bit for bit."""
    original = case.run.problem.original
    for name, value in case.bench.model.state_dict().items():
        after = original.state_dict()[name].cpu()
        case.expect(torch.equal(value, after), f"changes '{name}' of problem.original; start from problem.new_model()")
    case.expect(not original.training, "leaves problem.original in training mode")


def test_the_result_loads_into_the_same_architecture(case: FixerCase) -> None:
    """The fixed model comes back in eval mode, and its weights load into the original's architecture."""
    fixed, template = case.run.fixed, copy.deepcopy(case.bench.model)
    if case.fixer.extends_architecture:
        missing = template.state_dict().keys() - fixed.state_dict().keys()
        case.expect(not missing, f"extends the model and doesn't keep what the original has by its name: {missing}")
        template = copy.deepcopy(fixed).cpu()
    template.load_state_dict(fixed.state_dict(), strict=True)
    case.expect(not fixed.training, "gives the fixed model back in training mode")
    inputs = case.bench.splits["valid"].batch().inputs
    with torch.no_grad():
        torch.testing.assert_close(template.eval()(inputs), copy.deepcopy(fixed).cpu()(inputs))


def test_every_weight_is_finite(case: FixerCase) -> None:
    """Every weight is finite."""
    _expect_finite(case, case.run)


def test_the_fixed_model_is_no_alias_of_the_original(case: FixerCase) -> None:
    """The fixed model shares no memory with the original."""
    states = case.run.problem.original.state_dict(), case.run.fixed.state_dict()
    original, fixed = ({value.data_ptr() for value in state.values() if value.numel()} for state in states)
    case.expect(not original & fixed, "gives back weights of the original itself; start from problem.new_model()")


def test_progress_is_reported(case: FixerCase) -> None:
    """Progress is reported, once per epoch, generation or iteration."""
    steps_of: dict[str, list[int]] = {}
    case.expect(case.run.steps, "never calls problem.report(step, ...)")
    for step, figures in case.run.steps:
        for metric in figures:
            steps_of.setdefault(metric, []).append(step)
    for metric, steps in steps_of.items():
        case.expect(
            steps == sorted(steps), f"lets the steps of '{metric}' go backwards; use another name in another phase"
        )


def test_same_seed_same_bits(case: FixerCase) -> None:
    """The same seed gives the same bits."""
    state = case.again.fixed.state_dict()
    for name, value in case.run.fixed.state_dict().items():
        case.expect(
            torch.equal(value, state[name]),
            f"gives another '{name}' in a second run with the same seed; draw only from problem.generator(...), and "
            "let nothing depend on the clock",
        )


def test_the_global_generator_is_left_alone(case: FixerCase) -> None:
    """Torch's global generator is left alone."""
    case.expect(not case.again.moved_global_generator, "moves the generator; draw from problem.generator(...)")


def test_the_deadline_is_honoured(case: FixerCase) -> None:
    """A fix ends when its time limit has passed."""
    with case.expect_error(DeadlineExceededError, "finishes without any time left; let problem.report raise"):
        make_run(case.instance, case.bench, time_limit=0.0)


def test_the_deadline_is_checked_between_batches(case: FixerCase) -> None:
    """The deadline is checked between batches."""
    most = case.run.pace.most_batches
    case.expect(
        most <= MOST_BATCHES,
        f"sends {most} batches through the model without problem.check_deadline(); call it for each",
    )


def test_a_deadline_that_passes_ends_the_fix(case: FixerCase) -> None:
    """A deadline that passes in the middle ends the fix."""
    _expect_end(case, 0.5)


def test_a_deadline_that_passes_at_the_end_ends_the_fix(case: FixerCase) -> None:
    """A deadline that passes at the end ends the fix."""
    _expect_end(case, 1.0)


def test_it_looks_at_nothing_but_its_problem(case: FixerCase) -> None:
    """A fix looks at nothing but its problem."""
    case.expect(
        not case.run.reached,
        f"reaches for {', '.join(case.run.reached[:3])}: the problem holds all data a fix may see, and "
        "problem.cached(...) keeps what it computes; whatever else lies on the machine may be test data",
    )


def test_it_leaves_a_model_without_failures_as_it_is(case: FixerCase) -> None:
    """With nothing to fix, an unchanged copy comes back."""
    result = _fix_only(case, _passing(case)[:60])
    fixed, original = result.fixed, result.problem.original
    outputs, before = (result.problem.outputs(model, case.bench.splits["valid"]) for model in (fixed, original))
    case.expect(torch.equal(outputs, before), "changes a model that fails on no sample")


def test_it_survives_one_failure(case: FixerCase) -> None:
    """One failure among correct samples is no reason to raise."""
    _fix_only(case, torch.cat([_failing(case)[:1], _passing(case)[:60]]))


def test_it_survives_only_failures(case: FixerCase) -> None:
    """A repair split of failures only is no reason to raise."""
    _fix_only(case, _failing(case))


def test_it_survives_a_class_without_samples(case: FixerCase) -> None:
    """A class without samples in the repair split is no reason to raise."""
    labels = case.bench.splits["repair"].labels
    _fix_only(case, (labels != labels[_failing(case)[0]]).nonzero().squeeze(1)[:120])


def test_it_survives_a_single_sample(case: FixerCase) -> None:
    """A repair split of a single sample is no reason to raise."""
    _fix_only(case, _failing(case)[:1])


def test_facts_are_enough_for_requirements(case: FixerCase) -> None:
    """Requirements cope with a subject of which little is known."""
    unmet = case.fixer.unmet(SubjectFacts(case.bench.model, (1, 8, 8), 10))
    case.expect(unmet is None or unmet.reason, "gives no reason why it doesn't apply")


def _failing(case: FixerCase) -> torch.Tensor:
    return case.run.problem.wrong.nonzero().squeeze(1)


def _passing(case: FixerCase) -> torch.Tensor:
    return (~case.run.problem.wrong).nonzero().squeeze(1)


def _fix_only(case: FixerCase, rows: torch.Tensor) -> Run:
    """A fix with some samples of the repair split."""
    result = make_run(case.instance, case.bench, repair=case.bench.splits["repair"].select(rows))
    _expect_finite(case, result)
    return result


def _expect_finite(case: FixerCase, run: Run) -> None:
    for name, value in run.fixed.state_dict().items():
        case.expect(torch.isfinite(value).all(), f"gives NaN or infinite values in '{name}'")


def _expect_end(case: FixerCase, moment: float) -> None:
    """A fix ends where its deadline passes after a share of its checks."""
    # The end of a run is a check of our own.
    stop_at = max(1, round(moment * (case.run.pace.checks - 1)))
    with case.expect_error(DeadlineExceededError, "goes on after its deadline; let problem.report's exception pass"):
        make_run(case.instance, case.bench, stop_at=stop_at)
