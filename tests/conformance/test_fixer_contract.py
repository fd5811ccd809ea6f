"""What every approach promises. Each assertion says, to the author of an approach, what is expected and why."""

import copy
import dataclasses
import json
import time

import pytest
import torch

import fixers
from conformance.conftest import Bench, Run, make_run
from fixers import DeadlineExceededError, Fixer, ParameterError, UnadaptableError
from fixers.requirements import SubjectFacts

LEVELS = {"model", "layer", "neuron"}
MOST_BATCHES = 4
"""Forward passes of one unit of work, such as two models on a batch and its augmented copy."""


def test_it_says_what_it_is(fixer: type[Fixer]) -> None:
    assert fixer.__module__.rpartition(".")[2].endswith(fixer.name), "name the file after the approach"
    assert fixer.level in LEVELS, f"level must be one of {LEVELS}"
    assert fixer.abbreviation, "reports need an abbreviation"
    assert any(char.isdigit() for char in fixer.reference), "the reference names authors, title and year"
    assert fixer.__doc__ and "Peak memory" in fixer.__doc__, "the docstring states the peak memory ('Peak memory: ...')"


def test_parameters_are_declared_and_every_grid_is_valid(fixer: type[Fixer]) -> None:
    for info in fixer.parameter_infos().values():
        assert info.help, f"'{info.name}' has no help text; a user must be able to choose a value"
        for value in (info.default, *info.grid):
            fixer.build({info.name: value})
    for preset in fixer.presets:
        fixer.build({}, preset)


def test_a_mistyped_parameter_gets_a_suggestion(fixer: type[Fixer]) -> None:
    names = list(fixer.parameter_infos())
    with pytest.raises(ParameterError, match="has no parameter") as caught:
        fixer.build({(names[0] + "x") if names else "anything": 1})
    if names:
        assert f"did you mean '{names[0]}'" in str(caught.value)


def test_a_value_of_the_wrong_type_is_refused(fixer: type[Fixer]) -> None:
    for name in fixer.parameter_infos():
        with pytest.raises(ParameterError, match=f"'{name}'"):
            fixer.build({name: object()})


def test_equal_settings_are_equal(fixer: type[Fixer]) -> None:
    first, second = fixer.build({}), fixer.build({})
    assert first.canonical_parameters() == second.canonical_parameters()
    assert json.loads(first.canonical_parameters()) == dataclasses.asdict(first)


def test_requirements_are_answered_without_running(fixer: type[Fixer], benches: list[Bench]) -> None:
    for bench in benches:
        facts = bench.facts()
        assert facts.layers, "the layers are traced once, before the clock starts"
        # Of this process, not of the wall: on a busy machine others' work would count.
        started = time.process_time()
        unmet = fixer.unmet(facts)
        assert time.process_time() - started < 1.0, "requirements look at the architecture and at counts, nothing else"
        if unmet is not None:
            assert unmet.code, "every requirement has a reason code"
            assert unmet.reason.endswith("."), "the reason is a sentence"


def test_an_unmet_requirement_stops_a_fix(fixer: type[Fixer], instance: Fixer, benches: list[Bench]) -> None:
    for bench in benches:
        if fixer.unmet(bench.facts()) is not None:
            with pytest.raises(UnadaptableError):
                fixers.fix(instance, bench.problem())


def test_the_given_model_is_untouched_bit_for_bit(instance: Fixer, bench: Bench, run: Run) -> None:
    for name, value in bench.model.state_dict().items():
        after = run.problem.original.state_dict()[name].cpu()
        assert torch.equal(value, after), f"problem.original changed in '{name}'"
    assert not run.problem.original.training, "problem.original must stay in eval mode"


def test_the_result_loads_into_the_same_architecture(fixer: type[Fixer], bench: Bench, run: Run) -> None:
    template = copy.deepcopy(bench.model)
    if fixer.extends_architecture:
        missing = bench.model.state_dict().keys() - run.fixed.state_dict().keys()
        assert not missing, f"an extended model keeps what the original has under its name, but {missing} are gone"
        template = copy.deepcopy(run.fixed).cpu()
    template.load_state_dict(run.fixed.state_dict(), strict=True)
    assert not run.fixed.training, "the fixed model comes back in eval mode"
    inputs = bench.splits["valid"].batch().inputs
    with torch.no_grad():
        torch.testing.assert_close(template.eval()(inputs), copy.deepcopy(run.fixed).cpu()(inputs))


