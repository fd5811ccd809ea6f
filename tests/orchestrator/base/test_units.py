import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.contract.errors import UserError
from orchestrator.base import units


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 1d ", 86400)])
def test_times(text, expected):
    assert units.seconds(text) == expected


@pytest.mark.parametrize("text", ["0", "-5", "inf", "infd", "nan", "1e10", "3651d"])
def test_a_time_that_no_timer_takes_is_refused(text):
    with pytest.raises(UserError, match="A time is more than 0 and at most 3650 days"):
        units.seconds(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("4GiB", 4 * 2**30), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("1000000", 1_000_000)]
)
def test_sizes(text, expected):
    assert units.size(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("0.005", 0.005), ("0.5%", 0.005), ("100%", 1), ("0", 0)])
def test_shares(text, expected):
    assert units.share(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["-1%", "101%", "nan", "much"])
def test_a_share_outside_0_and_1_is_refused(text):
    with pytest.raises(UserError, match="A share is"):
        units.share(text)


@given(st.one_of(st.text(), st.from_regex(r"[-0-9.e]+(s|m|h|d|%|[KMGT]i?B)?", fullmatch=True)))
def test_what_anybody_writes_is_a_number_or_one_sentence(text):
    for read in (units.seconds, units.size, units.share):
        try:
            value = read(text)
        except UserError:
            continue
        assert math.isfinite(value)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(42.4, "42 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, expected):
    assert units.duration(seconds) == expected
