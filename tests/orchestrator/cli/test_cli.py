import errno
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from synthetic_study import write_study

import fixers
from analysis.contract.errors import UserError
from analysis.published.published import import_published
from fixers import registry
from orchestrator.cli import cli, options
from orchestrator.subjects.catalogue import catalogue


def test_help_imports_neither_torch_nor_ray_nor_duckdb():
    script = "import sys; from orchestrator.cli import cli; cli(['--help'], standalone_mode=False); "
    script += (
        "print([name for name in ('torch', 'ray', 'duckdb', 'pyarrow', 'rich', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_the_readme_has_every_command():
    table = (Path(__file__).parents[3] / "README.md").read_text().partition("## Commands")[2].partition("## ")[0]
    assert set(re.findall(r"`fixstudy ([a-z-]+)", table)) == set(cli.commands)


@pytest.mark.parametrize("command", ["status", "sql", "report"])
def test_reading_results_imports_neither_torch_nor_ray(command, tmp_path):
    import_published(tmp_path / "published")
    query = ["select 1"] if command == "sql" else []
    script = (
        f"import sys; from orchestrator.cli import cli; cli({[command, str(tmp_path / 'published'), *query]!r}, "
        "standalone_mode=False); print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("missing", ["scikit-learn", None])
def test_a_package_that_is_missing_is_named_and_a_broken_import_is_not_excused(missing, fixstudy, monkeypatch):
    def version(package):
        if package == missing:
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(options, "version", version)
    monkeypatch.setitem(sys.modules, "orchestrator.cli.listings", None)
    if missing is None:
        with pytest.raises(ModuleNotFoundError):
            fixstudy("fixers")
    else:
        done = fixstudy("fixers")
        assert done.returncode == 2
        assert done.stderr.endswith("listings: pip install 'fixstudy[study]'.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "nowhere.yaml"], "There is no study file nowhere.yaml."),
        (["plan"], "Missing argument 'STUDY'"),
        (["status", "nowhere"], "nowhere"),
        (["sql", "nowhere", "select 1"], "nowhere"),
        (["sql"], "Say which study to ask: fixstudy sql RESULTS."),
        (["sql", "--query", "effectiveness"], "Say which study to ask"),
        (["fixers", "arachn"], "did you mean 'arachne'?"),
        (["subjects", "digit"], "did you mean 'digits'"),
        (["fix", "--model", "digits", "--fixer", "arachne", "--param", "populaton=3"], "did you mean 'population'?"),
        (["fix", "--model", "digits", "--fixer", "arachne", "--param", "alpha=2024-13-01"], "alpha can't be read"),
        (["fix", "--model", "nowhere.onnx", "--fixer", "arachne"], "--data is missing"),
        (["fix", "--fixer", "arachne"], "Give --model with --data, or --subject."),
        (
            ["fix", "--model", "digits", "--fixer", "reassure", "--mitigate", "wi"],
            "isn't of the original's architecture",
        ),
        (["fix", "--model", "digits", "--fixer", "arachne", "--max-nfr", "0"], "--max-nfr is more than 0"),
        (["fix", "--model", "digits", "--fixer", "arachne", "--max-nfr", "1%", "--mitigate", "av"], "Give either"),
        (["fix", "--model", "digits", "--fixer", "arachne", "--mitigate", "sof_voting"], "did you mean 'soft_voting'?"),
        (["fix", "--model", "digits", "--fixer", "arachne", "--set", "budget=1"], "name one with --mitigate"),
        (["advise", "x", "--max-nfr", "much"], "A share is written"),
        (["submit", "--address", "http://192.0.2.1:8265"], "Give a study file to submit, or --attach"),
        (["submit", "s.yaml", "--address", "http://192.0.2.1:8265", "--attach", "j"], "one of them"),
        (["train", "imagenet", "--data-root", "nowhere"], "imagenet"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(arguments, said, fixstudy):
    done = fixstudy(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_the_named_questions_are_listed_without_a_study(fixstudy):
    done = fixstudy("sql", "--list", "--format", "json")
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads(done.stdout)]
    assert {"effectiveness", "per_class"} <= set(names) and names == sorted(names)
    assert fixstudy("sql", "any/results", "--list", "--format", "json").stdout == done.stdout


def test_the_plan_of_a_study_runs_nothing(fixstudy, tmp_path):
    study = tmp_path / "s.yaml"
    study.write_text(
        "study: s\nsubjects: [digits]\nfixers: [arachne, {name: finetune, grid: {epochs: [1, 2]}}]\nseeds: 2"
    )
    done = fixstudy("plan", study)
    assert done.returncode == 0, done.stderr
    assert "6 trials" in done.stdout
    assert not (tmp_path / "results").exists()
    assert fixstudy("run", study, "--dry-run").stdout == done.stdout


def test_fix_prints_before_and_after_and_writes_onnx(fixstudy, tmp_path):
    out = tmp_path / "fixed.onnx"
    done = fixstudy("fix", "--model", "digits", "--fixer", "arachne", "--preset", "quick", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "repaired" in done.stdout
    assert "accuracy" in done.stdout
    import onnx

    facts = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert facts["fixer"] == "arachne"
    assert json.loads(facts["params"])["population"] > 0
    card = (tmp_path / "fixed.md").read_text()
    assert facts["trial_id"] in card and f"| {100 * float(facts['accuracy_fixed']):.2f} |" in card
    again = fixstudy("fix", "--model", out, "--data", "digits", "--fixer", "finetune", "--preset", "quick")
    assert again.returncode == 0, again.stderr
    assert f"{float(facts['accuracy_fixed']):.2%}" in again.stdout, "the written model is the fixed one"


def test_fix_mitigates_in_a_third_column_and_writes_the_combined_model(fixstudy, tmp_path):
    import onnx

    out = tmp_path / "fixed.onnx"
    asked = ("fix", "--model", "digits", "--fixer", "finetune", "--preset", "quick", "--out", out)
    done = fixstudy(*asked, "--mitigate", "av", "--set", "budget=.25")
    assert done.returncode == 0, done.stderr
    assert "mitigated" in done.stdout and "2.00 x the multiply-accumulates" in " ".join(done.stdout.split())
    assert "No attack on the combined model" in done.stdout
    facts = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert facts["fixer"] == "finetune+aligned_voting" and facts["mitigation"] == "aligned_voting"
    assert json.loads(facts["mitigation_params"])["budget"] == 0.25
    card = (tmp_path / "fixed.md").read_text()
    assert "**Mitigation.**" in card and facts["trial_id"] in card


def test_fix_certifies_and_says_on_what_grounds(fixstudy, tmp_path):
    import onnx

    out = tmp_path / "fixed.onnx"
    asked = ("fix", "--model", "digits", "--fixer", "finetune", "--preset", "quick", "--out", out, "--max-nfr")
    done = fixstudy(*asked, "3%", "--calibration", "50%")
    assert done.returncode == 0, done.stderr
    facts = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert facts["certificate_n"] == "350" and facts["certificate_confidence"] == "0.95"
    assert facts["certified_nfr"] == "0.03" and 0 < float(facts["ladder_step"]) <= 1
    card = (tmp_path / "fixed.md").read_text()
    for text in (" ".join(done.stdout.split()), card):
        assert f"95 % certain; {facts['certificate_k']} of 350 calibration samples broken" in text
    assert "A test split may exceed it by chance" in card and "the approach noted: certified" not in card
    done = fixstudy(*asked, "1%")
    assert "give --calibration 43%" in " ".join(done.stdout.split())
    facts = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert (facts["ladder_step"], facts["n_broken"]) == ("0", "0") and "certified_nfr" not in facts
    assert "at least 299 calibration samples" in facts["certificate"]


def test_mitigations_are_listed_and_told(fixstudy):
    assert all(f" {name} " in fixstudy("mitigations").stdout for name in ("soft_voting", "weight_interpolation"))
    assert "budget" in fixstudy("mitigations", "AV").stdout


def test_fix_refuses_a_target_before_it_fixes(fixstudy, monkeypatch, tmp_path):
    monkeypatch.setattr("orchestrator.cli.single_model.load_subject", lambda *args, **kwargs: pytest.fail("it began"))
    done = fixstudy("fix", "--model", "digits", "--fixer", "arachne", "--out", "nowhere/fixed.onnx")
    assert done.returncode == 2
    assert "nowhere, where --out is to go" in done.stderr
    (tmp_path / "fixed.md").write_text("# Notes of mine")
    done = fixstudy("fix", "--model", "digits", "--fixer", "arachne", "--out", tmp_path / "fixed.onnx")
    assert done.returncode == 2 and "fixed.md, which is none" in done.stderr


def test_ctrl_c_is_answered(fixstudy, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.cli.single_model.fix_command", interrupted)
    done = fixstudy("fix", "--model", "digits", "--fixer", "arachne")
    assert (done.returncode, done.stderr.strip()) == (130, "fixstudy: stopped.")


@pytest.mark.parametrize("name", [None, "/cache/originals/digits.safetensors"])
def test_a_full_disk_is_one_sentence(fixstudy, monkeypatch, name):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    monkeypatch.setattr("orchestrator.cli.single_model.fix_command", full)
    done = fixstudy("fix", "--model", "digits", "--fixer", "arachne")
    where = "" if name is None else f" ({name})"
    said = f"fixstudy: This machine couldn't do it: No space left on device{where}; see to that and repeat.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_a_mistake_that_quotes_data_steers_no_terminal(fixstudy, monkeypatch):
    def quotes(**options):
        raise UserError("There is no subject \x1b]0;taken\x07.")

    monkeypatch.setattr("orchestrator.cli.single_model.fix_command", quotes)
    said = fixstudy("fix", "--model", "digits", "--fixer", "arachne").stderr
    assert "taken" in said and said.rstrip("\n").isprintable()


def test_a_terminal_without_unicode_gets_question_marks():
    command = [sys.executable, "-m", "orchestrator.cli", "subjects"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fashion_mnist" in done.stdout


def test_fix_takes_a_plug_in(fixstudy, monkeypatch):
    fixers.all_fixers()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    plugin = Path(__file__).parents[3] / "examples" / "misbehaving_fixers.py"
    words = ("fix", "--model", "digits", "--fixer", "does_nothing")
    assert "There is no fixer 'does_nothing'" in fixstudy(*words).stderr
    done = fixstudy(*words, "--plugin", plugin)
    assert done.returncode == 0, done.stderr
    assert "repaired 0 of" in done.stdout


@pytest.mark.parametrize("command", ["fixers", "subjects"])
@pytest.mark.parametrize("columns", ["80", "200"])
def test_names_that_one_has_to_type_are_not_cut(fixstudy, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    names = fixers.all_fixers() if command == "fixers" else catalogue()
    done = fixstudy(command)
    assert all(f" {name} " in done.stdout for name in names)
    assert "…" not in done.stdout


def test_fix_writes_a_model_that_the_fixer_extended(fixstudy, tmp_path):
    import onnx

    out = tmp_path / "fixed.onnx"
    done = fixstudy("fix", "--model", "digits", "--fixer", "reassure", "--preset", "quick", "--out", out)
    assert done.returncode == 0, done.stderr
    weights = {item.name for item in onnx.load(out).graph.initializer}
    assert any(name.startswith("patch.") for name in weights)


def test_the_gate_ends_with_what_the_data_say(fixstudy, tmp_path):
    study = write_study(tmp_path / "results", subjects=("digits",), fixers=("apricot",), outcomes={}).folder
    asked = ("check", study, "--fixer", "apricot", "--max-nfr")
    assert [fixstudy(*asked, limit).returncode for limit in ("100%", "0.01%")] == [0, 3]
    rate = json.loads(fixstudy(*asked, "100%", "--format", "json").stdout)["checks"][0]["measured"]["estimate"]
    between = [
        fixstudy(*asked, str(rate), *more).returncode for more in ((), ("--undecided", "pass"), ("--undecided", "fail"))
    ]
    assert between == [4, 0, 3]
    assert fixstudy(*asked, "100%", "--junit", tmp_path / "gate.xml").returncode == 0
    assert 'failures="0"' in (tmp_path / "gate.xml").read_text()
    assert fixstudy(*asked, "much").returncode == 2
