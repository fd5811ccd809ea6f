"""Whether a model has one answer to an input, and whether its answers are probabilities."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_subjects import HERE, spec, write_folder
from rich.console import Console
from torch import nn

from analysis.contract.errors import UserError
from orchestrator.cli.options import Approach, Samples, Source
from orchestrator.cli.single_model import fix_command
from orchestrator.storage.store import Store
from orchestrator.subjects import answers, weights
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.doctor import examine
from orchestrator.subjects.originals import prepare
from orchestrator.trial.loading import load_subject


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


SENTENCES = {
    "dropout": "gives other outputs when it is asked again",
    "noise": "gives other outputs when it is asked again",
    "batch_norm_1d": "can't be asked about single samples",
    "batch_norm_2d": "answers by what else is in the batch",
    "squeeze": "returns another shape for a single sample",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_a_model_without_one_answer_is_refused_wherever_it_is_loaded(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    given = spec("d", model="factories:unsettled", arguments={"kind": kind}, recipe={"epochs": 1})
    torch.manual_seed(0)
    weights.write_state(tmp_path / "w.safetensors", resolve(given, base_dir=tmp_path).build_model().state_dict())
    for described in (given, given | {"weights": "w.safetensors"}):
        definition = resolve(described, base_dir=tmp_path)
        with pytest.raises(UserError, match=f"^The model of mine {SENTENCES[kind]}") as raised:
            prepare(definition, data_root=None, cache_dir=tmp_path / "cache")
        assert "\n" not in str(raised.value)
        (finding,) = [found for found in examine(definition, cache_dir=tmp_path) if found.severity == "error"]
        assert finding.message == str(raised.value) and finding.code == "answers"
    assert not list((tmp_path / "cache").glob("*.safetensors"))  # nothing was trained before


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 3)),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(800, 3)),
    lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (36, 12)), nn.TransformerEncoderLayer(12, 2, batch_first=True),
                          nn.Flatten(), nn.Linear(432, 3)),
])  # fmt: skip
def test_rounding_of_batched_kernels_is_no_other_answer(build: Callable[[], nn.Module]) -> None:
    before = torch.get_rng_state()
    inputs = torch.rand(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = build().train()
    state = torch.get_rng_state()
    assert answers.why_not_one_answer(model, inputs) is None
    assert model.training and torch.equal(torch.get_rng_state(), state) and not torch.equal(state, before)


def test_small_noise_is_found_and_outputs_that_are_not_finite_may_stay() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :3] + 1e-3 * torch.randn(len(x), 3)

    inputs = torch.rand(16, 3, 4, 4)
    assert "asked again" in str(answers.why_not_one_answer(Noisy(), inputs))
    inputs[3] = torch.nan
    assert answers.why_not_one_answer(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), inputs) is None


@pytest.mark.parametrize(("factory", "told"), [("probabilities", True), ("log_probabilities", False)])
def test_probabilities_are_told_by_the_doctor_by_a_study_and_by_fix(factory: str, told: bool, tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    given = spec("d", model=f"factories:{factory}", weights="w.safetensors")
    state = resolve(spec("d", model=f"factories:{factory}"), base_dir=tmp_path).build_model().state_dict()
    weights.write_state(tmp_path / "w.safetensors", state)
    definition = resolve(given, base_dir=tmp_path)
    found = [finding for finding in examine(definition, cache_dir=tmp_path) if finding.code == "probabilities"]
    assert [finding.severity for finding in found] == ["warning"] * told
    _, summary = load_subject(
        definition, store=Store(tmp_path / "r"), data_root=None, cache_dir=tmp_path, keep_history=False
    )
    assert summary.cautions == tuple(finding.message for finding in found)
    console = Console(record=True, width=400)
    source = Source(f"factories:{factory}", str(tmp_path / "d"), None, str(tmp_path / "w.safetensors"))
    approach = Approach("finetune", (), None, ("epochs=1",), 0, "60s")
    fix_command(source=source, approach=approach, samples=Samples(None, None), out=None, console=console)
    assert ("returns probabilities" in console.export_text()) is told


def test_a_model_with_more_outputs_than_labels_is_warned_of(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    definition = resolve(spec("d", arguments={"n_classes": 21_125}, recipe={"epochs": 1}), base_dir=tmp_path)
    messages = [found.message for found in examine(definition) if found.severity == "warning"]
    assert any("has 21,125 outputs, but labels go up to 2" in message for message in messages)
