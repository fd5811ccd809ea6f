"""What a results folder keeps of its study, and that it keeps it."""

import pytest
from stored_trials import write

from orchestrator.driver.frozen import ResultsVanishedError, check_that_nothing_vanished
from orchestrator.storage.store import Store


def test_results_that_vanish_under_a_run_are_said(tmp_path):
    store = Store(tmp_path)
    store.create()
    for name in ("settings.json", "study.yaml"):
        store.write_bytes(name, b"{}")
    written = {write(store, number) for number in range(3)}
    check_that_nothing_vanished(store, written)
    store.delete(f"trials/{min(written)}.parquet")
    store.delete("settings.json")
    with pytest.raises(ResultsVanishedError, match=r"no more the rows of 1 of 3 trials, settings\.json; run") as caught:
        check_that_nothing_vanished(store, written)
    assert caught.value.exit_code == 1
