"""Trying many values for a few weights: what a model would put out with them, for a population at once.

The layers in front of the first patched one run once, and their outputs are kept where they fit. Behind it only the
change that the patched weights make is computed for each candidate: when all of them are in a last Linear layer that is
one matrix product for the whole population, otherwise the suffix runs under ``vmap`` with nothing stacked but the
changes.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.features.frozen_prefix import FrozenPrefix, example_values, prefix_batches, prefix_values
from fixers.network import convolutions
from fixers.network.layers import weight_layer
from fixers.network.places import Places
from fixers.problem import RepairProblem
from fixers.selection import Choice

PerSample = Callable[[Tensor, Tensor], Tensor]
"""(outputs (p, n, K), positions (n,) in the split, int64 on the CPU) -> a tensor (p, n, ...) of what is wanted."""

# Without a budget given, memory falls with the micro-batch, as everywhere: 256 MiB at its default of 512.
_BYTES_PER_SAMPLE = 2**19
# Changes of so few weights are applied one by one; of more, as a matrix.
_FEW = 64
_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}


class PatchEvaluator:
    """Outputs of a model on a split for whole populations of values at some places.

    Args:
        problem: device, micro-batch, deadline. Its micro-batch also bounds the memory unless ``memory`` is given.
        model: the model whose weights are tried, in eval mode. It isn't copied, and mustn't change while this is used.
        places: which weights vary, at least one.
        split: samples. What enters the first patched layer is kept for all of them, on the problem's device, where it
            takes at most 2 MiB times the micro-batch (of a last Linear layer the inputs of patched weights and the
            outputs, whatever they take); else it is computed again for every population.
        memory: bytes that candidates under evaluation may take beside the kept features.

    Raises:
        ValueError: no places, or one in a layer that isn't a Linear or Conv2d or is never called.
    """

    def __init__(
        self, problem: RepairProblem, model: nn.Module, places: Places, split: Split, *, memory: int | None = None
    ) -> None:
        if len(places) == 0:
            raise ValueError("There must be at least one weight to patch.")
        self._problem = problem
        self._places = places
        self._count = len(split)
        self._memory = _BYTES_PER_SAMPLE * problem.micro_batch if memory is None else memory
        self._original = places.read(model)
        cut = network.cut(model, places.layers[0])
        first = weight_layer(cut.suffix, cut.layer)
        self._is_last = False
        if isinstance(first, nn.Linear) and _is_only_call(cut.suffix):
            self._is_last = True
            self._prepare_last(first, cut, split)
        else:
            self._features = FrozenPrefix(problem, cut, split)
            self._suffix = _without_in_place(cut.suffix)
            self._prepare_suffix(cut, split)

    def map(self, values: Tensor, function: PerSample) -> Tensor:
        """Apply a function to the outputs under every candidate, a chunk of candidates and samples at a time.

        Args:
            values: candidates (P, D), in the order of the places.
            function: what is wanted of the outputs, sample by sample.

        Returns:
            Its results for all candidates and samples (P, N, ...), on the problem's device.
        """
        changes = (values - self._original.to(values)).to(self._problem.device, torch.float32)
        samples = max(1, min(self._count, self._memory // self._bytes_per_output))
        candidates = max(1, min(len(values), self._memory // (self._bytes_per_output * samples)))
        results = []
        for start in range(0, max(self._count, 1), samples):
            rows = torch.arange(start, min(start + samples, self._count))
            parts = []
            with torch.no_grad():
                # Samples outside, so that what enters the patched layer is computed once where it isn't kept.
                outputs_of = self._outputs_on(rows)
                for some in changes.split(candidates):
                    self._problem.check_deadline()
                    parts.append(function(outputs_of(some), rows))
            results.append(torch.cat(parts))
        return torch.cat(results, dim=1)

    def outputs(self, values: Tensor) -> Tensor:
        """Outputs (P, N, K) of the model on the split for candidates (P, D)."""
        return self.map(values, lambda outputs, _: outputs)

    def _outputs_on(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """Changes (p, D) -> outputs (p, n, K) on the samples at ``rows`` (n,), which are consecutive."""
        if self._is_last:
            return self._last_outputs_on(slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0))
        entering = self._features(rows)

        def run(change: tuple[Tensor, ...]) -> Tensor:
            # A suffix that works in place must not find its own traces in the next chunk.
            features = tuple(feature.clone() for feature in entering)
            buffers = {f"{name}.change": part for name, part in zip(self._places.layers, change, strict=True)}
            outputs: Tensor = torch.func.functional_call(self._suffix, buffers, features)
            return outputs

        def outputs(changes: Tensor) -> Tensor:
            result: Tensor = torch.func.vmap(run)(self._places.split(changes))
            return result

        return outputs

    def _prepare_last(self, layer: nn.Linear, cut: network.Cut, split: Split) -> None:
        """Split the last layer's work: its outputs as they are, and the features that meet a patched weight."""
        index = self._places.indices[0].to(self._problem.device)
        self._row, column = _rows_and_columns(layer, index)
        columns, self._slot = column.unique(return_inverse=True)
        problem, met, base = self._problem, [], []
        with torch.no_grad():
            batches = prefix_batches(problem, cut, split) if len(split) else [prefix_values(problem, cut, split)]
            for inputs, *_ in batches:
                bias_input = inputs.new_ones(*inputs.shape[:-1], 1)
                met.append(torch.cat([inputs, bias_input], dim=-1)[..., columns])
                base.append(layer(inputs))
        self._met, self._base = torch.cat(met), torch.cat(base)
        # The outputs of a candidate and what a loss makes of them: about four tensors of their size.
        self._bytes_per_output = 16 * layer.out_features

    def _last_outputs_on(self, rows: slice) -> Callable[[Tensor], Tensor]:
        met, base = self._met[rows], self._base[rows]

        def outputs(changes: Tensor) -> Tensor:
            matrix = changes.new_zeros(len(changes), met.shape[-1], base.shape[-1])
            matrix[:, self._slot, self._row] = changes
            return torch.baddbmm(base.expand(len(changes), *base.shape), met.expand(len(changes), *met.shape), matrix)

        return outputs

    def _prepare_suffix(self, cut: network.Cut, split: Split) -> None:
        """Put the patched layers into the suffix and see how much memory a sample takes in it."""
        for name, index in zip(self._places.layers, self._places.indices, strict=True):
            layer = weight_layer(self._suffix, name)
            self._suffix.set_submodule(name, _Patched(layer, index.to(self._problem.device)))
        sizes = _LargestValue(self._suffix)
        with torch.no_grad():
            sizes.run(*(value.clone() for value in example_values(self._problem, cut, split)))
        patched = [module for module in self._suffix.modules() if isinstance(module, _Patched)]
        stacked = sum(module.stacked_bytes for module in patched)
        # Input, output and a temporary of the widest layer, what a loss makes of it, and each candidate's own matrices
        # spread over the samples.
        self._bytes_per_output = 16 * sizes.largest + 3 * stacked // max(self._count, 1)


