"""A model that goes out as ONNX must come back as the model it was."""

import copy
import os
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from unusual_modules import tied

from analysis.contract.errors import UserError
from fixers.network.places import Places
from fixers.neuron_level.nnrepair.experts import RULES, ExpertNetwork, Experts
from fixers.task import Classification
from orchestrator.subjects.architectures import ARCHITECTURES
from orchestrator.subjects.onnx.exporting import ModelExportError, export_onnx
from orchestrator.subjects.onnx.importing import load_onnx

KINDS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.Dropout)


def parameters_by_kind(model: nn.Module) -> Counter[str]:
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, KINDS):
            name = type(module).__name__
            counts[name] += 1
            counts[f"{name} parameters"] += sum(value.numel() for value in module.parameters(recurse=False))
    return counts


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


def cnn() -> nn.Sequential:
    """Every layer that an export for deployment would fold away, freshly initialised."""
    return nn.Sequential(
        Normalise(),
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 7),
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize(("make", "shape"), [(cnn, (3, 8, 8)), (mlp, (30,))])
def test_round_trip_is_exact(tmp_path: Path, make: type[nn.Module], shape: tuple[int, ...], opset: int) -> None:
    model = make()
    difference = export_onnx(model, tmp_path / "m.onnx", input_shape=shape, opset=opset)
    assert 0 <= difference < 1e-5
    imported = load_onnx(tmp_path / "m.onnx")
    assert imported.opset == opset
    assert imported.input_shape == shape
    assert imported.cut == ()
    assert parameters_by_kind(imported.model) == parameters_by_kind(model)
    expected = {k: v for k, v in model.state_dict().items() if "num_batches" not in k and k not in ("0.mean", "0.std")}
    given = imported.model.state_dict()
    assert expected.keys() <= given.keys()
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    assert [m.p for m in imported.model.modules() if isinstance(m, nn.Dropout)] == [
        m.p for m in model.modules() if isinstance(m, nn.Dropout)
    ]
    batch = torch.rand(9, *shape)
    assert (imported.model(batch) - model.eval()(batch)).abs().max() <= 1e-5


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = cnn().train()
    model[2].eval()  # a frozen batch norm
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    export_onnx(model, tmp_path / "m.onnx", input_shape=(3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_clean_file_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    path.write_text("an older export")
    path.chmod(0o644)
    metadata = {"trial_id": "9f2c", "fixer": "arachne", "accuracy_fixed": "0.9897", "note": "héllo"}
    export_onnx(cnn(), path, input_shape=(3, 8, 8), metadata=metadata)
    assert [item.name for item in tmp_path.iterdir()] == ["fixed.onnx"]
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == metadata
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BatchNormalization"] == 2
    assert kinds["Dropout"] == 2
    assert kinds["Identity"] == 0
    onnx.checker.check_model(model, full_check=True)


def test_nothing_is_left_when_the_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("precious")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelExportError, match=r"Cannot write m.onnx \(No space left on device\)"):
        export_onnx(mlp(), path, input_shape=(30,))
    assert path.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


class Wanders(nn.Module):
    """Takes a branch by the values of the data, which tracing freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if bool(x.sum() == 0) else self.fc(-x)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (Wanders(), (4,), "outputs differ by"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(75, 2)), (3, 8, 8), "adaptive_avg_pool2d"),
        (nn.Linear(4, 3), (5,), "shapes cannot be multiplied"),
    ],
)
def test_an_unfaithful_export_is_refused(
    tmp_path: Path, model: nn.Module, shape: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(ModelExportError, match=expected) as caught:
        export_onnx(model, tmp_path / "m.onnx", input_shape=shape)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_opset_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ModelExportError, match="from 11 to 20"):
        export_onnx(mlp(), tmp_path / "m.onnx", input_shape=(30,), opset=24)


# The architectures of the study.

SHAPES = {
    "LeNet5": (1, 28, 28),
    "FaceNet": (3, 48, 48),
    "VGG16": (3, 32, 32),
    "ResNet18": (3, 32, 32),
    "DenseNet121": (3, 64, 64),
}


def architecture(name: str) -> nn.Module:
    """With batch norms as after training: fresh ones do nothing, and losing them would not be noticed."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name](2 if name == "FaceNet" else 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("opset", [11, 14, 17, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_architecture_round_trip(tmp_path: Path, name: str, opset: int) -> None:
    model, shape = architecture(name), SHAPES[name]
    export_onnx(model, tmp_path / "m.onnx", input_shape=shape, opset=opset)
    imported = load_onnx(tmp_path / "m.onnx")
    assert imported.opset == opset
    assert parameters_by_kind(imported.model) == parameters_by_kind(model)
    weights = dict(model.named_parameters())
    assert {n: v.shape for n, v in imported.model.named_parameters()} == {n: v.shape for n, v in weights.items()}
    pixels = torch.rand(3, *shape)
    with torch.no_grad():
        assert (imported.model(pixels) - model(pixels)).abs().max() <= 1e-4
        trained = imported.model.train()
        trained(pixels)
    norms = [module for module in trained.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21, None])
@pytest.mark.parametrize("name", SHAPES)
def test_architecture_from_the_new_exporter(tmp_path: Path, name: str, opset: int | None) -> None:
    """None: what torch takes today."""
    model, shape = architecture(name), SHAPES[name]
    torch.onnx.export(
        model,
        (torch.rand(2, *shape),),
        tmp_path / "m.onnx",
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    imported = load_onnx(tmp_path / "m.onnx")
    given, expected = parameters_by_kind(imported.model), parameters_by_kind(model)
    assert given["Conv2d"] == expected["Conv2d"]
    assert given["Linear"] == expected["Linear"]
    pixels = torch.rand(3, *shape)
    with torch.no_grad():
        assert (imported.model(pixels) - model(pixels)).abs().max() <= 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_experts_that_vote_are_written_as_one_network(rule, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    weight = model[3].weight.detach()
    places = Places(("3",), (torch.arange(weight.numel()),))
    values = weight.flatten() + torch.randn(2, weight.numel())
    experts = Experts(torch.tensor([0, 2]), places, values)
    network = ExpertNetwork(model, experts, rule, torch.tensor([0.9, 0.4]), Classification(3))
    export_onnx(network, tmp_path / "voting.onnx", input_shape=(3, 2, 2))
    pixels = torch.rand(500, 3, 2, 2)
    session = onnxruntime.InferenceSession(tmp_path / "voting.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    wanted = network(pixels)
    torch.testing.assert_close(torch.from_numpy(outputs), wanted, rtol=1e-4, atol=1e-5)
    decided_by_experts = (wanted != model(pixels)).any(dim=1).float().mean()
    assert 0.05 < decided_by_experts < 0.95


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_weight_that_layers_share_is_written_once_and_equal_ones_twice(is_tied: bool, tmp_path: Path) -> None:
    model = tied().eval()
    if not is_tied:
        model.second.weight = nn.Parameter(model.first.weight.detach().clone())
    export_onnx(model, tmp_path / "m.onnx", input_shape=(432,))
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    names = {tensor.name for tensor in graph.initializer}
    assert {"first.weight", "first.bias", "second.bias", "last.weight", "last.bias"} == names - {"second.weight"}
    assert ("second.weight" in names) is not is_tied
    inputs = torch.rand(4, 432)
    with torch.no_grad():
        torch.testing.assert_close(load_onnx(tmp_path / "m.onnx").model(inputs), model(inputs))
