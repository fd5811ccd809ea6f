"""The choice of a free number."""

import pytest

from fixers.mitigations.aims import Candidate
from fixers.mitigations.aligned_voting import AlignedVoting
from fixers.mitigations.effects import Effect


def effect(accuracy, nfr, n=1000, original=0.9):
    broken = round(nfr * n)
    wrong = round((1 - original) * n)
    return Effect(n, wrong, round(accuracy * n) - (n - wrong) + broken, broken)


CANDIDATES = [
    Candidate(0.0, effect(0.90, 0.0)),
    Candidate(0.3, effect(0.93, 0.010)),
    Candidate(0.5, effect(0.94, 0.018)),
    Candidate(1.0, effect(0.935, 0.030)),
]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.3),
        ({"budget": 0.75}, 0.5),
        ({"budget": 0.0}, 0.0),
        ({"budget": 1.0, "nfr_max": 0.012}, 0.3),
        ({"aim": "pareto"}, 0.5),
        ({"aim": "keep", "keep": 0.5}, 0.3),
        ({"aim": "keep", "keep": 1.0}, 1.0),
    ],
)
def test_each_aim_chooses_what_it_says(settings, share):
    notes = {}
    best = AlignedVoting(**settings).chosen(CANDIDATES, CANDIDATES[-1].effect, notes.update)
    assert best.share == share
    assert notes == {}


def test_a_fix_that_breaks_nothing_has_a_budget_of_zero_which_it_keeps():
    harmless = [Candidate(each.share, effect(each.effect.accuracy, 0.0)) for each in CANDIDATES]
    notes = {}
    best = AlignedVoting().chosen(harmless, harmless[-1].effect, notes.update)
    assert best.share == 0.5
    assert notes == {"budget_zero": True}


def test_an_aim_that_undoes_the_fix_says_so():
    worse = [CANDIDATES[0], Candidate(1.0, effect(0.89, 0.05))]
    notes = {}
    assert AlignedVoting(aim="pareto").chosen(worse, worse[-1].effect, notes.update).share == 0
    assert notes == {"undoes_fix": True}


def test_of_equals_the_one_nearer_the_fixed_model_is_taken():
    equal = [Candidate(share, effect(0.93, 0.01)) for share in (0.2, 0.4, 0.6)]
    best = AlignedVoting().chosen([CANDIDATES[0], *equal], effect(0.93, 0.03), lambda **facts: None)
    assert best.share == 0.6
