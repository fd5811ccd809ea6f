"""The contract of every mitigation, and what is particular to each."""

import copy

import pytest
import torch
from torch import nn

import fixers
from fixers import DeadlineExceededError, RepairProblem, TensorSplit, UnadaptableError
from fixers.mitigations import MitigationProblem, all_mitigations, cross_fitted, get, mitigate
from fixers.mitigations.aligned_voting import AlignedVoting
from fixers.mitigations.scaling import Scaling
from fixers.mitigations.temperatures import SCALING_RANGE, best_temperature
from orchestrator.subjects.onnx.exporting import export_onnx

NAMES = sorted(all_mitigations())
FITTED = ("aligned_voting", "scaling", "weight_interpolation")

every = pytest.mark.parametrize("name", NAMES)


class Recorded(TensorSplit):
    """A split that knows whether it was read, its labels included."""

    def __init__(self, split, reads):
        self._all_labels = split._all_labels
        self._inputs, self._indices, self._reads = split._inputs, split._indices, reads

    def row_inputs(self, rows, device):
        self._reads.append(len(rows))
        return super().row_inputs(rows, device)

    @property
    def labels(self):
        self._reads.append(0)
        return torch.from_numpy(self._all_labels[self._indices])


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


def test_the_five_are_found_by_name_and_abbreviation():
    assert {mitigation.abbreviation for mitigation in all_mitigations().values()} == {"SV", "HV", "US", "AV", "WI"}
    assert get("av") is get("aligned_voting") is AlignedVoting
    with pytest.raises(fixers.UnknownFixerError, match="did you mean 'soft_voting'"):
        get("soft_votin")
    with pytest.raises(fixers.ParameterError, match="no parameter 'bugdet'; did you mean 'budget'"):
        get("av").build({"bugdet": 0.1})


@every
def test_a_combination_keeps_the_contract(name, make_mitigation_problem, digits, tmp_path):
    problem = make_mitigation_problem("resnet")
    members = [state_of(member) for member in problem.members]
    random_state = torch.random.get_rng_state()
    model = mitigate(get(name)(), problem)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(same(before, member.state_dict()) for before, member in zip(members, problem.members, strict=True))
    own = {value.data_ptr() for value in model.state_dict().values() if value.numel()}
    assert not own & {value.data_ptr() for member in problem.members for value in member.state_dict().values()}
    assert isinstance(model.members, nn.ModuleList) and not model.training

    inputs = digits["held_out"].select(torch.arange(64)).batch().inputs
    outputs = model(inputs)
    assert outputs.shape == (64, 10) and outputs.dtype == torch.float32
    assert outputs.isfinite().all() and outputs.logsumexp(dim=-1).abs().max() <= 1e-5
    assert torch.equal(model(inputs), outputs), "nothing is drawn"
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    singly = torch.cat([model(each[None]) for each in inputs])
    for other, expected in ((model(inputs[order]), outputs[order]), (singly, outputs)):
        assert torch.allclose(other, expected, atol=2e-5, rtol=1e-6)
        assert torch.equal(other.argmax(dim=-1), expected.argmax(dim=-1))

    again = mitigate(get(name)(), make_mitigation_problem("resnet"))
    other_seed = mitigate(get(name)(), make_mitigation_problem("resnet", seed=5))
    assert same(model.state_dict(), again.state_dict()) and same(model.state_dict(), other_seed.state_dict())
    twin = copy.deepcopy(model)
    for buffer in twin.buffers():
        buffer.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(inputs), outputs)
    # The exporter compares with onnxruntime at batches of 1, 2 and 5.
    assert export_onnx(model, tmp_path / "m.onnx", input_shape=(1, 8, 8)) <= 1e-5


@every
def test_a_copy_of_the_original_changes_no_decision(name, make_mitigation_problem, repaired, digits):
    plain = repaired["resnet"][0].original
    problem = make_mitigation_problem("resnet", fixed=plain)
    model = mitigate(get(name)(), problem)
    assert problem.notes["identical"] is True
    inputs = digits["held_out"].batch().inputs
    assert torch.equal(model(inputs).argmax(dim=-1), plain(inputs).argmax(dim=-1))


@every
def test_numbers_are_fitted_on_valid_alone(name, make_mitigation_problem, digits):
    reads = {split: [] for split in ("train", "valid", "repair")}
    spied = {split: Recorded(digits[split], seen) for split, seen in reads.items()}
    problem = make_mitigation_problem("resnet", **spied)
    for seen in reads.values():
        seen.clear()
    model = mitigate(get(name)(), problem)
    assert not reads["repair"]
    assert bool(reads["train"]) == (name == "weight_interpolation"), "for the statistics of batch norm"
    assert not any(reads["train"]) or max(reads["train"]) <= len(digits["train"])
    assert any(reads["valid"]) == (name in FITTED)
    labels = digits["repair"].labels.flip(0)
    shuffled = TensorSplit(digits["repair"]._inputs[digits["repair"]._indices], labels)
    other = mitigate(get(name)(), make_mitigation_problem("resnet", repair=shuffled))
    assert same(model.state_dict(), other.state_dict())


