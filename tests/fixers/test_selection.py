from fixers.selection import Choice


def taken(offers, *, original):
    """Positions of the candidates that were taken, each (accuracy, fixed, tie), by an original of accuracy 0.8."""
    choice = Choice(0.8, original=original)
    found = [i for i, (accuracy, fixed, tie) in enumerate(offers) if choice.offer(accuracy, fixed=fixed, tie=tie)]
    assert choice.original_kept == (not found)
    return found


def test_the_original_stays_where_every_repair_is_less_accurate():
    assert taken([(0.7, 5, 0), (0.79, 5, 1)], original=True) == []


def test_without_the_original_the_best_repair_is_taken_though_less_accurate():
    assert taken([(0.7, 5, 0), (0.79, 5, 1), (0.6, 9, 2)], original=False) == [0, 1]


def test_a_repair_goes_before_the_original_in_a_tie():
    assert taken([(0.8, 1, 0)], original=True) == [0]


def test_the_original_in_disguise_is_never_taken():
    for original in (True, False):
        assert taken([(0.8, 0, 9)], original=original) == []
        assert taken([(0.8, 0, 9), (0.8, 1, 0)], original=original) == [1]
    assert taken([(0.79, 0, 0), (0.8, 0, 1)], original=False) == [0]


def test_ties_go_to_the_larger_tie_and_then_to_the_earlier_candidate():
    assert taken([(0.9, 1, 2), (0.9, 1, 1), (0.9, 1, 2), (0.9, 1, 3)], original=True) == [0, 3]