def pair_up(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (p, n, K) and targets (n,) as a task judges them: (p * n, K) and (p * n,), candidate by candidate."""
    return outputs.flatten(0, 1), targets.repeat(len(outputs))


def most_accurate(problem: RepairProblem, places: Places, candidates: Sequence[Tensor], *, original: bool) -> Tensor:
    """The candidate (D,) with the most samples of valid right, the last one in a tie; see :class:`Choice`.

    Args:
        problem: its original model is patched; the note ``original_kept`` says whether no candidate was taken.
        places: where.
        candidates: at least one, (D,) each, the preferred one last.
        original: whether the original is a candidate beside them.
    """
    before = places.read(problem.original)
    values = torch.stack([before, *(candidate.to(before) for candidate in candidates)])
    accuracy, *accuracies = _right(problem, places, values, problem.valid)
    _, *fixed = _right(problem, places, values, problem.failures)
    choice, chosen = Choice(accuracy, original=original), before
    for number, candidate in enumerate(candidates):
        if choice.offer(accuracies[number], fixed=fixed[number], tie=number):
            chosen = candidate
    problem.note(original_kept=choice.original_kept)
    return chosen


def _right(problem: RepairProblem, places: Places, values: Tensor, split: Split) -> list[int]:
    """How many samples each candidate (P, D) gets right."""
    targets = split.labels.to(problem.device)

    def right(outputs: Tensor, positions: Tensor) -> Tensor:
        return ~problem.task.is_wrong(*pair_up(outputs, targets[positions])).reshape(len(outputs), -1)

    counts: list[int] = PatchEvaluator(problem, problem.original, places, split).map(values, right).sum(1).tolist()
    return counts


class _Patched(nn.Module):
    """A Linear or Conv2d layer plus the effect of ``change`` (D,), a buffer, on the weights at ``index``."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, index: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.index: Tensor
        self.change: Tensor
        weights = layer.weight.numel()
        self.register_buffer("index", index)
        self.register_buffer("change", torch.zeros(len(index), device=index.device))
        self._few = len(index) <= max(_FEW, weights // 32)
        if isinstance(layer, nn.Linear):
            self._row, self._column = _rows_and_columns(layer, index)
        else:
            self._taps = _taps(layer, index)
            self._bias = (index >= weights).nonzero().squeeze(1)

    @property
    def stacked_bytes(self) -> int:
        """Bytes of a candidate's own weights."""
        return 0 if self._few else 4 * self.layer.weight.numel()

    def forward(self, inputs: Tensor) -> Tensor:
        if not self._few:
            return self._with_matrix(inputs)
        outputs: Tensor = self.layer(inputs)
        if isinstance(self.layer, nn.Linear):
            seen = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)[..., self._column]
            return outputs.index_add(-1, self._row, seen * self.change)
        padded = convolutions.pad(self.layer, inputs)
        size = (outputs.shape[-2], outputs.shape[-1])
        for tap in self._taps:
            seen = convolutions.seen_by_tap(self.layer, padded, tap.row, tap.column, size)[:, tap.source]
            outputs = outputs.index_add(1, tap.target, seen * self.change[tap.which][:, None, None])
        if len(self._bias):
            target = self.index[self._bias] - self.layer.weight.numel()
            shift = torch.zeros_like(outputs[0, :, 0, 0]).index_add(0, target, self.change[self._bias])
            outputs = outputs + shift[:, None, None]
        return outputs

    def _with_matrix(self, inputs: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        flat = weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])
        flat = flat.index_add(0, self.index, self.change)
        weight, bias = flat[: weight.numel()].reshape(weight.shape), None if bias is None else flat[weight.numel() :]
        if isinstance(self.layer, nn.Linear):
            return functional.linear(inputs, weight, bias)
        return convolutions.convolve(self.layer, convolutions.pad(self.layer, inputs), weight, bias)


