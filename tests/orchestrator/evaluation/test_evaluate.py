import numpy as np
import pytest
import torch
from torch import nn

from fixers.data import TensorSplit
from fixers.task import Classification
from orchestrator.evaluation import metrics
from orchestrator.evaluation.evaluate import NO_CLASS, Original, evaluate, has_nonfinite, predictions
from orchestrator.evaluation.robustness import AttackSettings, OriginalAttack

TASK = Classification(3)


def make_model(seed):
    """Models that often agree, and use all classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)
        ).eval()
        model[1].running_mean.fill_(0.5)
        model[1].running_var.fill_(1 / 12)
        torch.manual_seed(seed)
        with torch.no_grad():
            model[4].weight.add_(0.3 * torch.randn(3, 8))
    return model


@pytest.fixture
def held_out():
    """The model of seed 0 is mostly right, and that of seed 1 is on some of the others."""
    inputs = torch.rand(90, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels, others = (make_model(seed)(inputs).argmax(1) for seed in (0, 1))
    labels[::3] = others[::3]
    labels[::9] = (labels[::9] + 1) % 3
    return TensorSplit(inputs, labels)


def test_all_figures_come_from_the_same_predictions(held_out):
    original, fixed = make_model(0), make_model(1)
    before = predictions(original, held_out, task=TASK)
    groups = np.arange(90) % 2
    attack = OriginalAttack(original, held_out, before, AttackSettings(0.05, steps=3, samples=5), task=TASK)
    result = evaluate(fixed, held_out, Original(before, attack), task=TASK, groups=groups, micro_batch=7)
    labels = held_out.labels.numpy()
    with torch.no_grad():
        expected = fixed(held_out.batch().inputs).argmax(1).numpy()
    assert result.predictions.dtype == np.int64
    assert np.array_equal(result.predictions, expected)
    row = result.row()
    assert row["accuracy_original"] == np.mean(before == labels)
    assert row["accuracy_fixed"] == np.mean(expected == labels)
    assert row["n_repaired"] == np.sum((before != labels) & (expected == labels)) > 0
    assert row["n_broken"] == np.sum((before == labels) & (expected != labels)) > 0
    assert (row["aaod_original"], row["aaod_undefined_classes"]) == metrics.aaod(labels, before, groups, 3)
    assert row["aaod_fixed"] == metrics.aaod(labels, expected, groups, 3).value
    assert row["n_attacked"] == 5
    assert 0 <= row["asr_fixed"] <= 1


def test_what_was_not_measured_is_null(held_out):
    model = make_model(0)
    row = evaluate(model, held_out, Original(predictions(model, held_out, task=TASK)), task=TASK).row()
    missing = {name for name, value in row.items() if value is None}
    assert missing == {name for name in row if name.startswith(("asr", "masked", "aaod", "n_attacked"))}
    assert row["n_repaired"] == row["n_broken"] == 0


def test_rows_have_the_names_of_the_trials_table(held_out):
    schema = pytest.importorskip("analysis.contract.schema")
    model = make_model(0)
    row = evaluate(model, held_out, Original(predictions(model, held_out, task=TASK)), task=TASK).row()
    assert set(row) <= {column.name for column in schema.COLUMNS["trials"]}


def test_nan_outputs_decide_nothing(held_out):
    model = make_model(0)
    clean = predictions(model, held_out, task=TASK)

    class SometimesNan(nn.Module):
        def forward(self, inputs):
            outputs = model(inputs)
            outputs[inputs[:, 0, 0, 0] > 0.5, 2] = torch.nan
            return outputs

    decided = predictions(SometimesNan(), held_out, task=TASK)
    lost = held_out.batch().inputs[:, 0, 0, 0].numpy() > 0.5
    assert (decided[lost] == NO_CLASS).all()
    assert np.array_equal(decided[~lost], clean[~lost])
    outputs = SometimesNan()(held_out.batch().inputs)
    assert metrics.accuracy(held_out.labels, decided) == pytest.approx(TASK.score(outputs, held_out.labels))


def test_predicting_is_in_eval_mode_and_leaves_the_modes(held_out):
    model = make_model(0)
    expected = predictions(model, held_out, task=TASK)
    model.train()
    model[3].eval()
    running = model[1].running_mean.clone()
    assert np.array_equal(predictions(model, held_out, task=TASK, micro_batch=4), expected)
    assert [module.training for module in model] == [True, True, True, False, True]
    assert torch.equal(running, model[1].running_mean)


def test_the_first_nonfinite_weight_is_named():
    model = make_model(0)
    assert has_nonfinite(model) is None
    model[1].running_var[1] = torch.inf
    assert has_nonfinite(model) == "1.running_var"
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    assert has_nonfinite(model) == "1.bias"