def test_every_weight_is_finite(run: Run) -> None:
    for name, value in run.fixed.state_dict().items():
        assert torch.isfinite(value).all(), f"'{name}' has NaN or infinite values"


def test_the_fixed_model_is_no_alias_of_the_original(run: Run) -> None:
    original = {value.data_ptr() for value in run.problem.original.state_dict().values() if value.numel()}
    fixed = {value.data_ptr() for value in run.fixed.state_dict().values() if value.numel()}
    assert not original & fixed, "the fixed model shares memory with the original; start from problem.new_model()"


def test_progress_is_reported(run: Run) -> None:
    assert run.steps, "call problem.report(step, ...) once per epoch, generation or iteration"
    for metric in {name for _, figures in run.steps for name in figures}:
        steps = [step for step, figures in run.steps if metric in figures]
        assert steps == sorted(steps), f"the steps of '{metric}' go backwards; use another name in another phase"


def test_same_seed_same_bits(run: Run, again: Run) -> None:
    for name, value in run.fixed.state_dict().items():
        assert torch.equal(value, again.fixed.state_dict()[name]), (
            f"'{name}' differs between two runs with one seed: draw only from problem.generator(...), "
            "and let nothing depend on the clock"
        )


def test_the_global_generator_is_left_alone(again: Run) -> None:
    assert not again.moved_global_generator, "torch's global generator moved; draw from problem.generator(...)"


def test_the_deadline_is_honoured(instance: Fixer, bench: Bench) -> None:
    with pytest.raises(DeadlineExceededError):
        make_run(instance, bench, time_limit=0.0)


def test_the_deadline_is_checked_between_batches(run: Run) -> None:
    assert run.pace.most_batches <= MOST_BATCHES, (
        f"{run.pace.most_batches} batches went through the model without problem.check_deadline(); call it for each"
    )


@pytest.mark.parametrize(
    "moment", [0.5, pytest.param(1.0, marks=pytest.mark.slow)], ids=["in the middle", "at the end"]
)
def test_a_deadline_that_passes_ends_the_fix(moment: float, instance: Fixer, bench: Bench, run: Run) -> None:
    # The end of a run is a check of our own.
    stop_at = max(1, round(moment * (run.pace.checks - 1)))
    with pytest.raises(DeadlineExceededError):
        make_run(instance, bench, stop_at=stop_at)


def test_it_looks_at_nothing_but_its_problem(run: Run) -> None:
    assert not run.reached, (
        f"the fix reached for {run.reached}: the problem holds all data a fix may see, and problem.cached(...) keeps "
        "what it computes; whatever else lies on the machine may be test data"
    )


def _outcome(bench: Bench, rows: torch.Tensor) -> dict[str, object]:
    return {"repair": bench.splits["repair"].select(rows)}


@pytest.mark.parametrize("case", ["no failure", "one failure", "only failures", "a class missing", "one sample"])
def test_it_survives_unusual_repair_sets(case: str, instance: Fixer, bench: Bench, run: Run) -> None:
    wrong, labels = run.problem.wrong, bench.splits["repair"].labels
    failing, passing = wrong.nonzero().squeeze(1), (~wrong).nonzero().squeeze(1)
    rows = {
        "no failure": passing[:60],
        "one failure": torch.cat([failing[:1], passing[:60]]),
        "only failures": failing,
        "a class missing": (labels != labels[failing[0]]).nonzero().squeeze(1)[:120],
        "one sample": failing[:1],
    }[case]
    result = make_run(instance, bench, **_outcome(bench, rows))
    assert all(torch.isfinite(value).all() for value in result.fixed.state_dict().values())
    if case == "no failure":
        outputs = result.problem.outputs(result.fixed, bench.splits["valid"])
        before = result.problem.outputs(result.problem.original, bench.splits["valid"])
        assert torch.equal(outputs, before), "with nothing to fix, return an unchanged copy"


def test_facts_are_enough_for_requirements(fixer: type[Fixer], bench: Bench) -> None:
    facts = SubjectFacts(bench.model, (1, 8, 8), 10)
    unmet = fixer.unmet(facts)
    assert unmet is None or unmet.reason, "requirements must cope with a subject of which little is known"