@dataclass(frozen=True)
class _Tap:
    """All patched weights at one position of the kernel."""

    row: int
    column: int
    which: Tensor
    """Their positions among the layer's patched weights."""
    source: Tensor
    """Input channel of each."""
    target: Tensor
    """Output channel of each."""


def _taps(conv: nn.Conv2d, index: Tensor) -> list[_Tap]:
    outputs, inputs, height, width = conv.weight.shape
    which = (index < conv.weight.numel()).nonzero().squeeze(1)
    weight = index[which]
    column, row = weight % width, weight // width % height
    target = weight // (width * height * inputs)
    group = target // (outputs // conv.groups)
    source = weight // (width * height) % inputs + group * inputs
    position = row * width + column
    return [
        _Tap(at // width, at % width, which[position == at], source[position == at], target[position == at])
        for at in position.unique().tolist()
    ]


def _rows_and_columns(layer: nn.Linear, index: Tensor) -> tuple[Tensor, Tensor]:
    """Output unit and input of each place; the bias counts as one more input."""
    weights, width = layer.weight.numel(), layer.in_features
    is_bias = index >= weights
    return torch.where(is_bias, index - weights, index // width), torch.where(is_bias, width, index % width)


class _LargestValue(fx.Interpreter):
    """Runs a graph and remembers the size of the largest value in it."""

    largest = 1

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.largest = max(self.largest, value.numel())
        return value


def _is_only_call(graph_module: fx.GraphModule) -> bool:
    return len([node for node in graph_module.graph.nodes if node.op.startswith("call")]) == 1


def _without_in_place(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same computation without operations that write to their input: ``vmap`` can't write to a shared value."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.target = _IN_PLACE.get(node.target, node.target)
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            if any(getattr(part, "inplace", False) for part in module.modules()):
                # The model's own stays as it is.
                module = copy.deepcopy(module)
                for part in module.modules():
                    if getattr(part, "inplace", False):
                        vars(part)["inplace"] = False
                graph_module.set_submodule(node.target, module)
    graph_module.recompile()
    return graph_module
