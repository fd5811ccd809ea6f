"""A study of somebody's own ONNX model and data on a real Ray, and what its results say of subject and samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import analysis
from orchestrator.run import run_study
from orchestrator.subjects.onnx_export import export_onnx

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


def shapes() -> dict[str, Any]:
    """Images whose class is the brighter channel, with a site and an age that isn't always known."""
    drawn = np.random.default_rng(0)
    labels = np.arange(N) % 3
    images = drawn.integers(60, 120, (N, 12, 12, 3))
    images[np.arange(N), :, :, labels] += drawn.integers(0, 60, (N, 1, 1))
    age = np.where(np.arange(N) % 10 == 0, np.nan, np.arange(N))
    site = np.where(np.arange(N) // 3 % 2 == 0, "north", "south")
    return {"images": images.astype(np.uint8), "labels": labels, "site": site, "age": age}


@pytest.fixture(scope="module")
def own(ray_address: str, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study file, with its results in ``results``."""
    from subjects.factories import convnet

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
