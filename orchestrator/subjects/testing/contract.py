"""What every subject promises; each check says, to the author of a subject, what is expected and what is there."""

import tempfile
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import torch
from ray import cloudpickle
from safetensors.torch import load_model, save_model

import fixers
from analysis.contract.errors import UserError
from fixers.testing import Case
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.reading.splits import SPLIT_NAMES
from orchestrator.subjects.subject import DataSource, ModelSource, SubjectData, SubjectDefinition

BATCH: Final = 4
MOST_BYTES: Final = 100_000
"""Of a definition on its way to a node."""


class NoDataError(UserError):
    """The data of the subject aren't on this machine, so that its promises about them can't be checked."""


class SubjectCase(Case):
    """A subject under test.

    Args:
        subject: its definition.
        data_root: folder or URI of datasets.
    """

    def __init__(self, subject: SubjectDefinition, data_root: DataRoot | None) -> None:
        super().__init__(subject.name)
        self.subject = subject
        self.data_root = data_root

    @cached_property
    def data(self) -> SubjectData:
        """Its four splits.

        Raises:
            NoDataError: they aren't here, with the reason.
        """
        try:
            return self.subject.load_data(self.data_root)
        except UserError as error:
            raise NoDataError(str(error)) from error


def test_it_says_what_it_is(case: SubjectCase) -> None:
    """A subject says what it is."""
    subject = case.subject
    case.expect(subject.n_classes >= 2, "has fewer than two classes")
    case.expect(0 < subject.epsilon < 1, f"has the epsilon {subject.epsilon}; its unit is that of pixels in [0, 1]")
    case.expect(len(subject.class_names) in (0, subject.n_classes), "names some of its classes; name all or none")
    case.expect(
        (subject.sensitive_groups is None) == (subject.sensitive_attribute is None),
        "has a sensitive attribute or names for its groups, but not both",
    )
    if subject.trains_original:
        case.expect(subject.recipe is not None, "has a model that is trained here and no recipe")


def test_it_travels_small(case: SubjectCase) -> None:
    """A definition goes to every node, so samples and weights stay in their files."""
    packed = cloudpickle.dumps(case.subject)
    case.expect(
        len(packed) < MOST_BYTES, f"takes {len(packed):,} bytes; keep samples and weights out of its definition"
    )
    case.expect(cloudpickle.loads(packed).key() == case.subject.key(), "has another key on another node")


def test_its_sources_say_what_they_need_of_a_machine(case: SubjectCase) -> None:
    """Its sources say what they need of a machine."""
    for source, protocol in ((case.subject.data, DataSource), (case.subject.model, ModelSource)):
        lacking = [name for name in vars(protocol) if not name.startswith("_") and not hasattr(source, name)]
        case.expect(not lacking, f"has a {type(source).__name__} without {', '.join(lacking)}; see {protocol.__name__}")
    files = {path: path for path in case.subject.model.files()}
    moved = case.subject.model.relocated(files)
    case.expect(moved == case.subject.model, "has a model source that is another one where its files stay")


def test_the_model_is_built_alike_each_time(case: SubjectCase) -> None:
    """The model is built alike each time, and nothing else moves."""
    moved = torch.get_rng_state()
    first, second = case.subject.build_model(), case.subject.build_model()
    case.expect(torch.equal(moved, torch.get_rng_state()), "moves torch's global generator when its model is built")
    case.expect(not first.training, "gives its model in training mode")
    for name, weight in first.state_dict().items():
        case.expect(torch.equal(weight, second.state_dict()[name]), f"has another '{name}' in each model it builds")
        case.expect(torch.isfinite(weight).all(), f"has NaN or infinite values in '{name}'")


