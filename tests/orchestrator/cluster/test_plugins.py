"""Approaches from elsewhere, on nodes that have never seen their files."""

import os
import pickle  # noqa: TID251 (Ray sends them that way)
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from driver_process import Driver

from orchestrator.cluster.plugins import packed

FIXER = """
from dataclasses import dataclass
from typing import ClassVar
from fixers import Fixer
{line}
@dataclass(frozen=True)
class Lone(Fixer):
    name: ClassVar[str] = "{name}"
    abbreviation: ClassVar[str] = "{name}"
    level: ClassVar[str] = "neuron"
    reference: ClassVar[str] = "2026"
    def fix(self, problem):
        {call}()
        return problem.new_model()
"""
LOADED = """
import pickle, sys
from pathlib import Path
for plugin in pickle.loads(sys.stdin.buffer.read()):
    plugin.load(Path(sys.argv[1]))
import fixers
print(sorted({"lone", "packaged"} & fixers.all_fixers().keys()))
"""


def write(folder):
    """A file that stands alone, and a package with a helper."""
    package = folder / "my_fixers"
    package.mkdir(parents=True)
    for path in (package / "__init__.py", package / "helper.py"):
        path.write_text("def nothing():\n    pass\n")
    (package / "packaged.py").write_text(
        FIXER.format(line="from my_fixers.helper import nothing", call="nothing", name="packaged")
    )
    (folder / "lone.py").write_text(FIXER.format(line="", call="list", name="lone"))
    return str(folder / "lone.py"), "my_fixers.packaged"


def loaded_elsewhere(plugins, folder):
    """What another process finds that has the plug-ins' code only as it was sent."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(folder)], input=pickle.dumps(plugins), capture_output=True, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.mark.slow
def test_code_travels_and_what_is_installed_does_not(tmp_path, monkeypatch):
    sources = write(tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    plugins = packed([*sources, "pytest", "json"])
    assert [sorted(plugin.files) for plugin in plugins] == [
        ["lone.py"], ["my_fixers/__init__.py", "my_fixers/helper.py", "my_fixers/packaged.py"], [], []
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "mine")
    for _ in range(2):
        assert loaded_elsewhere(plugins[:2], tmp_path / "cache") == "['lone', 'packaged']"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_file_at_the_same_path_is_not_taken_for_it(tmp_path):
    source, _ = write(tmp_path / "mine")
    plugins = packed([source])
    Path(source).write_text(FIXER.format(line="", call="list", name="other"))
    assert loaded_elsewhere(plugins, tmp_path / "cache") == "['lone']"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a folder that only the driver sees needs root"
)
def test_a_node_needs_no_file_of_a_plugin(tmp_path):
    """Only the driver sees the folder with the code; for the nodes it is empty, as on another machine."""
    from ray.cluster_utils import Cluster

    write(tmp_path / "mine")
    seen = tmp_path / "seen_by_the_driver"
    seen.mkdir()
    study = tmp_path / "study.yaml"
    study.write_text(
        f"study: carried\nsubjects: [digits]\nplugins: ['{seen}/lone.py', my_fixers.packaged]\n"
        "fixers: [lone, packaged]\nattack: none\nkeep_models: none\npictures: false\n"
    )
    options = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        inside = f'mount --make-rprivate / && mount --bind {tmp_path}/mine {seen} && exec "$@"'
        path = f"{seen}:{os.environ.get('PYTHONPATH', '')}"
        alone = ["unshare", "-m", "sh", "-c", inside, "sh"]
        driver = Driver(study, tmp_path, "--address", cluster.address, prefix=alone, PYTHONPATH=path)
        driver.finish()
    finally:
        cluster.shutdown()
    assert [(row["fixer"], row["outcome"]) for row in driver.rows()] == [("lone", "OK"), ("packaged", "OK")]
    assert not list(seen.iterdir())
