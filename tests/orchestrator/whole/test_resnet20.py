"""A new user's first hour: the released CIFAR ResNet-20 on images it was not made for, by the command line alone."""

import json
import sys
from pathlib import Path

import onnx
import pytest

from orchestrator.cli import main
from orchestrator.subjects.onnx.importing import load_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FACTORIES = Path(__file__).parents[1] / "subjects"


@pytest.mark.parametrize("limit", [500, None])
def test_split_doctor_fix_export(limit, data_root, tmp_path, monkeypatch, capsys):
    def fixstudy(*arguments):
        monkeypatch.setattr(sys, "argv", ["fixstudy", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        done = capsys.readouterr()
        assert code == 0, done.err or done.out
        return " ".join(done.out.split())

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FACTORIES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    Path("subject.yaml").write_text(
        f"""
subject:
  name: resnet20-jpeg
  model: factories:resnet20
  weights: {data_root / "weights" / "cifar10_resnet20-12fca82f.th"}
  normalise: {{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
  data: {data_root / "cifar10" / "test_jpeg_10k.parquet"}
  splits: {{train: 0.4, valid: 0.2, repair: 0.2, test: 0.2, seed: 0}}
  epsilon: 0.031
"""
        + (f"  limit: {limit}\n" if limit else "")
    )
    found = fixstudy("doctor", "subject.yaml")
    assert "error" not in found and "normalise" not in found
    assert "The original model is right on" in found
    assert "reassure (UNADAPTABLE, consecutive_linear)" in found
    if limit is None:
        assert "is right on 81.9% of the test split" in found or "is right on 82.0% of the test split" in found

    told = fixstudy("fix", "--subject", "subject.yaml", "--fixer", "arachne", "--preset", "quick", "--out", "f.onnx")
    total = limit or 10_000
    assert f"{total * 4 // 10:,} train, {total // 5:,} valid, {total // 5:,} repair, {total // 5:,} test" in told
    assert "repaired" in told and "wrote f.onnx" in told
    facts = {item.key: item.value for item in onnx.load("f.onnx").metadata_props}
    assert facts["fixer"] == "arachne" and json.loads(facts["params"])["population"] > 0
    # The architecture that went in comes out, with the normalisation that the weights need.
    imported = load_onnx("f.onnx")
    assert imported.input_shape == (3, 32, 32) and imported.n_outputs == 10
    assert sum(value.numel() for value in imported.model.parameters()) == 269_722

    again = fixstudy(
        "fix", "--model", "f.onnx", "--data", data_root / "cifar10" / "test_1k.parquet",
        "--fixer", "finetune", "--preset", "quick",
    )  # fmt: skip
    assert "finetune on f" in again