def test_the_model_gives_a_logit_per_class_of_pixels(case: SubjectCase) -> None:
    """The model gives a logit per class, for each sample of any batch by itself."""
    subject, model = case.subject, case.subject.build_model()
    inputs = torch.rand(BATCH, *subject.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, alone = model(inputs), model(inputs[:1])
    case.expect(
        outputs.shape == (BATCH, subject.n_classes),
        f"gives outputs of shape {tuple(outputs.shape)} for {BATCH} samples of {subject.n_classes} classes",
    )
    case.expect(
        torch.allclose(outputs[:1], alone, rtol=1.3e-6, atol=1e-5),
        "gives outputs that depend on what else is in a batch",
    )
    for sums in (outputs.sum(dim=1), outputs.exp().sum(dim=1)):
        case.expect(
            not torch.allclose(sums, torch.ones(BATCH)),
            "gives shares instead of logits; cut the softmax off: approaches and attacks need logits",
        )
    case.expect(
        any(parameter.requires_grad for parameter in model.parameters()),
        "has no weights that are parameters, so none can be fixed",
    )


def test_weights_are_kept_and_found_again(case: SubjectCase) -> None:
    """Weights are kept and found again."""
    model = case.subject.build_model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_model(model, str(path))
        case.expect(not any(load_model(model, str(path))), "has weights or buffers outside its model's state")


def test_the_splits_are_disjoint_and_none_is_empty(case: SubjectCase) -> None:
    """The splits are disjoint, and none is empty."""
    contents = {}
    for name, split in case.data.splits().items():
        case.expect(len(split) > 0, f"has an empty {name} split")
        inputs = split.inputs(torch.arange(len(split)), torch.device("cpu")).flatten(1).numpy()
        contents[name] = {row.tobytes() for row in inputs}
    for first, second in combinations(SPLIT_NAMES, 2):
        case.expect(not contents[first] & contents[second], f"has inputs in {first} that are in {second}, too")


def test_inputs_are_pixels_and_labels_are_classes(case: SubjectCase) -> None:
    """Inputs are pixels, and labels are classes."""
    for name, split in case.data.splits().items():
        batch = split.select(torch.arange(min(32, len(split)))).batch()
        case.expect(batch.inputs.dtype == torch.float32, f"has inputs of {batch.inputs.dtype} in {name}")
        case.expect(
            batch.inputs.shape[1:] == case.subject.input_shape, f"has inputs of another shape in {name} than it says"
        )
        if len(case.subject.input_shape) == 3:
            low, high = batch.inputs.aminmax()
            case.expect(0 <= low <= high <= 1, f"has inputs in {name} that aren't pixels in [0, 1]")
        case.expect(split.labels.dtype == torch.int64, f"has labels of {split.labels.dtype} in {name}")
        case.expect(split.labels.max() < case.subject.n_classes, f"has a label in {name} that is none of its classes")


def test_classes_are_spread_alike_where_splits_share_a_pool(case: SubjectCase) -> None:
    """The repair and the test split come from one distribution."""
    splits = case.data.splits()
    repair, test = (
        np.bincount(splits[name].labels.numpy(), minlength=case.subject.n_classes) / len(splits[name])
        for name in ("repair", "test")
    )
    case.expect(
        abs(repair - test).max() <= 1 / min(len(splits["repair"]), len(splits["test"])) + 0.02,
        "spreads classes differently over the two; stratify them (orchestrator.subjects.reading.splits does)",
    )


def test_reading_again_gives_the_same(case: SubjectCase) -> None:
    """Reading again gives the same."""
    data = case.data
    again = case.subject.load_data(case.data_root)
    case.expect(again.split_hash == data.split_hash, "gives other samples or another order; draw with a seed")
    case.expect(again.description == data.description, "describes its data in another way")


def test_groups_and_metadata_belong_to_the_samples(case: SubjectCase) -> None:
    """Groups and metadata belong to the samples."""
    data, attribute = case.data, case.subject.sensitive_attribute
    case.expect((data.test_groups is None) == (attribute is None), "has a sensitive attribute or groups, but not both")
    if data.test_groups is not None:
        case.expect(data.test_groups.shape == (len(data.test),), "has another number of groups than of test samples")
        case.expect(
            set(data.test_groups.tolist()) == {0, 1}, "lacks one of two groups in test, so that AAOD can't be measured"
        )
    for name, columns in data.metadata.items():
        for column, values in columns.items():
            case.expect(
                len(values) == len(data.splits()[name]),
                f"has another number of values of {column} than of {name} samples",
            )


def test_every_approach_can_say_whether_it_applies(case: SubjectCase) -> None:
    """Every approach can say whether it applies, and one does."""
    facts = case.subject.facts(data=case.data)
    applies = [cls.unmet(facts) is None for cls in fixers.all_fixers().values()]
    case.expect(any(applies), "meets the requirements of no approach; are there layers with weights?")


def test_a_missing_dataset_is_one_sentence(case: SubjectCase) -> None:
    """Data that aren't there are said in one sentence, with what to put where."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            case.subject.load_data(Path(folder))
        except UserError as error:
            told = str(error)
            case.expect("\n" not in told, f"says more than a sentence: {told}")
            case.expect(folder in told or "/" in told, f"names no place: {told}")
