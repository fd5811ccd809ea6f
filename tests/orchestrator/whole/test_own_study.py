"""A study of somebody's own ONNX model and data on a real Ray, and what its results say of subject and samples."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml

import analysis
from orchestrator.cli import main
from orchestrator.driver.run import run_study
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.onnx.parity import OnnxRunner

pytestmark = pytest.mark.ray

N = 240
STUDY = """
study: own
subjects:
  - name: shapes
    model: shapes.onnx
    data: shapes.npz
    splits: {train: 0.4, valid: 0.2, repair: 0.2, test: 0.2, seed: 0}
    sensitive: {column: site, groups: [north, south]}
    classes: [red, green, blue]
fixers: [finetune]
preset: quick
attack: {samples: 20, steps: 3}
keep_models: all
"""


SUBJECTS = Path(__file__).parents[1] / "subjects"


def shapes() -> dict[str, Any]:
    """Images whose class is the brighter channel, with a site and an age that isn't always known."""
    drawn = np.random.default_rng(0)
    labels = np.arange(N) % 3
    images = drawn.integers(60, 120, (N, 12, 12, 3))
    images[np.arange(N), :, :, labels] += drawn.integers(0, 60, (N, 1, 1))
    age = np.where(np.arange(N) % 10 == 0, np.nan, np.arange(N))
    site = np.where(np.arange(N) // 3 % 2 == 0, "north", "south")
    return {"images": images.astype(np.uint8), "labels": labels, "site": site, "age": age}


@pytest.fixture
def fixstudy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command: exit code, and what it said as one line."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fixstudy", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return run


@pytest.fixture(scope="module")
def own(ray_address: str, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study file, with its results in ``results``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SUBJECTS)
        from factories import convnet

    folder = tmp_path_factory.mktemp("own")
    np.savez(folder / "shapes.npz", **shapes())
    torch.manual_seed(1)
    export_onnx(convnet().eval(), folder / "shapes.onnx", input_shape=(3, 12, 12))
    (folder / "study.yaml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIXSTUDY_CACHE", str(shared_cache))
        summary = run_study(folder / "study.yaml", results=str(folder / "results"), address=ray_address)
    assert summary.planned == summary.ran == 1 and "FAILURE" not in summary.outcomes
    return folder


def test_parity_of_the_imported_model_is_stored_with_its_subject(own: Path) -> None:
    with analysis.open(own / "results") as con:
        found = con.sql("select parity_inputs, parity_same_class, n_valid, parity_max_difference from subjects")
        [(inputs, same_class, n_valid, largest)] = found.fetchall()
    assert inputs == same_class == n_valid == N // 5
    assert 0 <= largest < 1e-4


def test_what_a_dataset_says_of_its_samples_is_in_the_results(own: Path) -> None:
    answer = analysis.query(
        own / "results",
        """select p.sample_id, p.label, p."group", class_name, group_name,
                  metadata['site'] as site, metadata['age'] as age
           from predictions p join trials t using (trial_id) join test_samples s using (subject_fingerprint, sample_id)
           order by sample_id""",
    )
    samples = answer.to_pylist()
    assert [sample["sample_id"] for sample in samples] == list(range(N // 5))
    data = shapes()
    for sample in samples:
        assert sample["class_name"] == ("red", "green", "blue")[sample["label"]]
        assert sample["site"] == sample["group_name"] == ("north", "south")[sample["group"]]
        if sample["age"] is not None:
            # The age tells which of our samples it is.
            index = int(float(sample["age"]))
            assert (data["labels"][index], data["site"][index]) == (sample["label"], sample["site"])
    assert 0 < sum(sample["age"] is None for sample in samples) < N // 5
    with analysis.open(own / "results") as con:
        kinds = analysis.run(con, "per_metadata").to_pylist()
    assert {row["metadata"] for row in kinds} == {"site", "age"}
    sites = [row for row in kinds if row["metadata"] == "site"]
    assert sum(row["n_test"] for row in sites) == N // 5


def test_a_kept_model_is_exported_with_what_it_reached(
    own: Path, fixstudy: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    with analysis.open(own / "results") as con:
        [row] = con.sql("select * from trials").to_arrow_table().to_pylist()
        fixed = con.sql("select fixed from predictions order by sample_id").fetchnumpy()["fixed"]
    target = tmp_path / "fixed.onnx"
    code, said = fixstudy("export", own / "results", target, "--trial", row["trial_id"][:5], "--card")
    assert code == 0 and f"wrote {target}" in said
    assert f"RR: failures repaired, % |  | {100 * row['repair_rate']:.2f} |" in target.with_suffix(".md").read_text()
    facts = {item.key: item.value for item in onnx.load(target).metadata_props}
    assert (facts["trial_id"], facts["fixer"], facts["seed"]) == (row["trial_id"], "finetune", "0")
    assert facts["params"] == row["params"] and facts["outcome"] == row["outcome"]
    for name in ("accuracy_original", "accuracy_fixed", "repair_rate", "negative_flip_rate", "asr_fixed", "aaod_fixed"):
        assert float(facts[name]) == pytest.approx(row[name], abs=1e-6), name
    assert int(facts["n_repaired"]) == row["n_repaired"] and int(facts["n_test"]) == N // 5

    given = {"name": "shapes", "model": "shapes.onnx", "data": "shapes.npz",
             "splits": {"train": 0.4, "valid": 0.2, "repair": 0.2, "test": 0.2, "seed": 0},
             "sensitive": {"column": "site", "groups": ["north", "south"]}}  # fmt: skip
    inputs = resolve(given, base_dir=own).load_data().test.batch().inputs
    assert (OnnxRunner(target.read_bytes(), "pixels")(inputs.numpy()).argmax(axis=1) == fixed).all()

    code, said = fixstudy("export", own / "results", target, "--trial", "nonsense")
    assert code == 2 and "has no trial 'nonsense'" in said
    code, said = fixstudy("export", own / "results", target, "--trial", row["trial_id"], "--data-root", tmp_path)
    assert code == 2 and "No such option" in said


@pytest.fixture
def tabular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The breast cancer set of scikit-learn with an MLP; the working directory has its modules."""
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer().data
    shutil.copy(SUBJECTS / "factories.py", tmp_path / "tables.py")
    monkeypatch.chdir(tmp_path)
    return {
        "name": "breast-cancer",
        "model": "tables:mlp",
        "data": "tables:breast_cancer",
        "normalise": {"mean": raw.mean(0).tolist(), "std": raw.std(0).tolist()},
        "splits": {"train": 0.3, "valid": 0.1, "repair": 0.3, "test": 0.3, "seed": 1},
        "recipe": {"learning_rate": 0.01, "epochs": 15, "batch_size": 32},
    }


def test_fixers_run_on_rows_of_a_table(tabular: dict[str, Any], fixstudy: Callable[..., tuple[int, str]]) -> None:
    Path("subject.yaml").write_text(yaml.safe_dump({"subject": tabular}))
    code, said = fixstudy(
        "fix", "--subject", "subject.yaml", "--fixer", "arachne", "--preset", "quick", "--out", "f.onnx"
    )
    assert code == 0, said
    assert "171 train, 57 valid, 170 repair, 171 test" in said and "arachne on breast-cancer" in said
    assert "attack success" not in said
    facts = {item.key: item.value for item in onnx.load("f.onnx").metadata_props}
    assert facts["fixer"] == "arachne" and float(facts["accuracy_original"]) > 0.9 and "asr_fixed" not in facts
    code, said = fixstudy("fix", "--subject", "subject.yaml", "--fixer", "deeprepair")
    assert code == 2 and "it works on images (C, H, W), and an input has shape (30,)." in said


def test_a_limit_on_the_command_line(tabular: dict[str, Any], fixstudy: Callable[..., tuple[int, str]]) -> None:
    Path("subject.yaml").write_text(yaml.safe_dump({"subject": {**tabular, "limit": 500}}))
    code, said = fixstudy("doctor", "subject.yaml", "--limit", 200)
    assert code == 0 and "isn't trained yet" in said
    code, said = fixstudy("train", "subject.yaml", "--limit", 200)
    assert code == 0 and "epoch 15/15" in said
    code, said = fixstudy("doctor", "subject.yaml", "--limit", 200)
    assert "among 60 repair samples" in said and "among 60 test samples" in said
    code, said = fixstudy("fix", "--subject", "subject.yaml", "--fixer", "finetune", "--limit", 200)
    assert code == 0 and "60 train, 20 valid, 60 repair, 60 test" in said
    code, said = fixstudy("doctor", "subject.yaml", "--limit", 3)
    assert code == 2 and "A limit must leave at least one sample in each of four splits, but got 3." in said


@pytest.mark.slow
def test_a_study_of_rows_of_a_table(tabular: dict[str, Any], ray_address: str) -> None:
    fixers = ["finetune", "arachne", "apricot", "deeprepair"]
    study = {"study": "tables", "subjects": [tabular], "fixers": fixers, "preset": "quick"}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    summary = run_study("study.yaml", results="results", address=ray_address)
    assert summary.planned == 4
    with analysis.open("results") as con:
        rows = con.sql("select * from trials order by fixer").to_arrow_table().to_pylist()
    *applied, refused = sorted(rows, key=lambda row: row["fixer"] == "deeprepair")
    assert (refused["outcome"], refused["reason_code"]) == ("UNADAPTABLE", "image_input")
    assert "it works on images (C, H, W), and an input has shape (30,)." in refused["reason"]
    for row in applied:
        assert row["outcome"] == "OK", row["reason"]
        assert row["n_test"] == 171 and row["accuracy_original"] > 0.9 and row["accuracy_fixed"] > 0.85
        assert row["n_wrong"] > 0 and row["asr_original"] is None and row["attack"] is None
        by_hand = row["accuracy_original"] + (row["n_repaired"] - row["n_broken"]) / 171
        assert row["accuracy_fixed"] == pytest.approx(by_hand)
