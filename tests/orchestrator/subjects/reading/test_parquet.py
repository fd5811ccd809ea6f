"""Parquet files with images: read piece by piece, the same images however they are laid out, bad ones by name."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from analysis.contract.errors import UserError
from orchestrator.subjects.reading import parquet
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.parquet import ParquetImages, read_parquet
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.streaming import StreamedImages, image_samples

FORM = ImageFormat((3, 16, 16))


def noise(n: int, side: int = 16) -> tuple[np.ndarray, list[bytes]]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return pixels.transpose(0, 3, 1, 2), encoded


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "IMAGES_AT_ONCE", 4)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "hugging_face"])
@pytest.mark.parametrize("rows_per_group", [3, 100])
def test_the_same_images_however_they_are_laid_out(kind: str, rows_per_group: int, tmp_path: Path) -> None:
    pixels, encoded = noise(23)
    cells = [{"path": "x.png", "bytes": image} for image in encoded] if kind == "hugging_face" else encoded
    types = {"binary": pa.binary(), "large_binary": pa.large_binary(), "hugging_face": None}
    # The columns have other names in the second file, and the images of each are found by their type.
    for name, start, stop, column in (("a", 0, 14, "image"), ("b", 14, 23, "picture")):
        table = pa.table({"label": range(start, stop), column: pa.array(cells[start:stop], types[kind])})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=rows_per_group)
    rows = read_parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"], None, "label")
    assert isinstance(rows.images, ParquetImages)
    assert rows.labels.values.tolist() == list(range(23)) and len(rows.images) == 23
    assert [len(piece) for piece in rows.images.pieces()] == ([4, 4, 4, 2, 4, 4, 1])
    some = rows.images.some(10)
    assert some.fetch(0) == encoded[0] and {some.fetch(i) for i in range(len(some))} <= set(encoded)
    memory, stream = image_samples(rows.images, FORM), image_samples(rows.images, FORM, in_memory_bytes=1)
    assert isinstance(memory, ArraySamples) and (memory.array == pixels).all()
    assert isinstance(stream, StreamedImages)
    chosen = np.array([22, 3, 14])
    inputs = stream.split(rows.labels.values, chosen).batch().inputs
    assert torch.equal(inputs, torch.from_numpy(pixels[chosen]).float() / 255)


def test_what_is_no_image_is_named_and_all_of_it_counted(tmp_path: Path) -> None:
    encoded = noise(12)[1]
    for i in (5, 7, 10):
        encoded[i] = b"no picture"
    for name, part in (("a", encoded[:3]), ("b", encoded[3:])):
        pq.write_table(pa.table({"image": part, "label": [0] * len(part)}), tmp_path / f"{name}.parquet")
    rows = read_parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"], "image", "label")
    with pytest.raises(UserError, match=r"in row 2 of b\.parquet can't be read .* 2 more can't be used either"):
        image_samples(rows.images, FORM)
    pq.write_table(pa.table({"image": [*encoded[:2], None], "label": [0, 1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet has rows without an image"):
        image_samples(read_parquet([tmp_path / "c.parquet"], None, "label").images, FORM)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"image": noise(40)[1], "label": [0] * 40}), path, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(2000) + whole[2200:])
    with pytest.raises(UserError, match=r"d\.parquet can't be read as Parquet|in row \d+ of d\.parquet can't be read"):
        image_samples(read_parquet([path], None, "label").images, FORM)
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"d\.parquet can't be read as Parquet"):
        read_parquet([path], None, "label")


MEASURE = """
import sys
from pathlib import Path
import pyarrow.parquet
from PIL import Image
from orchestrator.subjects.own.data import OwnData
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.parquet import read_parquet
from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.reading.streaming import image_samples

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

data = OwnData(Path(sys.argv[1]), SplitPlan(*[("", 0.25)] * 4))
assert data.described().input_shape == (3, 96, 96)
warm = image_samples(read_parquet([Path(sys.argv[2])], None, "label").images, ImageFormat((3, 96, 96)))
del warm
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
data.described()
shape = status("VmHWM") - before
samples = image_samples(read_parquet([Path(sys.argv[1])], None, "label").images, ImageFormat((3, 96, 96)))
print(shape, status("VmHWM") - before, samples.array.nbytes // 1024)
"""


@pytest.mark.slow
def test_memory_holds_the_decoded_images_and_little_else(tmp_path: Path) -> None:
    """One row group of 110 MB, which read whole would be there three times beside the images made of it."""
    encoded = noise(400, side=96)[1]
    for name, copies in (("large", 10), ("small", 1)):
        table = pa.table({"image": encoded * copies, "label": [0] * len(encoded) * copies})
        pq.write_table(
            table, tmp_path / f"{name}.parquet", row_group_size=10**6, compression="none", use_dictionary=False
        )
    paths = [str(tmp_path / f"{name}.parquet") for name in ("large", "small")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for_shape, peak, decoded = map(int, done.stdout.split())  # KiB
    assert (tmp_path / "large.parquet").stat().st_size > 1000 * decoded
    assert for_shape < 0.4 * decoded
    assert peak < 1.5 * decoded
