"""Subject files in studies: what a study says is what the file says, wherever either lies and whoever reads it."""

import itertools
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from analysis.contract.errors import UserError
from orchestrator.cluster.submission import pack
from orchestrator.driver import frozen
from orchestrator.storage.store import Store
from orchestrator.study import subjects
from orchestrator.study.reading import load_study
from orchestrator.study.subject_files import with_subjects
from orchestrator.sweeps import record

SUBJECT = "subject:\n  model: net.onnx\n  data: rows.npz\n  splits: {train: 0.4, valid: 0.2, repair: 0.2, test: 0.2}\n"
SPEC = yaml.safe_load(SUBJECT)["subject"]


def write(folder, subjects, subject=SUBJECT, place="parquet.yaml"):
    path = folder / "studies" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(subject)
    study = folder / "studies" / "study.yaml"
    study.parent.mkdir(exist_ok=True)
    study.write_text(f"study: mine\nsubjects:\n  - digits\n  - {subjects} # ours\nfixers: [finetune]\n")
    return study


@pytest.mark.parametrize(
    ("place", "before"),
    [("parquet.yaml", ""), ("own/parquet.yml", "own/"), ("../shared/parquet.yaml", "../shared/")],
)
def test_a_study_takes_what_a_subject_file_says(tmp_path, place, before):
    _, spec = load_study(write(tmp_path, place, place=place)).subjects
    assert spec == {"name": "parquet", **SPEC, "model": f"{before}net.onnx", "data": f"{before}rows.npz"}


def test_what_starts_elsewhere_stays_as_it_is(tmp_path):
    subject = "name: other\nmodel: $MODELS/net.onnx\nweights: ~/w.pt\ndata: /data/rows.npz\n"
    _, spec = load_study(write(tmp_path, "own/parquet.yaml", subject, "own/parquet.yaml")).subjects
    assert spec == yaml.safe_load(subject)


def test_the_rest_of_the_study_keeps_its_lines(tmp_path):
    study = write(tmp_path, "parquet.yaml")
    text = with_subjects(study.read_text(), "study.yaml", study.parent)
    before, after = study.read_text().splitlines(), text.splitlines()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False, True]
    assert after[3].endswith(" # ours")


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("- model\n", "must hold a mapping"),
        ("model: [\n", "this isn't valid YAML"),
        ("model: nets:make\ndata: rows.npz\n", "names a module beside it"),
    ],
)
def test_a_subject_file_that_cannot_be_meant_is_named_with_the_line_of_the_study(tmp_path, subject, said):
    study = write(tmp_path, "own/parquet.yaml", subject, "own/parquet.yaml")
    (study.parent / "own" / "nets.py").write_text("x = 1")
    with pytest.raises(UserError, match=rf"study\.yaml, line 4: .*own/parquet\.yaml.*{said}"):
        load_study(study)
    (study.parent / "own" / "parquet.yaml").unlink()
    with pytest.raises(UserError, match=r"line 4: There is no subject file .*own/parquet\.yaml"):
        load_study(study)


def test_a_module_that_is_installed_may_be_named_from_anywhere(tmp_path):
    subject = "model: torchvision.models:resnet18\n"
    _, spec = load_study(write(tmp_path, "own/parquet.yaml", subject, "own/parquet.yaml")).subjects
    assert spec["model"] == "torchvision.models:resnet18"


def test_results_say_what_the_subject_was(tmp_path):
    study, store = write(tmp_path, "parquet.yaml"), Store(str(tmp_path / "results"))
    store.create()
    frozen.freeze(load_study(study), {}, study, store)
    (study.parent / "parquet.yaml").unlink()
    assert load_study(tmp_path / "results" / "study.yaml").subjects == ["digits", {"name": "parquet", **SPEC}]


def test_what_a_subject_file_names_travels(tmp_path):
    subject = "model: net:make\nweights: w.pt\ndataset: digits\n"
    study, target = write(tmp_path, "parquet.yaml", subject), tmp_path / "packed"
    for name in ("net.py", "w.pt"):
        (study.parent / name).write_text("x = 1")
    target.mkdir()
    packed = target / pack(study, target)
    shutil.rmtree(study.parent)
    assert {path.name for path in packed.parent.iterdir()} == {"study.yaml", "net.py", "w.pt"}
    assert load_study(packed).subjects == ["digits", {"name": "parquet", **yaml.safe_load(subject)}]


def test_data_beside_a_subject_file_are_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "packed").mkdir()
    with pytest.raises(UserError, match=r"The data rows\.npz of subject parquet .*data don't travel"):
        pack(write(tmp_path, "parquet.yaml"), tmp_path / "packed")


def test_an_adapted_study_has_its_subject(tmp_path):
    study = write(tmp_path, "parquet.yaml")
    found = {"fixer": "finetune", "subject": "parquet", "chosen": {}, "reason": "most accurate"}
    record.write_study(study, study.parent / "adapted.yaml", found)
    assert load_study(study.parent / "adapted.yaml").subjects == [{"name": "parquet", **SPEC}]


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = (Path(__file__).parents[3] / "docs" / "subjects.md").read_text()
    section = text.partition("### A study of your own model and data\n")[2].partition("\n### ")[0]
    for name in ("my_model.py", "mine.yaml", "study.yaml"):
        block = section.partition(f"`{name}`")[2].partition("\n\n")[2]
        lines = list(itertools.takewhile(lambda line: not line or line.startswith("    "), block.splitlines()))
        (tmp_path / name).write_text(textwrap.dedent("\n".join(lines)))
    definitions = subjects.definitions(load_study(tmp_path / "study.yaml"), tmp_path)
    assert {name: subject.trains_original for name, subject in definitions.items()} == {"mine": True}
    assert len(definitions["mine"].load_data(None).train) == 180
