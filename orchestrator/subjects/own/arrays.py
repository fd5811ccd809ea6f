"""Arrays of the user's own: which of them are the inputs and labels of a part, and what makes images of them."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.labels import Labels, read_labels

INPUT_KEYS: Final = ("images", "inputs", "x", "X")
LABEL_KEYS: Final = ("labels", "label", "y", "Y")


class ArrayPart(NamedTuple):
    """Arrays of one part."""

    inputs: npt.NDArray[Any]
    """(N, ...) uint8 or float32; of images (N, C, H, W)."""
    labels: Labels
    columns: dict[str, npt.NDArray[Any]]
    """All others of the part that have a value per sample."""
    name: str
    """Of the inputs' array."""


def array_part(content: Mapping[str, npt.NDArray[Any]], part: str, where: str, channels: int | None) -> ArrayPart:
    """A part: ``images`` and ``labels``, ``train_images`` and ``train_labels``, or, as Keras does, ``x_train``.

    Args:
        content: all arrays.
        part: name of the part; empty where all is one.
        where: names the arrays in errors.
        channels: of the images, 0 where inputs are none; as they come when not given.

    Raises:
        UserError: there are no inputs or labels of this part, or they can't be used.
    """
    found = dict(content)
    if part:
        found = {
            key.removeprefix(f"{part}_").removesuffix(f"_{part}"): value
            for key, value in content.items()
            if key.startswith(f"{part}_") or key.endswith(f"_{part}")
        }
    inputs = next((key for key in INPUT_KEYS if key in found), None)
    labels = next((key for key in LABEL_KEYS if key in found), None)
    if inputs is None or labels is None:
        prefix = f"{part}_" if part else ""
        raise UserError(
            f"{where} must have arrays '{prefix}images' and '{prefix}labels', or 'x{part and f'_{part}'}' and "
            f"'y{part and f'_{part}'}', but has {', '.join(sorted(content))}."
        )
    columns = {
        key: value
        for key, value in found.items()
        if key not in INPUT_KEYS and key not in LABEL_KEYS and value.shape == found[inputs].shape[:1]
    }
    return ArrayPart(
        _as_inputs(found[inputs], where, channels),
        read_labels(found[labels], f"'{labels}'{part and f' of {part}'} of {where}"),
        columns,
        next((key for key, value in content.items() if value is found[inputs]), inputs),
    )


def _as_inputs(inputs: npt.NDArray[Any], where: str, channels: int | None) -> npt.NDArray[Any]:
    """Arrays (N, ...) as a model takes them: uint8 or float32, images with the channels in front."""
    if inputs.dtype != np.uint8:
        if inputs.dtype.kind not in "fiu":
            raise UserError(f"Inputs must be numbers, but those of {where} are of type {inputs.dtype}.")
        inputs = inputs.astype(np.float32)
    if channels == 0:
        return np.ascontiguousarray(inputs)
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    elif inputs.ndim == 4 and inputs.shape[3] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = np.moveaxis(inputs, 3, 1)
    if channels is not None and inputs.ndim == 4 and inputs.shape[1] != channels:
        raise UserError(
            f"The images of {where} have {inputs.shape[1]} channels, but {channels} are wanted by 'channels' or the "
            "model; convert them."
        )
    return np.ascontiguousarray(inputs)
