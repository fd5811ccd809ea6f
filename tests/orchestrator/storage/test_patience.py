"""Storage that fails now and then is borne with, and what lasts is said."""

import errno
import os
import time

import pytest
from stored_trials import Clock, failing

from analysis.contract.errors import UserError
from orchestrator.storage.patience import Patience, StorageError, StorageFullError


def test_what_passes_is_tried_again_ever_later():
    clock = Clock()
    action = failing(*[OSError(errno.EIO, "Input/output error")] * 6)
    assert clock.patience().carry_out(action, "write x", "r") == "done"
    assert len(clock.waits) == 6
    assert all(0.05 * 2**n <= wait <= 0.1 * 2**n for n, wait in enumerate(clock.waits))


def test_what_does_not_pass_ends_in_one_sentence():
    clock = Clock()
    action = failing(*[OSError(errno.EIO, "Input/output error")] * 14)
    with pytest.raises(
        StorageError, match=r"^The results folder r failed to write x after 12 tries in \d+ s \(Input/out"
    ):
        clock.patience().carry_out(action, "write x", "r")
    assert len(action.left) == 2
    assert 25 < sum(clock.waits) < 60
    assert max(clock.waits) <= 10
    assert issubclass(StorageError, UserError)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_what_lasts_is_not_tried_again(number):
    clock, action = Clock(), failing(OSError(number, os.strerror(number)))
    with pytest.raises(StorageError, match=f"failed to write x \\({os.strerror(number)}\\); see to the storage"):
        clock.patience().carry_out(action, "write x", "r")
    assert clock.waits == []


def test_too_many_open_files_are_not_the_storages_fault():
    clock, action = Clock(), failing(OSError(errno.EMFILE, "Too many open files"))
    with pytest.raises(OSError, match="Too many open files") as caught:
        clock.patience().carry_out(action, "write x", "r")
    assert type(caught.value) is OSError
    assert clock.waits == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_is_waited_for_as_long_as_is_said(number):
    clock, told = Clock(), []
    patience = clock.patience(pause=60.0, on_full=told.append, on_space=lambda: told.append("space"))
    full = OSError(number, os.strerror(number))
    assert patience.carry_out(failing(*[full] * 10), "write x", "r") == "done"
    assert clock.waits == [5.0] * 10
    where = f"The results folder r is full ({full.strerror}, to write x)"
    assert told == [f"{where}; free some space and the study goes on by itself.", "space"]
    with pytest.raises(StorageFullError, match="free some space, then run the same command again"):
        patience.carry_out(failing(*[full] * 1000), "write x", "r")
    assert sum(clock.waits[10:]) == pytest.approx(60.0)


def test_a_clock_that_jumps_shortens_no_pause(monkeypatch):
    clock, jumps = Clock(), iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    full = OSError(errno.ENOSPC, "No space left on device")
    assert clock.patience(pause=60.0).carry_out(failing(*[full] * 11), "write x", "r") == "done"
    assert Patience().clock is time.monotonic
