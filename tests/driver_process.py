"""``fixstudy run`` as a process of its own, for tests that kill what it stands on."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb

PATIENCE = 300.0
MAY_DIFFER = (
    "host", "run", "started_at", "fix_seconds", "evaluate_seconds", "load_seconds", "cores", "cores_of_node",
    "peak_host_bytes", "peak_own_bytes", "peak_device_bytes", "attempt_log",
)  # fmt: skip
"""Columns that say where and when a trial ran and how long it took; all others are the same whatever happened."""


class Driver:
    """``fixstudy run`` in a process of its own; ``prefix`` is a command that runs it somewhere else."""

    def __init__(
        self,
        study: Path,
        folder: Path,
        *options: str,
        prefix: Sequence[str] = (),
        results: str | None = None,
        **environment: str,
    ) -> None:
        self.results, self._log = folder / "results", folder / "driver.log"
        place = str(results or self.results)
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--results", place]
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

    def rows(self) -> list[dict[str, Any]]:
        """All that a study found: every column that must not differ, and the predictions of each trial."""
        trials = f"read_parquet('{self.results}/trials/*.parquet', union_by_name=true)"
        predictions = f"read_parquet('{self.results}/predictions/*.parquet')"
        found: list[dict[str, Any]] = (
            duckdb.sql(f"""
                select t.* exclude ({", ".join(MAY_DIFFER)}), p.predicted
                from {trials} t left join (
                    select trial_id, list((sample_id, label, original, fixed) order by sample_id) as predicted
                    from {predictions} group by trial_id
                ) p using (trial_id)
                order by fixer, seed
            """).to_arrow_table().to_pylist()
        )  # fmt: skip
        return found

    def rows_so_far(self) -> bool:
        """Whether any trial has its row."""
        return any(self.results.glob("trials/*.parquet"))


def wait_for(condition: Callable[[], object], driver: Driver) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert driver.process.poll() is None, driver.said
        assert time.monotonic() < deadline, driver.said
        time.sleep(0.05)
