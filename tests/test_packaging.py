"""What a user gets is the wheel: it has all that it needs, works without the repository, and installs beside others."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("analysis", "fixers", "orchestrator")
STUDY = """\
study: installed
subjects: [digits-s]
fixers: [{name: finetune, preset: quick}]
attack: {samples: 20, steps: 3}
"""


def run(*command, cwd=ROOT, **environment):
    """What a command prints, without the search path of these tests; a failure shows all of it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "COLUMNS": "200", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="session")
def installed(distributions, tmp_path_factory):
    """A folder with nothing but the wheel, and how to run its command where the repository can't be imported."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", folder, distributions[1])
    # -S leaves .pth files alone, by which an editable install finds the repository.
    paths = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])

    def python(*arguments, cwd):
        return run(sys.executable, "-S", *arguments, cwd=cwd, PYTHONPATH=paths)

    python.folder = folder
    return python


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(distributions):
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{package}/py.typed" for package in PACKAGES} | {"analysis/published/published.csv"} <= expected
    with zipfile.ZipFile(distributions[1]) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert files == expected


def test_the_source_distribution_has_what_its_tests_need(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "docs/subjects.md", "examples/demo.yaml", "mkdocs.yml", "Makefile"} <= names
    assert not {name for name in names if name.startswith(("results/", "site/", ".venv/", "dist/"))}


def test_the_command_and_its_data_work_from_the_wheel(installed, tmp_path):
    command = installed.folder / "bin" / "fixstudy"
    assert "Usage" in installed(command, "--help", cwd=tmp_path)
    assert "arachne" in installed(command, "fixers", cwd=tmp_path)
    # The published table, the questions, a query's own process, the templates.
    installed(command, "import-published", "results", cwd=tmp_path)
    assert "arachne" in installed(command, "sql", "results", "select distinct fixer from trials", cwd=tmp_path)
    assert "repair_rate" in installed(command, "sql", "results", "--query", "effectiveness", cwd=tmp_path)
    installed(command, "report", "results", "--output", "report.html", cwd=tmp_path)
    assert "<style" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_all_modules_come_from_the_wheel_and_results_open_without_torch_or_ray(installed, tmp_path):
    installed(installed.folder / "bin" / "fixstudy", "import-published", "results", cwd=tmp_path)
    program = (
        "import json, sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'ray', 'onnx', 'pandas']))\n"
        "import analysis, orchestrator\n"
        "with analysis.open('results') as con:\n"
        "    rows = len(analysis.run(con, 'effectiveness'))\n"
        "print(json.dumps([rows, analysis.__file__, orchestrator.__file__]))"
    )
    rows, *files = json.loads(installed("-c", program, cwd=tmp_path))
    assert rows > 0
    assert all(Path(file).is_relative_to(installed.folder) for file in files)


def test_the_requirements_agree_with_each_other(distributions):
    """As installed here, so that pip needs no override; torchattacks of 3.4 and later ask for a requests of 2021."""
    run(sys.executable, "-m", "uv", "pip", "check", "--python", sys.executable)
    requirements = map(Requirement, metadata(distributions[1]).get_all("Requires-Dist"))
    (torchattacks,) = {requirement.specifier for requirement in requirements if requirement.name == "torchattacks"}
    assert torchattacks.contains(version("torchattacks"))
    assert not torchattacks.contains("3.5.1")


@pytest.fixture
def environment(tmp_path):
    """A new environment with pip, which goes with the test: pytest keeps its folders for a while."""
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", folder)
    yield folder / "bin"
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_installs_the_wheel_beside_datasets_and_a_study_runs(distributions, environment, tmp_path):
    """As a user has it: 5 GB, most of them torch's."""
    python, command, wheel = environment / "python", environment / "fixstudy", distributions[1]
    # The reading half first, which is small.
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    run(command, "import-published", "published", cwd=tmp_path)
    assert "arachne" in run(command, "sql", "published", "select distinct fixer from trials", cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[study]", "datasets", cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    run(command, "run", "study.yaml", cwd=tmp_path)
    measured = "select outcome, asr_fixed is not null as attacked from trials"
    assert "OK" in (answer := run(command, "sql", "results/installed", measured, cwd=tmp_path))
    assert "true" in answer.lower()
    run(python, "-c", "import datasets, torchattacks", cwd=tmp_path)
