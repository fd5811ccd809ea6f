"""A factory's module as all else works with it: bare, with plain weights, and logits alone."""

import copy
import io
import pickle  # noqa: TID251 (writes only)
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from analysis.contract.errors import UserError
from fixers import network
from orchestrator.subjects.own.references import told
from orchestrator.subjects.states import with_new_parameters

WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Classes of torch that wrap a module, and where it lies in them. By name: importing torch.compile's is slow."""
PYTHON_MODULE = "return the Python module that it was made of, or give it as ONNX"
DRAWN = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
"""Layers that give other values in training mode."""

Part = str | int
"""Where the logits are in what a model returns: a key or attribute, or a place in a tuple."""


class Logits(nn.Module):
    """A model that returns more than logits, in training mode or always, and of that the logits alone."""

    def __init__(self, model: nn.Module, part: Part) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, ...)."""
        logits: Tensor = _part_of(self.model(inputs), self.part)
        return logits


def bare(module: nn.Module) -> nn.Module:
    """A module without wrappers around it and around its parts, on the CPU."""
    while (inner := WRAPPERS.get(type(module).__name__)) and type(module).__module__.startswith("torch."):
        module = getattr(module, inner)
    for name, child in module.named_children():
        if (found := bare(child)) is not child:
            setattr(module, name, found)
    # What module.compile() leaves, which copies don't have.
    module._compiled_call_impl = None
    return module.cpu()


def with_lazy_parts_made(module: nn.Module, input_shape: tuple[int, ...] | None) -> nn.Module:
    """The module, run once on zeros where some of its weights wait for the shape of an input."""
    waiting = any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module.parameters())
    if waiting and input_shape is not None:
        with network.eval_mode(module), torch.no_grad():
            module(torch.zeros(2, *input_shape))
    return module


def with_plain_weights(module: nn.Module) -> nn.Module:
    """The module with the values of weights that are computed anew in each forward pass as weights of their own.

    Approaches change weights, torch copies them, Ray pickles them: none of it works with weight_norm, spectral_norm,
    pruning or another parametrisation.
    """
    for part in list(module.modules()):
        hooks = [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, network.COMPUTING)]
        if not hooks and not parametrize.is_parametrized(part):
            continue
        # In training mode spectral_norm would go on estimating while it is removed.
        with network.eval_mode(part):
            if parametrize.is_parametrized(part):
                for name in list(cast(nn.ModuleDict, part.parametrizations)):
                    parametrize.remove_parametrizations(part, name, leave_parametrized=True)
            for hook in hooks:
                if isinstance(hook, WeightNorm):
                    nn.utils.remove_weight_norm(part, hook.name)
                elif isinstance(hook, SpectralNorm):
                    nn.utils.remove_spectral_norm(part, hook.name)
                else:
                    prune.remove(part, hook._tensor_name)
        # What is left of them would look for the weights that are gone.
        part._load_state_dict_pre_hooks.clear()
    return module


def examined(model: nn.Module, input_shape: tuple[int, ...], name: str) -> Part | None:
    """Try once what torch, Ray and the approaches do with a model.

    Args:
        model: bare, with plain weights; left as it is.
        input_shape: of a sample.
        name: of the model, for sentences.

    Returns:
        Where the logits are in what it returns; None for one that returns nothing but them.

    Raises:
        UserError: one sentence on what can't be done with it.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise UserError(f"{name} returns a module of TorchScript, which can't be changed; {PYTHON_MODULE}.")
    if not any(True for _ in model.parameters()):
        raise UserError(f"{name} returns a module without weights, as quantised ones are; {PYTHON_MODULE}.")
    with told(f"{name} returns a module that can't be put into evaluation", PYTHON_MODULE):
        model.eval()
    with told(f"{name} returns a module that can't be copied", PYTHON_MODULE):
        twin = copy.deepcopy(model)
    with told(f"{name} returns a module that can't be sent to another process", PYTHON_MODULE):
        _pickled(with_new_parameters(twin, "meta"))
    example = torch.zeros(2, *input_shape)
    advice = "give the data that belong to it"
    if len(input_shape) == 3:
        advice += "; channels: 1 or 3 converts images, 0 says that arrays are none"
    with torch.random.fork_rng(devices=[]):
        with (
            told(f"{name} can't take inputs of shape {input_shape}", advice),
            torch.no_grad(),
        ):
            returned = model(example)
        part = _part_in_evaluation(returned, name)
        with told(f"{name} returns a module whose layers can't be watched", PYTHON_MODULE):
            leaves = [path for path, layer in twin.named_modules() if not any(True for _ in layer.children())]
            with torch.no_grad(), network.captured(twin, leaves):
                twin(example)
        logits = returned if part is None else _part_of(returned, part)
        with told(f"{name} returns a module that can't be trained", "approaches train it further"):
            twin.requires_grad_(True).train()
            _only_in_training(twin)
            in_training = twin(example)
            found = _part_in_training(in_training, logits, part, name)
            (in_training if found is None else _part_of(in_training, found)).sum().backward()
    if all(parameter.grad is None for parameter in twin.parameters()):
        raise UserError(f"{name} returns a module whose outputs have no gradient; let it compute them with autograd.")
    return found


def _only_in_training(model: nn.Module) -> None:
    """Leave what draws at random, and statistics of the batch, as they are in evaluation, to compare outputs."""
    for part in model.modules():
        if isinstance(part, DRAWN):
            part.eval()


def _part_in_evaluation(returned: Any, name: str) -> Part | None:
    if isinstance(returned, Tensor):
        return None
    if isinstance(_part_of(returned, "logits"), Tensor):
        return "logits"
    raise UserError(
        f"{name} returns {_kind(returned)} in place of logits; let it return them alone, or in a field 'logits'."
    )


def _part_in_training(returned: Any, logits: Tensor, part: Part | None, name: str) -> Part | None:
    """Where what it returns in evaluation is in training mode: by its name, else by its values."""
    if isinstance(returned, Tensor):
        return part
    places: list[Part] = ["logits"]
    if isinstance(returned, Mapping):
        places += [key for key in returned if isinstance(key, str)]
    elif isinstance(returned, (tuple, list)):
        places += range(len(returned))
    for place in places:
        values = _part_of(returned, place)
        fits = isinstance(values, Tensor) and values.shape == logits.shape
        if fits and (place == "logits" or torch.allclose(values, logits, rtol=1e-3, atol=1e-4)):
            return place
    raise UserError(
        f"{name} returns {_kind(returned)} in training mode, and nothing in it is what it returns in evaluation; let "
        "it return logits in both, or have them in a field 'logits'."
    )


def _part_of(returned: Any, part: Part) -> Any:
    """A part of what a model returns; of a tensor, or what stands for one while a model is traced, all of it."""
    if isinstance(returned, (Tensor, fx.Proxy)):
        return returned
    if isinstance(part, int):
        return returned[part]
    return returned.get(part) if isinstance(returned, Mapping) else getattr(returned, part, None)


def _kind(returned: Any) -> str:
    return f"an object of type {type(returned).__name__}"


def _pickled(module: nn.Module) -> None:
    try:
        pickle.dump(module, io.BytesIO(), protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):
        # What plain pickle can't, such as a lambda, Ray's may; importing it takes seconds.
        import ray.cloudpickle

        ray.cloudpickle.dumps(module, protocol=5)
