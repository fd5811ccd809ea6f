import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fixers.cache import DirectoryCache
from fixers.data import TensorSplit
from fixers.task import Classification
from orchestrator.evaluation.evaluate import predictions
from orchestrator.evaluation.robustness import (
    AttackError,
    AttackSettings,
    OriginalAttack,
    RobustnessResult,
    attack,
    attack_success,
)

CLASSES = 3
TASK = Classification(CLASSES)
EPSILON = 0.1
SMALL = AttackSettings(EPSILON, steps=5, samples=40)


def make_model(seed=0, **layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, CLASSES)
        ).eval()


def make_split(model, n=200, seed=0, wrong=0.2):
    """Random pixels with labels that the model mostly agrees with."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, 1, 6, 6, generator=generator)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    flipped = torch.rand(n, generator=generator) < wrong
    return TensorSplit(inputs, torch.where(flipped, (labels + 1) % CLASSES, labels))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def split(model):
    return make_split(model)


def right_ones(model, split):
    return split.select(torch.from_numpy(predictions(model, split, task=TASK)) == split.labels)


class Recorder(nn.Module):
    """Keeps what goes through the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.modes = model, [], []

    def forward(self, inputs):
        self.seen.append(inputs.detach().clone())
        self.modes.append([module.training for module in self.modules()])
        return self.model(inputs)


def test_the_attack_is_the_published_one(model, split):
    """A transcription of Madry's PGD with foolbox's defaults sees the same inputs at every step."""
    samples = right_ones(model, split).batch()
    recorder = Recorder(model)
    settings = AttackSettings(EPSILON, steps=4, random_start=False)
    attack(recorder, right_ones(model, split), settings, task=TASK)
    x = samples.inputs
    expected = [x]
    for _ in range(4):
        at = expected[-1].clone().requires_grad_(True)
        gradient = torch.autograd.grad(TASK.loss(model(at), samples.targets), at)[0]
        moved = torch.min(torch.max(at.detach() + EPSILON / 30 * gradient.sign(), x - EPSILON), x + EPSILON)
        expected.append(moved.clamp(0, 1))
    for step, seen in enumerate(recorder.seen):
        torch.testing.assert_close(seen, expected[step], msg=f"step {step}")
    assert len(recorder.seen) == 5


def test_every_start_and_step_stays_in_the_ball_and_the_pixels(model, split):
    samples = right_ones(model, split)
    recorder = Recorder(model)
    attack(recorder, samples, AttackSettings(EPSILON, steps=40), task=TASK)
    assert len(recorder.seen) == 41
    for seen in recorder.seen:
        assert (seen - samples.batch().inputs).abs().max() <= EPSILON + 1e-6
        assert seen.min() >= 0
        assert seen.max() <= 1
    assert (recorder.seen[0] - samples.batch().inputs).abs().max() > 0.9 * EPSILON  # a random start


def test_no_epsilon_no_flip(model, split):
    assert not attack(model, right_ones(model, split), AttackSettings(0.0), task=TASK).succeeded.any()


def test_some_samples_fall_and_more_with_a_larger_epsilon(model, split):
    rates = [
        attack(model, right_ones(model, split), AttackSettings(epsilon), task=TASK).rates[0]
        for epsilon in (0.003, 0.03, 0.3)
    ]
    assert 0 < rates[0] < rates[1] < rates[2] == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.floats(0, 0.5))
def test_success_is_monotone_in_epsilon_on_two_linear_classes(seed, one, other):
    # Same seed, same direction of the random start: the perturbation grows with epsilon, sample by sample.
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = torch.rand(20, 1, 3, 3, generator=generator)
    with torch.no_grad():
        samples = TensorSplit(inputs, linear(inputs).argmax(1))
    weaker, stronger = (
        attack(linear, samples, AttackSettings(epsilon), task=Classification(2)).succeeded
        for epsilon in sorted((one, other))
    )
    assert not (weaker & ~stronger).any()


def test_micro_batches_dont_change_the_result_on_cpu(model, split):
    samples = right_ones(model, split)
    results = [attack(model, samples, AttackSettings(0.02), task=TASK, micro_batch=size).succeeded for size in (512, 9)]
    assert torch.equal(results[0], results[1])
    assert results[0].any() and not results[0].all()


