"""Modules of factories are taken as all else can work with them, or refused in one sentence."""

import pickle  # noqa: TID251 (Ray sends them that way)
from pathlib import Path
from typing import Any

import pytest
import torch
import unusual_modules as unusual
from own_subjects import spec, write_folder
from torch import nn

from analysis.contract.errors import UserError
from fixers import RepairProblem, fix, get, network
from orchestrator.subjects import weights
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.subject import SubjectDefinition

torch.set_num_threads(1)


def definition_of(factory: str, folder: Path, **more: Any) -> SubjectDefinition:
    if not (folder / "d").exists():
        write_folder(folder / "d")
    return resolve(spec("d", model=f"unusual_modules:{factory}", recipe={"epochs": 1}, **more), base_dir=folder)


PARAMETRISED = ["old_weight_norm", "new_weight_norm", "old_spectral_norm", "new_spectral_norm", "pruned"]


@pytest.mark.parametrize("factory", PARAMETRISED)
def test_weights_that_are_computed_anew_become_plain_ones(factory: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = getattr(unusual, factory)().eval()
    inputs = torch.rand(5, 3, 12, 12)
    with torch.no_grad():
        expected = theirs(inputs)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    model = definition_of(factory, tmp_path, weights="w.pt").build_model()
    assert sorted(model.state_dict()) == sorted(unusual.network().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected)
    assert isinstance(dict(model.named_parameters())["1.weight"], nn.Parameter)


@pytest.mark.parametrize(
    "factory",
    [*PARAMETRISED, "lazy", "parallel", "averaged", "wrapped_within", pytest.param("compiled", marks=pytest.mark.slow)],
)
def test_they_are_trained_travel_and_are_fixed(factory: str, tmp_path: Path) -> None:
    subject = prepare(definition_of(factory, tmp_path), data_root=None, cache_dir=tmp_path / "cache")
    subject = pickle.loads(pickle.dumps(subject, protocol=5))  # noqa: S301 (our own)
    assert network.why_untraceable(subject.model()) is None
    assert all(layer.name == layer.name.replace("module.", "") for layer in subject.facts().layers)
    data = subject.data
    problem = RepairProblem(subject.model(), train=data.train, valid=data.valid, repair=data.repair)
    assert problem.score(fix(get("finetune").build({"epochs": 1}), problem), data.repair) >= 0


@pytest.mark.parametrize("form", ["named", "tuple", "dict", "object", "mapping"])
def test_logits_among_other_outputs_are_taken_in_training_mode_and_always(form: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = unusual.several(form).eval()
    weights.write_state(tmp_path / "w.safetensors", theirs.state_dict())
    definition = definition_of("several", tmp_path, arguments={"form": form}, weights="w.safetensors")
    subject = prepare(definition, data_root=None, cache_dir=tmp_path / "cache")
    model, inputs = subject.model(), torch.rand(4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), theirs.head(theirs.body(inputs)))
    for part in model.modules():
        part.training = not isinstance(part, (nn.Dropout, nn.BatchNorm1d))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), theirs.head(theirs.body(inputs)))
    assert network.why_untraceable(model.eval()) is None
    trained = prepare(definition_of("several", tmp_path, arguments={"form": form}), data_root=None, cache_dir=tmp_path)
    problem = RepairProblem(
        trained.model(), train=trained.data.train, valid=trained.data.valid, repair=trained.data.repair
    )
    assert problem.score(fix(get("finetune").build({"epochs": 1}), problem), trained.data.repair) >= 0


REFUSED = {
    "scripted": "of TorchScript, which can't be changed; return the Python module",
    "script_within": "of TorchScript, which can't be changed; return the Python module",
    "exported": "that can't be .*: NotImplementedError: .*; return the Python module",
    "quantised": "without weights, as quantised ones are; return the Python module",
    "frozen": "whose weights are all frozen, so it can't be trained; give its 'weights'",
    "without_gradient": "that can't be trained: RuntimeError: element 0 of tensors does not require",
    "uncopied": "that can't be copied: TypeError: cannot pickle 'generator' object; return the",
    "demanding": r"can't be trained: AssertionError: labels should not be none when in training mode \(unusual_modu",
}


@pytest.mark.parametrize("factory", REFUSED)
def test_what_nothing_can_work_with_is_refused_in_one_sentence(factory: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^unusual_modules:{factory} returns a module .*{REFUSED[factory]}") as raised:
        definition_of(factory, tmp_path)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("features", "returns an object of type tuple in place of logits; let it return them alone"),
        ("lost", "in training mode, and nothing in it is what it returns in evaluation"),
    ],
)
def test_outputs_among_which_the_logits_cannot_be_told_are_refused(form: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        definition_of("several", tmp_path, arguments={"form": form})


def test_a_frozen_module_with_weights_is_an_original_like_any_other(tmp_path: Path) -> None:
    weights.write_state(tmp_path / "w.safetensors", unusual.network().state_dict())
    definition = definition_of("frozen", tmp_path, weights="w.safetensors")
    subject = prepare(definition, data_root=None, cache_dir=tmp_path)
    problem = RepairProblem(
        subject.model(), train=subject.data.train, valid=subject.data.valid, repair=subject.data.repair
    )
    assert all(parameter.requires_grad for parameter in problem.new_model().parameters())


def test_a_model_that_comes_with_its_weights_is_trained_for_no_epoch(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    definition = resolve(spec("d", model="unusual_modules:trained", recipe={"epochs": 0}), base_dir=tmp_path)
    subject = prepare(definition, data_root=None, cache_dir=tmp_path)
    for name, value in unusual.trained().state_dict().items():
        assert torch.equal(subject.model().state_dict()[name], value)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("torchvision.models:resnet18", {"num_classes": 3}),
        ("timm:create_model", {"model_name": "resnet10t", "num_classes": 3}),
    ],
)
def test_models_of_hubs_are_named_by_their_functions(function: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(function.partition(".")[0].partition(":")[0])
    write_folder(tmp_path / "d")
    given = spec("d", model=function, arguments=arguments)
    definition = resolve(given, base_dir=tmp_path)
    assert definition.n_classes == 3 and network.why_untraceable(definition.build_model()) is None
    with pytest.raises(UserError, match=f"^{function} fails: TypeError: .*unexpected keyword argument 'classes'"):
        resolve(given | {"arguments": arguments | {"classes": 3}}, base_dir=tmp_path)
