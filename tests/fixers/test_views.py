import torch

from fixers.views import JoinedSplit, Relabelled


def test_a_joined_split_is_its_parts_one_after_the_other(digits):
    joined = JoinedSplit([digits["train"], digits["valid"], digits["repair"]])
    inputs = torch.cat([digits[name].batch().inputs for name in ("train", "valid", "repair")])
    labels = torch.cat([digits[name].labels for name in ("train", "valid", "repair")])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert torch.equal(joined.labels, labels)
    assert torch.equal(joined.inputs(order, torch.device("cpu")), inputs[order])
    selected = joined.select(order).select(labels[order] == 3)
    assert torch.equal(selected.batch().inputs, inputs[order][labels[order] == 3])
    assert torch.equal(selected.labels, torch.full((int((labels == 3).sum()),), 3))
    assert selected.shape == (1, 8, 8)


def test_an_empty_part_is_no_obstacle(digits):
    empty = digits["train"].select(torch.arange(0))
    joined = JoinedSplit([empty, digits["valid"], empty])
    assert torch.equal(joined.batch().inputs, digits["valid"].batch().inputs)


def test_a_selection_of_a_selection_shares_the_rows(digits):
    split, labels = digits["valid"], torch.arange(247) % 3
    relabelled = Relabelled(split, labels)
    assert len(relabelled.labels) == 247  # cached, and not to be taken over
    part = relabelled.select(labels == 1).select(torch.tensor([4, 0, 4]))
    rows = (labels == 1).nonzero().squeeze(1)[[4, 0, 4]]
    assert torch.equal(part.labels, labels[rows])
    assert torch.equal(part.batch().inputs, split.batch().inputs[rows])
    assert [batch.indices.tolist() for batch in part.batches(2)] == [[0, 1], [2]]
    assert len(relabelled) == 247