@every
@pytest.mark.parametrize(
    "case", ["no failures", "only failures", "one sample", "a class is missing", "far too sure", "knows nothing"]
)
def test_unusual_data_give_finite_outputs_or_unadaptable(case, name, make_mitigation_problem, repaired, digits):
    problem, fixed = repaired["lenet"]
    valid = digits["valid"]
    wrong = problem.wrong_on(problem.original, valid)
    rows = {
        "no failures": ~wrong,
        "only failures": wrong,
        "one sample": torch.tensor([0]),
        "a class is missing": valid.labels != 3,
    }
    scale = {"far too sure": 1e4, "knows nothing": 0.0}.get(case, 1.0)
    fixed = copy.deepcopy(fixed)
    with torch.no_grad():
        for parameter in fixed.classifier[-1].parameters():
            parameter.mul_(scale)
    if case in rows:
        valid = valid.select(rows[case].nonzero().squeeze(1) if rows[case].dtype == torch.bool else rows[case])
    problem = make_mitigation_problem(fixed=fixed, valid=valid)
    if len(valid) < 50 and name in FITTED:
        with pytest.raises(UnadaptableError, match="needs 50 samples"):
            mitigate(get(name)(), problem)
        return
    outputs = mitigate(get(name)(), problem)(digits["held_out"].batch().inputs)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("name", FITTED)
def test_the_deadline_is_honoured(name, make_mitigation_problem):
    with pytest.raises(DeadlineExceededError):
        mitigate(get(name)(), make_mitigation_problem(time_limit=-1))


@pytest.mark.parametrize("name", ["aligned_voting", "weight_interpolation"])
def test_cross_fitted_figures_judge_every_sample_once_by_numbers_of_the_others(name, make_mitigation_problem):
    problem = make_mitigation_problem("resnet")
    effect = cross_fitted(get(name)(), problem)
    assert effect.n == len(problem.valid)
    assert effect.wrong == problem.effect(problem.member_outputs()[0]).wrong
    assert problem.notes == {}, "facts of a fold are none of the model"
    folds = problem.folds()
    assert sorted(torch.cat(folds).tolist()) == list(range(len(problem.valid)))
    for label in range(10):
        counts = [(problem.valid.labels[fold] == label).sum().item() for fold in folds]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
def test_a_planted_temperature_is_found(scale):
    fixed = 2 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    assert fitted(Scaling(), scale * fixed, fixed)["temperatures"][0] == pytest.approx(scale, rel=0.01)
    if scale > 1:
        pulled = fitted(Scaling(ridge=5e-4), scale * fixed, fixed)["temperatures"][0]
        assert pulled < 0.9 * scale, "the source's penalty is another fit"


def test_a_temperature_beyond_the_range_is_noted():
    fixed = 2 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    notes = fitted(Scaling(), 100 * fixed, fixed)
    assert notes == {"temperatures": [20.0, 1.0], "temperature_at_bound": True}
    assert best_temperature(lambda temperature: 0.3, SCALING_RANGE).value == 1


class Half(nn.Module):
    """One of two members whose outputs are the inputs."""

    def __init__(self, start):
        super().__init__()
        self.start = start

    def forward(self, x):
        return x[:, self.start : self.start + 10]


def fitted(mitigation, original, fixed, labels=None):
    """What a mitigation notes for these outputs of the two members on valid."""
    split = TensorSplit(torch.cat([original, fixed], dim=1), fixed.argmax(dim=-1) if labels is None else labels)
    problem = MitigationProblem(RepairProblem(Half(0), train=split, valid=split, repair=split), [Half(10)])
    mitigate(mitigation, problem)
    problem.notes.pop("identical", None)
    return problem.notes


def test_aligned_voting_finds_the_temperatures_that_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(2000, 10, generator=generator)
    drawn = torch.multinomial(honest.softmax(dim=-1), 1, generator=generator).squeeze(1)
    notes = fitted(AlignedVoting(), 0.5 * honest, 15 * honest, drawn)
    assert notes["temperatures"] == pytest.approx([0.5, 15.0], rel=0.06)
    always_right = fitted(AlignedVoting(), 0.5 * honest, 15 * honest)
    assert always_right["temperature_smoothed"] is True
    assert always_right["temperatures"][1] > 0.1, "without the sample more it would end at the bound"


def test_aligned_voting_keeps_its_budget_on_valid(make_mitigation_problem):
    problem = make_mitigation_problem()
    fixed = problem.effect(problem.member_outputs()[1])
    model = mitigate(AlignedVoting(budget=0.5), problem)
    effect = problem.effect(problem.outputs("mitigated", lambda: model))
    assert fixed.broken >= 2 and effect.broken <= fixed.broken / 2
    assert effect.repaired > 0


def test_weights_of_an_extended_architecture_are_not_mixed_and_outputs_are(make_mitigation_problem, repaired):
    extended = nn.Sequential(copy.deepcopy(repaired["lenet"][1]))
    problem = make_mitigation_problem(fixed=extended)
    with pytest.raises(UnadaptableError, match="isn't of the original's architecture"):
        mitigate(get("wi")(), problem)
    assert get("wi").unmet(problem.facts).code == "different_architecture"
    mitigate(get("sv")(), problem)


def test_several_fixed_models_vote_and_their_weights_do_not_mix(repaired, digits):
    problem, fixed = repaired["lenet"]
    three = MitigationProblem(problem, [fixed, problem.original])
    for name in ("sv", "hv", "us", "av"):
        outputs = mitigate(get(name)(), three)(digits["valid"].batch().inputs)
        assert outputs.logsumexp(dim=-1).abs().max() <= 1e-5
    assert get("wi").unmet(three.facts).code == "too_many_members"
