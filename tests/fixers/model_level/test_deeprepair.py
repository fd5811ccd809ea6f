import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fixers import DeadlineExceededError, RepairProblem, TensorSplit, TrainingRecipe, fix, get
from fixers.data import at_most_per_class
from fixers.images.augmentation import MORE_OPERATIONS, OPERATIONS, draw_chains
from fixers.images.consistency import jensen_shannon
from fixers.images.style import StyleTransfer
from fixers.model_level.deeprepair import STYLE, DeepRepair, StyledViews, style_references
from fixers.training.loop import train

QUICK = DeepRepair.build({"epochs": 3}, "quick")
CPU = torch.device("cpu")


def corrupted(pixels):
    """Out of focus, of little contrast, in a warm light: (N, 3, 8, 8) bytes."""
    blurred = functional.avg_pool2d(functional.pad(pixels.float() / 255, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = torch.tensor([0.25, 0.6, 0.9])[:, None, None]
    return ((0.95 - tint + tint * blurred * 0.6).clamp(0, 1) * 255).round().to(torch.uint8)


class ColourNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def corruption(digits):
    """Digits in colour; a tenth of the repair split, and a held-out copy, are corrupted."""

    def all_of(name):
        batch = digits[name].batch()
        return (batch.inputs.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8), batch.targets

    (repair, repair_labels), (held_out, held_labels) = all_of("repair"), all_of("held_out")
    pixels, labels = all_of("valid")
    learn, learn_labels = (
        torch.cat([repair[:450], all_of("train")[0]]),
        torch.cat([repair_labels[:450], all_of("train")[1]]),
    )
    bad = corrupted(repair[450:])
    splits = {
        "train": TensorSplit(learn, learn_labels),
        "valid": TensorSplit(pixels, labels),
        "repair": TensorSplit(torch.cat([repair[450:], bad]), repair_labels[450:].repeat(2)),
        "clean": TensorSplit(held_out, held_labels),
        "corrupted": TensorSplit(corrupted(held_out), held_labels),
    }
    recipe = TrainingRecipe(learning_rate=3e-3, batch_size=32, epochs=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ColourNet()
    given = {name: splits[name] for name in ("train", "valid", "repair")}
    problem = RepairProblem(model, **given, recipe=recipe)
    train(model, splits["train"], problem, epochs=20, generator=torch.Generator().manual_seed(0))
    return RepairProblem(model.eval(), **given, recipe=recipe), splits


def test_a_look_learned_from_failures_is_repaired_and_it_is_the_style_that_does_it(corruption):
    problem, splits = corruption
    before = {name: problem.score(problem.original, splits[name]) for name in ("clean", "corrupted")}
    after = {}
    for backend in ("haar_wct", "none"):
        fixer = dataclasses.replace(DeepRepair.build({}, "quick"), style_backend=backend)
        fixed = fix(fixer, problem)
        after[backend] = {name: problem.score(fixed, splits[name]) for name in before}
    print(before, after)
    gain = after["haar_wct"]["corrupted"] - before["corrupted"]
    assert gain > 0.10
    assert after["haar_wct"]["clean"] > before["clean"] - 0.01
    assert after["none"]["corrupted"] - before["corrupted"] < gain / 2


def planted(count, classes=3, seed=0):
    """Failures: two tight groups per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    bright = (torch.arange(count) // classes) % 2
    pixels = 0.1 + 0.6 * bright[:, None, None, None] + 0.05 * torch.rand(count, 1, 8, 8, generator=generator)
    return TensorSplit(pixels.float(), labels), bright


def test_references_are_one_different_failure_of_each_cluster(make_problem):
    failures, bright = planted(60)
    chosen, clusters = style_references(failures, 2, make_problem())
    assert len(chosen) == 6 and len(chosen.unique()) == 6
    assert clusters[chosen].tolist() == list(range(6))
    for cluster in range(6):
        members = (clusters == cluster).nonzero().squeeze(1)
        assert len(failures.labels[members].unique()) == 1
        assert len(bright[members].unique()) == 1
    assert torch.bincount(failures.labels[chosen]).tolist() == [2, 2, 2]


def test_classes_with_few_failures_are_clustered_together(make_problem):
    failures, _ = planted(60)
    few = failures.select(torch.cat([torch.arange(0, 60, 3), torch.tensor([1, 2, 4])]))
    chosen, clusters = style_references(few, 4, make_problem())
    own = few.labels == 0
    assert sorted(clusters[own].unique().tolist()) == [0, 1, 2, 3]
    assert sorted(clusters[~own].unique().tolist()) == [4, 5, 6]
    assert len(chosen.unique()) == 7


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=40), most=st.integers(0, 5))
def test_at_most_so_many_failures_of_a_class(labels, most):
    split = TensorSplit(torch.arange(len(labels)).float()[:, None], torch.tensor(labels))
    kept = at_most_per_class(split, most, torch.Generator().manual_seed(0))
    expected = torch.bincount(split.labels)
    assert torch.bincount(kept.labels).tolist() == (expected.clamp(max=most) if most else expected).tolist()
    positions = kept.batch().inputs[:, 0].long()
    assert (positions.diff() > 0).all()
    assert torch.equal(split.labels[positions], kept.labels)


def views_of(split, style, references, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return StyledViews(split, style, references, severity=1.0, width=3, generator=generator)


def test_a_styled_image_keeps_label_and_reference_wherever_it_is_in_a_batch(digits):
    """References of one brightness each: the views of an image are between it and its own reference."""
    train_split = digits["train"]
    levels = torch.tensor([0.0, 1.0])
    references = levels[:, None, None, None].expand(2, 1, 8, 8) * 1.0
    of_image = torch.arange(len(train_split)) % 2
    seen = {}

    class Watched(StyleTransfer):
        def __call__(self, contents, choice):
            for image, reference in zip(contents, choice, strict=True):
                seen.setdefault(image.numpy().tobytes(), set()).add(int(reference))
            return super().__call__(contents, choice)

    views = views_of(train_split, Watched(references), of_image)
    for batch in views.batches(16, generator=torch.Generator().manual_seed(5)):
        torch.testing.assert_close(batch.inputs[:, 0], train_split.inputs(batch.indices, CPU))
        assert torch.equal(batch.targets, train_split.labels[batch.indices])
        assert not torch.equal(batch.inputs[:, 1], batch.inputs[:, 2])
    part = views.select(torch.tensor([3, 8, 11]))
    part.inputs(torch.tensor([2, 0, 1]), CPU)
    assert len(seen) > 100
    by_image = {train_split.inputs(torch.tensor([i]), CPU)[0].numpy().tobytes(): int(of_image[i]) for i in range(150)}
    assert all(references == {by_image[image]} for image, references in seen.items())


def test_views_are_new_each_epoch_and_repeatable(digits):
    of_image = torch.zeros(len(digits["train"]), dtype=torch.int64)
    style = StyleTransfer(digits["valid"].batch().inputs[:1])
    epochs = []
    for seed in (0, 0, 1):
        views = views_of(digits["train"], style, of_image, seed)
        epochs.append([views.batch().inputs for _ in range(2)])
    assert not torch.equal(epochs[0][0], epochs[0][1])
    assert torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(epochs[0][0], epochs[2][0])


@pytest.mark.parametrize(("operations", "expected"), [("augmix", OPERATIONS), ("all", MORE_OPERATIONS)])
def test_chains_draw_from_the_chosen_operations(make_problem, monkeypatch, operations, expected):
    drawn = set()

    def watched(count, generator, **options):
        chains = draw_chains(count, generator, **options)
        drawn.update(chains.names[index] for index in chains.operations.unique().tolist() if index >= 0)
        return chains

    monkeypatch.setattr("fixers.model_level.deeprepair.draw_chains", watched)
    fix(DeepRepair.build({"epochs": 1, "operations": operations}, "quick"), make_problem())
    assert drawn == {*expected, STYLE}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 30))
def test_the_divergence_is_that_of_the_definition(seed, scale):
    outputs = scale * torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed))
    shares = outputs.double().softmax(dim=-1)
    centre = shares.mean(dim=1)
    expected = torch.stack(
        [(shares[:, view] * (shares[:, view].log() - centre.log())).nansum(dim=-1) for view in range(3)]
    ).mean(dim=0)
    found = jensen_shannon(outputs)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)
    assert (found >= -1e-6).all()
    same = outputs[:, :1].expand(-1, 3, -1)
    assert jensen_shannon(same).abs().max() < 1e-5


def test_without_consistency_the_loss_is_that_of_clean_images(make_problem, digits):
    problem = make_problem()
    views = views_of(digits["train"], None, torch.zeros(150, dtype=torch.int64)).batch()
    clean = problem.task.loss(problem.original(digits["train"].batch().inputs), views.targets, "sum")
    plain, consistent = (
        dataclasses.replace(QUICK, consistency=factor)._loss(problem.original, views, problem) for factor in (0.0, 12.0)
    )
    torch.testing.assert_close(plain, clean)
    assert consistent > clean + 0.1
    outputs = torch.stack([problem.original(views.inputs[:, view]) for view in range(3)], dim=1)
    torch.testing.assert_close(consistent, clean + 12 * jensen_shannon(outputs).sum())


def test_valid_only_selects(make_problem, digits, monkeypatch):
    """Other valid images change which epoch is chosen, and nothing that is trained on."""
    losses = []
    for valid in (digits["valid"], digits["held_out"]):
        seen = []
        fix(QUICK, make_problem(valid=valid, on_progress=lambda step, metrics, seen=seen: seen.append(metrics["loss"])))
        losses.append(seen)
    assert losses[0] == losses[1]


def test_the_best_epoch_on_valid_is_returned_and_it_stops_in_time(make_problem):
    scores, losses = [], []

    def watch(step, metrics):
        scores.append(metrics["valid_score"])
        losses.append(metrics["valid_loss"])

    problem = make_problem(on_progress=watch)
    fixer = DeepRepair(learning_rate=0.05, epochs=40, patience=2, batch_size=32)
    fixed = fix(fixer, problem)
    assert problem.score(fixed, problem.valid) == max(scores)
    assert len(scores) < 40
    assert min(losses) not in losses[-2:] and min(losses) == losses[-3]


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_a_fix_is_repeatable_and_leaves_the_original(name, request, make_problem):
    model = request.getfixturevalue(name)
    before = copy.deepcopy(model.state_dict())
    problems = [make_problem(model, seed=seed) for seed in (0, 0, 1)]
    state = torch.get_rng_state()
    one, same, other = (fix(QUICK, problem).state_dict() for problem in problems)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(before[key], problems[0].original.state_dict()[key]) for key in before)
    assert one.keys() == before.keys()


def test_smaller_micro_batches_give_the_same_result(make_problem):
    one, other = (fix(QUICK, make_problem(micro_batch=size)) for size in (512, 7))
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kept", ["none", "one", "all"])
def test_any_number_of_failures(kept, make_problem):
    problem = make_problem()
    rows = {"none": problem.passes, "one": problem.failures.select(torch.tensor([0])), "all": problem.failures}
    given = make_problem(repair=rows[kept])
    fixed = fix(dataclasses.replace(QUICK, epochs=1), given)
    unchanged = all(torch.equal(a, b) for a, b in zip(fixed.parameters(), given.original.parameters(), strict=True))
    assert unchanged == (kept == "none")
    assert given.notes.get("nothing_to_fix", False) == (kept == "none")
    if kept == "one":
        assert given.notes["style_references"] == 1


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(QUICK, make_problem(time_limit=-1.0))


def test_arrays_are_no_images():
    fixer = get("DR")
    assert fixer is DeepRepair
    assert {requirement.code for requirement in fixer.requirements} == {"image_input", "training_samples"}
