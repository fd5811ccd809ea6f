import pytest
import torch
from torch import nn

from fixers import network


@pytest.fixture
def model() -> nn.Module:
    """A shared layer, called twice, and a ReLU that works in place."""
    shared = nn.Linear(3, 3, bias=False)
    return nn.Sequential(shared, nn.ReLU(inplace=True), shared, nn.Dropout(), nn.Linear(3, 2))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_are_kept_as_they_were_before_an_operation_in_place(model):
    inputs = torch.linspace(-1, 1, 15).reshape(5, 3)
    with network.eval_mode(model), network.captured(model, ["0", "4"]) as calls:
        outputs = model(inputs)
    assert [name for name, _ in calls] == ["0", "0", "4"]
    assert torch.equal(calls.first["0"], model[0](inputs)) and (calls.first["0"] < 0).any()
    assert torch.equal(calls[-1][1], outputs)
    assert [len(values) for values in calls.by_layer.values()] == [2, 1]


def test_inputs_are_those_of_each_call(model):
    inputs = torch.randn(5, 3)
    with network.eval_mode(model), network.captured(model, ["0", "4"], inputs=True) as calls:
        model(inputs)
    assert calls[0][1] is inputs
    assert torch.equal(calls.by_layer["0"][1], model[0](inputs).relu())


def test_no_hook_is_left_after_an_exception(model):
    with pytest.raises(RuntimeError), network.captured(model, ["0", "1"]), network.captured(model, ["4"], inputs=True):
        assert hooks(model) == 3
        model(torch.randn(5, 7))
    assert hooks(model) == 0


def test_every_submodule_is_in_its_own_mode_again_after_an_exception(model):
    model.train()
    model[3].eval()
    with pytest.raises(RuntimeError), network.eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert not model[3].training
    assert all(module.training for module in model.modules() if module is not model[3])


def test_each_parameter_is_as_trainable_again_after_an_exception(model):
    model[4].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), network.frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["4.bias"]
