"""``fixstudy run`` as a process of its own, for tests that kill what it stands on."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb

PATIENCE = 300.0
COLUMNS = "trial_id, seed, outcome, accuracy_fixed, n_repaired, n_broken"


class Driver:
    """``fixstudy run`` in a process of its own; ``prefix`` is a command that runs it somewhere else."""

    def __init__(
        self, study: Path, folder: Path, *options: str, prefix: Sequence[str] = (), **environment: str
    ) -> None:
        self.results, self._log = folder / "results", folder / "driver.log"
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--results", str(self.results)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, *command, *options],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.said

    def rows(self) -> list[tuple[object, ...]]:
        files = f"{self.results}/trials/*.parquet"
        return duckdb.sql(f"select {COLUMNS} from read_parquet('{files}') order by fixer, seed").fetchall()

    def rows_so_far(self) -> bool:
        """Whether any trial has its row."""
        return any(self.results.glob("trials/*.parquet"))


def wait_for(condition: Callable[[], object], driver: Driver) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert driver.process.poll() is None, driver.said
        assert time.monotonic() < deadline, driver.said
        time.sleep(0.05)
