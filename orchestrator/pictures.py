"""Small pictures of the test samples that a report shows: repaired by most, broken by most, repaired by none."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from orchestrator.store import Store
from orchestrator.subjects.subject import Subject

LARGEST_SIDE = 96
"""Pixels; larger images are scaled down. Small ones stay as they are, and the page scales them up."""


def wanted(results: str) -> dict[str, list[int]]:
    """Positions in the test split of the samples that the report shows, by subject.

    Args:
        results: folder or URI of the study.
    """
    import analysis

    samples: dict[str, list[int]] = {}
    with analysis.open(results, datasets=("trials", "predictions", "subjects")) as con:
        for row in analysis.run(con, "samples").to_pylist():
            samples.setdefault(row["subject"], []).append(row["sample_id"])
    return samples


def store_pictures(subject: Subject, samples: Sequence[int], store: Store) -> int:
    """Write those pictures that aren't there yet, as ``examples/<fingerprint>/<sample>.png``.

    Args:
        subject: loaded.
        samples: positions in its test split.
        store: of the study.

    Returns:
        How many were written; none where inputs aren't grey or RGB images.
    """
    folder = f"examples/{subject.fingerprint}"
    shape = subject.definition.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        return 0
    there = store.names(folder)
    missing = [sample for sample in samples if f"{sample}.png" not in there]
    for sample in missing:
        image = subject.data.test.inputs(torch.tensor([sample]), torch.device("cpu"))[0]
        store.write_bytes(f"{folder}/{sample}.png", png(image))
    return len(missing)


def png(image: Tensor) -> bytes:
    """An image (C, H, W), float in [0, 1], C 1 or 3, as a PNG file."""
    pixels: Any = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
