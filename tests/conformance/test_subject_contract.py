"""What every subject promises: those of the catalogue, or yours (``--subject my_subject.yaml``).

Data that aren't on this machine are skipped, visibly; what the definition says of itself is tested anyway.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_model, save_model

import fixers
from orchestrator.base.errors import UserError
from orchestrator.subjects.reading.splits import SPLIT_NAMES
from orchestrator.subjects.subject import DataSource, ModelSource, SubjectData, SubjectDefinition

BATCH = 4


@pytest.fixture(scope="session")
def data(subject: SubjectDefinition, data_root_if_any: Path | None) -> SubjectData:
    """A small version of the subject, if its data are here."""
    try:
        return subject.load_data(data_root_if_any)
    except UserError as error:
        pytest.skip(str(error))


def test_it_says_what_it_is(subject: SubjectDefinition) -> None:
    assert subject.n_classes >= 2, "a subject has at least two classes"
    assert 0 < subject.epsilon < 1, "epsilon is in units of the input: pixels in [0, 1]"
    assert len(subject.class_names) in (0, subject.n_classes), "name every class or none"
    assert (subject.sensitive_groups is None) == (subject.sensitive_attribute is None), "name both groups"
    if subject.trains_original:
        assert subject.recipe is not None, "a model that is trained here needs a recipe"


def test_it_travels_small(subject: SubjectDefinition) -> None:
    packed = cloudpickle.dumps(subject)
    assert len(packed) < 100_000, "a definition goes to every node; samples and weights stay in their files"
    assert cloudpickle.loads(packed).key() == subject.key(), "the same definition has the same key everywhere"


def test_its_sources_say_what_they_need_of_a_machine(subject: SubjectDefinition) -> None:
    for source, protocol in ((subject.data, DataSource), (subject.model, ModelSource)):
        lacking = [name for name in vars(protocol) if not name.startswith("_") and not hasattr(source, name)]
        assert not lacking, f"{type(source).__name__} has no {', '.join(lacking)}; see {protocol.__name__}"
    files = {path: path for path in subject.model.files()}
    assert subject.model.relocated(files) == subject.model, "where its files stay, a source stays what it is"


def test_the_model_is_built_alike_each_time(subject: SubjectDefinition) -> None:
    moved = torch.get_rng_state()
    first, second = subject.build_model(), subject.build_model()
    assert torch.equal(moved, torch.get_rng_state()), "building a model leaves torch's global generator alone"
    assert not first.training, "the model comes in eval mode"
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), f"'{name}' differs between two builds"
        assert torch.isfinite(weight).all(), f"'{name}' has NaN or infinite values"


def test_the_model_gives_a_logit_per_class_of_pixels(subject: SubjectDefinition) -> None:
    model = subject.build_model()
    inputs = torch.rand(BATCH, *subject.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, alone = model(inputs), model(inputs[:1])
    assert outputs.shape == (BATCH, subject.n_classes), "outputs are (batch, classes), for any batch"
    torch.testing.assert_close(outputs[:1], alone, msg="an output depends on what else is in the batch")
    for sums in (outputs.sum(dim=1), outputs.exp().sum(dim=1)):
        assert not torch.allclose(sums, torch.ones(BATCH)), "cut the softmax off: approaches and attacks need logits"
    assert any(parameter.requires_grad for parameter in model.parameters()), (
        "weights are parameters, or none can be fixed"
    )


def test_weights_are_kept_and_found_again(subject: SubjectDefinition, tmp_path: Path) -> None:
    model, path = subject.build_model(), tmp_path / "weights.safetensors"
    save_model(model, str(path))
    assert load_model(model, str(path)) == (set(), []), "every weight and buffer is in the model's state"


def test_the_splits_are_disjoint_and_none_is_empty(subject: SubjectDefinition, data: SubjectData) -> None:
    contents = {}
    for name, split in data.splits().items():
        assert len(split) > 0, f"the {name} split is empty"
        inputs = split.inputs(torch.arange(len(split)), torch.device("cpu")).flatten(1).numpy()
        contents[name] = {row.tobytes() for row in inputs}
    for first, second in combinations(SPLIT_NAMES, 2):
        assert not contents[first] & contents[second], f"{first} and {second} share inputs: test must stay unseen"


def test_inputs_are_pixels_and_labels_are_classes(subject: SubjectDefinition, data: SubjectData) -> None:
    for name, split in data.splits().items():
        batch = split.select(torch.arange(min(32, len(split)))).batch()
        assert batch.inputs.dtype == torch.float32
        assert batch.inputs.shape[1:] == subject.input_shape
        if len(subject.input_shape) == 3:
            assert 0 <= batch.inputs.min() <= batch.inputs.max() <= 1, f"inputs of {name} aren't pixels in [0, 1]"
        assert split.labels.dtype == torch.int64
        assert split.labels.max() < subject.n_classes


def test_classes_are_spread_alike_where_splits_share_a_pool(subject: SubjectDefinition, data: SubjectData) -> None:
    shares = {
        name: np.bincount(split.labels.numpy(), minlength=subject.n_classes) / len(split)
        for name, split in data.splits().items()
    }
    assert abs(shares["repair"] - shares["test"]).max() <= 1 / min(len(data.repair), len(data.test)) + 0.02, (
        "repair and test come from one distribution; stratify them (orchestrator.subjects.reading.splits does)"
    )


def test_reading_again_gives_the_same(
    subject: SubjectDefinition, data: SubjectData, data_root_if_any: Path | None
) -> None:
    again = subject.load_data(data_root_if_any)
    assert again.split_hash == data.split_hash, "samples or their order differ between two readings; draw with a seed"
    assert again.description == data.description


def test_groups_and_metadata_belong_to_the_samples(subject: SubjectDefinition, data: SubjectData) -> None:
    assert (data.test_groups is None) == (subject.sensitive_attribute is None), "a sensitive attribute has groups"
    if data.test_groups is not None:
        assert data.test_groups.shape == (len(data.test),)
        assert set(data.test_groups.tolist()) == {0, 1}, "both groups occur in test, or AAOD can't be measured"
    for name, columns in data.metadata.items():
        for column, values in columns.items():
            assert len(values) == len(data.splits()[name]), f"{column} of {name} has another length"


def test_every_approach_can_say_whether_it_applies(subject: SubjectDefinition, data: SubjectData) -> None:
    facts = subject.facts(data=data)
    applies = {name: cls.unmet(facts) is None for name, cls in fixers.all_fixers().items()}
    assert any(applies.values()), "no approach applies: are there layers with weights?"


def test_a_missing_dataset_is_one_sentence(subject: SubjectDefinition, tmp_path: Path) -> None:
    try:
        subject.load_data(tmp_path)
    except UserError as error:
        assert "\n" not in str(error), "one sentence"
        assert str(tmp_path) in str(error) or "/" in str(error), "say what to put where"