def test_the_seed_determines_the_starts_and_the_global_generator_is_left_alone(model, split):
    samples = right_ones(model, split)
    first = []
    for seed in (1, 1, 2):
        recorder = Recorder(model)
        before = torch.get_rng_state()
        attack(recorder, samples, AttackSettings(EPSILON, seed=seed), task=TASK)
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(3)  # what happened to the global generator before doesn't matter
        first.append(recorder.seen[0])
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_the_model_is_left_as_it_was(model, split):
    samples = right_ones(model, split)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    recorder = Recorder(model)
    with torch.no_grad():
        attack(recorder, samples, SMALL, task=TASK)
    assert not any(any(modes) for modes in recorder.modes)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_model_is_put_back_after_an_error(model):
    model.train()
    with pytest.raises(AttackError):
        attack(model, TensorSplit(torch.full((3, 1, 6, 6), 2.0), torch.zeros(3)), SMALL, task=TASK)
    assert model.training and model[0].training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("values", [(-2.1, 2.6), (0.0, 1.1), (-0.01, 1.0), (0.0, float("nan"))])
def test_inputs_that_are_no_pixels_are_refused(model, values):
    inputs = torch.zeros(4, 1, 6, 6)
    inputs[0, 0, 0, 0], inputs[1, 0, 2, 3] = values
    with pytest.raises(AttackError, match=r"\[0, 1\].*normalisation inside the model"):
        attack(model, TensorSplit(inputs, torch.zeros(4)), SMALL, task=TASK)


def test_a_model_without_parameters_can_be_attacked(capsys):
    class Means(nn.Module):
        def forward(self, inputs):
            left, right = inputs[..., :3].mean((1, 2, 3)), inputs[..., 3:].mean((1, 2, 3))
            return torch.stack([left, right], 1)

    samples = make_split(Means(), wrong=0)
    assert attack(Means(), samples, AttackSettings(0.2), task=Classification(2)).succeeded.any()
    assert capsys.readouterr().out == ""


def test_a_model_that_gives_nan_nearby_doesnt_withstand(model, split):
    class Brittle(nn.Module):
        """NaN as soon as an input isn't exactly a sample."""

        def __init__(self, samples):
            super().__init__()
            self.model, self.known = model, samples.batch().inputs.flatten(1)

        def forward(self, inputs):
            off = torch.cdist(inputs.flatten(1), self.known).amin(1, keepdim=True) > 1e-3
            return self.model(inputs).masked_fill(off, torch.nan) + 0 * torch.where(off, torch.nan, 1.0)

    samples = right_ones(model, split)
    assert attack(Brittle(samples), samples, SMALL, task=TASK).succeeded.all()


