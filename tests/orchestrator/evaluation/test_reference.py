"""The study's released models, on MNIST: our figures against those of an independent program."""

import gzip

import numpy as np
import pytest
import torch

from fixers.data import TensorSplit
from fixers.task import Classification
from orchestrator.evaluation import metrics
from orchestrator.evaluation.evaluate import predictions
from orchestrator.evaluation.robustness import AttackSettings, OriginalAttack, attack, attack_success

TASK = Classification(10)
NAMES = ("original", "apricot_1", "apricot_2", "apricot_3")
REPAIRED = {"apricot_1": (179, 42), "apricot_2": (176, 40), "apricot_3": (175, 39)}
# Of the same attack in float64, by a transcription of foolbox's loop.
ASR_FLOAT64 = {"original": 0.820, "apricot_1": 0.770, "apricot_2": 0.774, "apricot_3": 0.724}
ASR = {"original": 0.810, "apricot_1": 0.246, "apricot_2": 0.296, "apricot_3": 0.218}


@pytest.fixture(scope="module")
def mnist(data_root):
    def read(name, header):
        with gzip.open(data_root / "mnist" / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    return TensorSplit(images.copy(), read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64))


@pytest.fixture(scope="module")
def models(reference_root):
    onnx_import = pytest.importorskip("orchestrator.subjects.onnx.importing")
    return {name: onnx_import.load_onnx(reference_root / "lenet5_mnist" / f"{name}.onnx").model for name in NAMES}


@pytest.fixture(scope="module")
def decided(models, mnist):
    return {name: predictions(model, mnist, task=TASK) for name, model in models.items()}


def test_the_original_has_240_failures(mnist, decided):
    assert np.sum(decided["original"] != mnist.labels.numpy()) == 240


@pytest.mark.parametrize("name", NAMES[1:])
def test_counts_are_those_of_the_independent_program(name, mnist, decided):
    n_repaired, n_broken = REPAIRED[name]
    effect = metrics.Effect.of(mnist.labels, decided["original"], decided[name])
    assert effect == metrics.Effect(n_test=10_000, n_wrong=240, n_repaired=n_repaired, n_broken=n_broken)


@pytest.fixture(scope="module")
def reference_samples(mnist, decided):
    right = np.all([decided[name] == mnist.labels.numpy() for name in NAMES], axis=0).nonzero()[0]
    chosen = np.sort(np.random.default_rng(0).choice(right, 500, replace=False))
    return mnist.select(torch.from_numpy(chosen))


@pytest.mark.parametrize(
    "name", ["original", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:3]), NAMES[3]]
)
def test_attack_success_is_that_of_foolbox(name, models, reference_samples):
    """On the very images of the reference; what differs is the random starts and the program."""
    rate, _ = attack(models[name], reference_samples, AttackSettings(0.15), task=TASK).rates
    assert rate == pytest.approx(ASR[name], abs=0.035)


@pytest.mark.parametrize("name", NAMES[1:2])
def test_without_rounding_most_of_the_robustness_is_gone(name, models, reference_samples):
    settings = AttackSettings(0.15, gradient="rescaled")
    rate, masked = attack(models[name], reference_samples, settings, task=TASK).rates
    assert rate == pytest.approx(ASR_FLOAT64[name], abs=0.035)
    assert masked == 0


def test_our_own_sampling_agrees_too(models, mnist, decided):
    """Two samples of 500 and 200 images differ by sampling error: three standard errors are 0.1."""
    settings = AttackSettings(0.15, samples=200)
    shared = OriginalAttack(models["original"], mnist, decided["original"], settings, task=TASK)
    result = attack_success(shared, models["apricot_1"], decided["apricot_1"])
    assert result.n_attacked == 200
    assert result.asr_original == pytest.approx(ASR["original"], abs=0.1)
    assert result.asr_fixed == pytest.approx(ASR["apricot_1"], abs=0.1)
    assert result.masked_original == 0
    assert result.masked_fixed > 0.6
