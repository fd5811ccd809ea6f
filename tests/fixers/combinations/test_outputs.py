"""Combined outputs: planted values, ties, and what holds of every combination."""

import copy

import pytest
import torch
from torch import nn

from fixers import Classification
from fixers.combinations.outputs import GeometricVote, HardVote, Vote

Z0 = torch.tensor([[2.0, 0, 0], [0, 3, 0]])
Z1 = torch.tensor([[0.0, 1, 0], [0, 0, 1]])


def of(kind, k=3, members=2, **options):
    return kind([nn.Identity()] * members, Classification(k), **options)


def test_soft_voting_has_the_planted_probabilities():
    equal = of(Vote).combined([Z0, Z1]).exp()
    assert torch.allclose(equal, torch.tensor([[0.4995, 0.3413, 0.1592], [0.1286, 0.5607, 0.3107]]), atol=1e-4)
    assert equal.argmax(dim=-1).tolist() == [0, 1]
    quarter = of(Vote, weights=[0.25, 0.75]).combined([Z0, Z1]).exp()
    assert torch.allclose(quarter, torch.tensor([[0.3557, 0.4587, 0.1856], [0.1703, 0.3863, 0.4434]]), atol=1e-4)
    assert quarter.argmax(dim=-1).tolist() == [1, 2]


def test_the_mean_of_logits_is_another_vote():
    mean = of(GeometricVote, weights=[0.5, 0.5]).combined([Z0, Z1])
    assert torch.allclose(mean, ((Z0 + Z1) / 2).log_softmax(dim=-1), atol=1e-6)
    surer = torch.tensor([[0.0, 9, 0], [0, 9, 0]])
    assert of(Vote).combined([Z0, surer]).argmax(dim=-1).tolist() == [1, 1]


def test_of_two_members_and_classes_the_surer_one_wins_either_vote():
    generator = torch.Generator().manual_seed(0)
    pair = [3 * torch.randn(100_000, 2, generator=generator) for _ in range(2)]
    soft, hard = (of(kind, k=2).combined(pair).argmax(dim=-1) for kind in (Vote, HardVote))
    margins = torch.stack([(each[:, 0] - each[:, 1]) for each in pair])
    surer = margins.gather(0, margins.abs().argmax(dim=0)[None])[0]
    assert torch.equal(soft, hard)
    assert torch.equal(soft, (surer < 0).long())
    wider = [3 * torch.randn(10_000, 3, generator=generator) for _ in range(2)]
    soft, hard = (of(kind).combined(wider).argmax(dim=-1) for kind in (Vote, HardVote))
    voted = torch.stack([each.argmax(dim=-1) for each in wider])
    assert (hard == voted).any(dim=0).all()
    assert not (soft == voted).any(dim=0)[soft != hard].any(), "the mean may favour a class that nobody votes for"


@pytest.mark.parametrize(("tie", "winner"), [("original", 0), ("fixed", 1)])
def test_a_tie_of_two_goes_to_the_member_that_is_named(tie, winner):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(5_000, 10, generator=generator) for _ in range(2)]
    decided = of(HardVote, k=10, tie=tie).combined(pair).argmax(dim=-1)
    assert torch.equal(decided, pair[winner].argmax(dim=-1))


def test_the_lowest_class_wins_a_tie_where_that_is_the_rule():
    pair = [torch.tensor([[0.0, 0, 5]]), torch.tensor([[0.0, 5, 0]])]
    assert of(HardVote, tie="lowest").combined(pair).argmax() == 1


def test_half_a_vote_overturns_no_majority():
    sure = torch.tensor([[0.0, 0, 1e-9]]).log().clamp_min(-30)
    sure[0, 1] = 20
    members = [torch.tensor([[0.1, 0, 0]]), torch.tensor([[0.1, 0, 0]]), sure]
    assert of(HardVote, members=3).combined(members).argmax() == 0
    assert of(Vote, members=3).combined(members).argmax() == 1


def test_in_doubt_the_original_decides_and_nowhere_else():
    # Classes 1 and 2 change places: an exact tie of the mean.
    original, fixed = torch.tensor([[0.0, 1, 2]]), torch.tensor([[0.0, 2, 1]])
    assert of(Vote).combined([original, fixed]).argmax() == 2
    assert of(Vote).combined([fixed, original]).argmax() == 1
    nearly = fixed + torch.tensor([[0.0, 1e-4, 0]])
    assert of(Vote).combined([original, nearly]).argmax() == 1


@pytest.mark.parametrize("kind", [Vote, HardVote, lambda m, t: GeometricVote(m, t, [0.5, 0.5])])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_what_comes_out_are_finite_log_probabilities(kind, scale):
    generator = torch.Generator().manual_seed(0)
    out = of(kind, k=5).combined([scale * torch.randn(64, 5, generator=generator), torch.randn(64, 5)])
    assert out.dtype == torch.float32
    assert out.isfinite().all() and out.min() >= -27.64
    assert out.logsumexp(dim=-1).abs().max() <= 1e-5


def test_members_are_copies_that_do_not_train():
    member = nn.Linear(3, 3)
    model = Vote([member, member], Classification(3))
    before = copy.deepcopy(member.state_dict())
    with torch.no_grad():
        model.members[0].weight.zero_()
    assert torch.equal(member.weight, before["weight"])
    assert member.weight.requires_grad and not model.members[0].weight.requires_grad
    assert model.gradient == "exact" and model.surrogate is model
    hard = HardVote([member, member], Classification(3))
    assert hard.gradient == "surrogate" and isinstance(hard.surrogate, Vote)


def test_a_task_without_probabilities_has_no_combination():
    with pytest.raises(ValueError, match="no probabilities"):
        Vote([nn.Identity()] * 2, object())
