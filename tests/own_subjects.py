"""A user's own pictures and the mappings of subjects on them, for the tests of own subjects."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from orchestrator.subjects.subject import SubjectDefinition

HERE = Path(__file__).parent / "orchestrator" / "subjects"
"""Where the module ``factories`` lies."""
FRACTIONS = {"train": 0.4, "valid": 0.2, "repair": 0.2, "test": 0.2}


def images(n: int = 90, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def spec(data: str, **more: Any) -> dict[str, Any]:
    return {"name": "mine", "model": "factories:convnet", "data": data, "splits": FRACTIONS, **more}


def sizes(definition: SubjectDefinition) -> list[int]:
    return [len(split) for split in definition.load_data().splits().values()]


def write_folder(folder: Path, n: int = 90) -> None:
    for i, pixels in enumerate(images(n)):
        target = folder / "abc"[i % 3]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{i}.png").write_bytes(png(pixels))
