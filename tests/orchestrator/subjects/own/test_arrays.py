"""Arrays of the user's own: Keras' names, grey images without a channel axis, and what is no image."""

from pathlib import Path

import numpy as np
import pytest
from own_subjects import images, sizes, spec

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import resolve

LABELS = np.arange(90) % 3
GREY = {"n_channels": 1}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int64])
def test_grey_images_without_a_channel_axis_whatever_their_type(dtype: type, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=images()[..., 0].astype(dtype), y=LABELS)
    definition = resolve(spec("d.npz", arguments=GREY), base_dir=tmp_path)
    assert definition.input_shape == (1, 12, 12) and definition.facts().is_image


def test_channels_0_says_that_arrays_are_no_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=images()[..., 0] / 255, y=LABELS)
    given = spec("d.npz", channels=0, model="factories:mlp_of_sequences")
    assert resolve(given, base_dir=tmp_path).input_shape == (12, 12)
    with pytest.raises(UserError, match="'channels' can't be changed"):
        resolve({"name": "mine", "dataset": "digits", "channels": 0}, base_dir=tmp_path)


def test_arrays_as_keras_names_them(tmp_path: Path) -> None:
    arrays = {"x_train": images(60), "y_train": LABELS[:60], "x_test": images(30, seed=1), "y_test": LABELS[:30],
              "site_test": np.arange(30)}  # fmt: skip
    np.savez(tmp_path / "d.npz", **arrays)
    splits = {"train": {"from": "train", "share": 5}, "valid": {"from": "train"}, "repair": "test", "test": "test"}
    definition = resolve(spec("d.npz", splits=splits), base_dir=tmp_path)
    assert sizes(definition) == [50, 10, 15, 15]
    data = definition.load_data()
    assert (data.metadata["test"]["site"] % 3 == data.test.labels.numpy()).all()
    assert all(name.startswith("row ") and name.endswith("of 'x_test'") for name in data.repair_names)
    with pytest.raises(
        UserError, match=r"must have arrays 'images' and 'labels', or 'x' and 'y', but has site_test, x_t"
    ):
        resolve(spec("d.npz"), base_dir=tmp_path)


def test_channels_that_the_model_does_not_take(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=images(), y=LABELS)
    with pytest.raises(UserError, match=r"have 3 channels, but 1 are wanted by 'channels' or the model"):
        resolve(spec("d.npz", channels=1, arguments=GREY), base_dir=tmp_path)