def test_the_attacked_samples_are_the_first_that_both_get_right(model, split):
    fixed = make_model(seed=1)
    original, changed = (predictions(m, split, task=TASK) for m in (model, fixed))
    recorder = Recorder(fixed)
    shared = OriginalAttack(model, split, original, SMALL, task=TASK)
    result = attack_success(shared, recorder, changed)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SMALL.seed)).tolist()
    labels = split.labels.numpy()
    chosen = [i for i in order if original[i] == labels[i] == changed[i]][: SMALL.samples]
    assert result.n_attacked == len(chosen) > 5
    start = recorder.seen[0] - split.inputs(torch.tensor(chosen), torch.device("cpu"))
    assert start.abs().max() <= EPSILON + 1e-6
    first = shared.candidates[: 40 + 40 // 4]
    alone = attack(model, split.select(first), SMALL, task=TASK, stream="original/0").succeeded
    positions = [first.tolist().index(i) for i in chosen if i in first.tolist()]
    if len(positions) == len(chosen):
        assert result.asr_original == pytest.approx(alone[positions].float().mean().item())


def test_the_original_is_attacked_once_for_all_trials(model, split, tmp_path):
    original = predictions(model, split, task=TASK)
    recorder = Recorder(model)
    make = lambda m: OriginalAttack(  # noqa: E731
        m, split, original, SMALL, task=TASK, fingerprint="s", cache=DirectoryCache(tmp_path)
    )
    shared = make(recorder)
    assert recorder.seen == []
    same = attack_success(shared, model, original)
    calls = len(recorder.seen)
    assert calls == SMALL.steps + 1
    assert attack_success(shared, model, original) == same
    assert attack_success(make(recorder), model, original) == same
    assert len(recorder.seen) == calls
    other = dataclasses.replace(SMALL, epsilon=0.2)
    attack_success(
        OriginalAttack(recorder, split, original, other, task=TASK, cache=DirectoryCache(tmp_path), fingerprint="s"),
        model,
        original,
    )
    assert len(recorder.seen) == 2 * calls


def test_the_attack_on_the_original_is_extended_when_a_fix_breaks_much(model, split):
    """Blocks are independent: what was attacked first doesn't change."""
    original = predictions(model, split, task=TASK)
    settings = AttackSettings(0.02, samples=16)
    at_once, in_parts = (OriginalAttack(model, split, original, settings, task=TASK) for _ in range(2))
    long = at_once.outcome(torch.arange(60)).succeeded
    parts = [in_parts.outcome(torch.arange(count)).succeeded for count in (5, 20, 21, 60)]
    assert all(torch.equal(long[: len(part)], part) for part in parts)
    assert len(long) == 60 and long.any() and not long.all()
    broken = original.copy()
    broken[at_once.candidates[:40].numpy()] = -1
    result = attack_success(at_once, model, broken)
    assert result.n_attacked == 16
    assert result.asr_original == long[40:56].double().mean().item()


def test_a_saturated_model_looks_robust_and_is_told_apart(model, split):
    """Logits times a large number: the same decisions everywhere, but no gradient is left in float32."""

    class Scaled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return 1e4 * self.model(inputs)

    samples = right_ones(model, split)
    settings, rescaled = AttackSettings(EPSILON), AttackSettings(EPSILON, gradient="rescaled")
    fell, masked = attack(model, samples, settings, task=TASK).rates
    assert (fell > 0.9, masked) == (True, 0.0)
    fell, masked = attack(Scaled(model), samples, settings, task=TASK).rates
    assert fell < 0.3 and masked > 0.6
    assert fell + masked <= 1
    # Without the rounding, a moderately confident model falls like the model it is.
    assert attack(model, samples, rescaled, task=TASK).rates[0] > 0.9


def test_the_gradient_doesnt_depend_on_the_batch_even_where_it_nearly_underflows(model, split):
    class Confident(nn.Module):
        def forward(self, inputs):
            outputs = model(inputs)
            spread = (outputs - outputs.mean(1, keepdim=True)).norm(dim=1, keepdim=True).detach()
            return 130 * outputs / spread

    samples = right_ones(Confident(), split).select(torch.arange(50))
    one, other = (attack(Confident(), samples, AttackSettings(EPSILON), task=TASK, micro_batch=n) for n in (1, 512))
    assert torch.equal(one.succeeded, other.succeeded)
    assert torch.equal(one.masked, other.masked)
    assert 0.05 < one.rates[1] < 0.95
    rescaled = attack(Confident(), samples, AttackSettings(EPSILON, gradient="rescaled"), task=TASK)
    assert rescaled.rates == (pytest.approx(0.9, abs=0.1), 0.0)


def test_nothing_that_both_get_right_is_no_rate(model, split):
    original = predictions(model, split, task=TASK)
    shared = OriginalAttack(model, split, original, SMALL, task=TASK)
    assert attack_success(shared, model, np.full(len(split), -1)) == RobustnessResult(None, None, None, None, 0)


@pytest.mark.parametrize(
    "changes", [{"epsilon": -0.1}, {"epsilon": float("nan")}, {"steps": 0}, {"samples": 0}, {"gradient": "?"}]
)
def test_senseless_settings_are_refused(changes):
    with pytest.raises(AttackError):
        AttackSettings(**{"epsilon": 0.1, **changes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_result_is_repeatable_and_close(model, split):
    samples = right_ones(model, split)
    on_cpu = attack(model, samples, AttackSettings(0.02), task=TASK)
    on_gpu = model.to("cuda")
    state = torch.cuda.get_rng_state()
    one, same = (attack(on_gpu, samples, AttackSettings(0.02), task=TASK, device="cuda") for _ in range(2))
    assert torch.equal(one.succeeded, same.succeeded)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert one.rates[0] == pytest.approx(on_cpu.rates[0], abs=0.1)
