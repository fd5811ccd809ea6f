import torch

from fixers import Fixer, fix


def test_convolutions_take_all_of_float32_while_an_approach_runs(make_problem):
    """What APRNN and PRDNN prove in double precision doesn't hold where cuDNN rounds to TF32."""
    seen = []

    class Looks(Fixer):
        name, abbreviation, level, reference = "looks", "L", "neuron", "-"

        def fix(self, problem):
            seen.append(torch.backends.cudnn.allow_tf32)
            return problem.new_model()

    before = torch.backends.cudnn.allow_tf32
    fix(Looks(), make_problem())
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_an_approach_is_not_asked_where_nothing_fails(make_problem):
    problem = make_problem(repair=make_problem().passes)

    class Never(Fixer):
        name, abbreviation, level, reference = "never", "N", "neuron", "-"

        def fix(self, problem):
            raise AssertionError

    fixed = fix(Never(), problem)
    assert problem.notes == {"nothing_to_fix": True}
    assert not fixed.training
    assert all(torch.equal(a, b) for a, b in zip(fixed.parameters(), problem.original.parameters(), strict=True))
