"""Streaming: the same pixels as in memory, never more than a batch decoded, bad images by name."""

import io
import pickle  # noqa: TID251 (what Ray does to a split)
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from orchestrator.subjects.reading.images import ImageFormat, Look, UnreadableImageError
from orchestrator.subjects.reading.parquet import ParquetImages, read_parquet
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.streaming import ImageFiles, StreamedImages, StreamedSplit, image_samples


def encoded(n: int = 12, side: int = 16, mode: str = "RGB") -> list[bytes]:
    generator = np.random.default_rng(0)
    result = []
    for _ in range(n):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
        result.append(buffer.getvalue())
    return result


def files(folder: Path, images: list[bytes]) -> ImageFiles:
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(image)
    return ImageFiles(folder, np.array([f"{i}.png".encode() for i in range(len(images))]))


def rows(folder: Path, images: list[bytes]) -> ParquetImages:
    pq.write_table(pa.table({"image": images, "label": [0] * len(images)}), folder / "x.parquet")
    return read_parquet([folder / "x.parquet"], None, "label").images


@pytest.mark.parametrize("kind", ["files", "parquet"])
def test_a_streamed_split_is_the_split_in_memory(kind: str, tmp_path: Path) -> None:
    images = encoded()
    source = files(tmp_path, images) if kind == "files" else rows(tmp_path, images)
    labels = np.arange(12) % 3
    form = ImageFormat((3, 16, 16))
    chosen = np.array([7, 1, 4, 11, 0])
    memory, stream = image_samples(source, form), image_samples(source, form, in_memory_bytes=1)
    assert isinstance(memory, ArraySamples) and isinstance(stream, StreamedImages)
    here, there = memory.split(labels, chosen), stream.split(labels, chosen)
    assert torch.equal(here.batch().inputs, there.batch().inputs)
    assert torch.equal(here.labels, there.labels)
    mask = torch.tensor([True, False, True, False, True])
    for some in (torch.tensor([3, 0]), mask):
        assert torch.equal(here.select(some).batch().inputs, there.select(some).batch().inputs)
    assert len(set(stream.digests().tolist())) == 12
    again = pickle.loads(pickle.dumps(there))  # noqa: S301
    assert torch.equal(again.batch().inputs, there.batch().inputs)


@pytest.mark.parametrize("suffix", ["bmp", "png"])
def test_images_that_agree_at_their_beginning_are_no_copies(suffix: str, tmp_path: Path) -> None:
    """Images of one shape are of one size where they aren't compressed."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    names = []
    for i in range(4):
        pixels = background.copy()
        # The middle of the file differs, then the beginning, then the end; the last is a copy.
        if i < 3:
            pixels[(64, 127, 0)[i]] = 7
        names.append(f"{i}.{suffix}")
        Image.fromarray(pixels).save(tmp_path / names[-1])
    (tmp_path / f"4.{suffix}").write_bytes((tmp_path / names[-1]).read_bytes())
    digests = ImageFiles(tmp_path, np.array([name.encode() for name in (*names, f"4.{suffix}")]))
    found = [digests.digest(i) for i in range(5)]
    assert len(set(found)) == 4
    assert found[3] == found[4]


def test_a_streamed_split_leads_to_its_own_images_only(tmp_path: Path) -> None:
    source = rows(tmp_path, encoded()).packed()
    split = StreamedImages(source, ImageFormat((3, 16, 16))).split(np.arange(12), np.array([3, 5]))
    assert isinstance(split, StreamedSplit)
    assert len(split._encoded) == 2 and len(split._all_labels) == 2
    assert split._encoded.fetch(1) == source.fetch(5)


def test_a_pickled_stream_has_its_arrays_out_of_band_and_no_images(tmp_path: Path) -> None:
    source = rows(tmp_path, encoded(50)).packed()
    split = StreamedImages(source, ImageFormat((3, 16, 16))).split(np.arange(50), np.arange(50))
    assert len(split.labels) == 50 and len(split.batch().inputs) == 50
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(split, protocol=5, buffer_callback=buffers.append)) < 2000
    places = 3 * 8 + 16
    assert sum(buffer.raw().nbytes for buffer in buffers) == 50 * (places + 2 * 8)


def test_grey_and_palette_images_become_what_the_model_takes() -> None:
    for mode in ("RGB", "L", "P", "RGBA"):
        image = encoded(1, mode=mode)[0]
        assert ImageFormat((3, 16, 16)).decode(image, "x").shape == (3, 16, 16)
        assert ImageFormat((1, 16, 16)).decode(image, "x").shape == (1, 16, 16)
    assert Look.at(encoded(1, mode="L")[0], "x").shape == (1, 16, 16)
    assert Look.at(encoded(1)[0], "x").shape == (3, 16, 16)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pixels_of_16_bits_are_scaled_by_their_range(form: str, order: str) -> None:
    deep = (RAMP.astype(np.uint16) * 257).astype(f"{order}u2")
    image = saved(Image.fromarray(deep), form)
    assert Look.at(image, "x").shape == (1, 16, 16)
    assert (ImageFormat((1, 16, 16)).decode(image, "x")[0] == RAMP).all()
    assert (ImageFormat((3, 16, 16)).decode(image, "x") == RAMP).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_no_known_range_are_refused(kind: type) -> None:
    with pytest.raises(UnreadableImageError, match="Image x has pixels of 32 bits, whose range nothing says"):
        ImageFormat((1, 16, 16)).decode(saved(Image.fromarray(RAMP.astype(kind)), "TIFF"), "x")


def test_grey_with_alpha_has_one_channel() -> None:
    image = saved(Image.fromarray(RAMP).convert("LA"), "PNG")
    assert Look.at(image, "x").shape == (1, 16, 16)
    assert (ImageFormat((1, 16, 16)).decode(image, "x")[0] == RAMP).all()


def test_a_photo_stands_upright() -> None:
    """Orientation 6: the camera was turned, and every viewer turns the picture back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = saved(Image.fromarray(RAMP[:8]), "PNG", exif=exif)
    assert Look.at(image, "x").shape == (1, 16, 8)
    assert (ImageFormat((1, 16, 8)).decode(image, "x")[0] == np.rot90(RAMP[:8], -1)).all()


def test_a_picture_that_is_a_program_is_not_opened(tmp_path: Path) -> None:
    """Pillow would hand EPS to Ghostscript, which runs it."""
    trace = tmp_path / "trace"
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n({trace}) (w) file closefile\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableImageError, match="in no known format"):
        ImageFormat((3, 16, 16)).decode(program.encode(), "x")
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", ["AVIF", "PNG", "TIFF", "WEBP", "JPEG", "GIF", "BMP", "QOI"])
def test_whatever_a_decoder_raises_is_one_sentence(form: str) -> None:
    """Files with bytes that were changed either decode or are named."""
    whole = saved(Image.fromarray(RAMP).convert("RGB"), form)
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 8):
            damaged[place] = generator.integers(0, 256)
        try:
            ImageFormat((3, 16, 16), "stretch").decode(bytes(damaged), "x")
        except UnreadableImageError as error:
            assert str(error).startswith("Image x ")


def test_other_sizes_are_refused_stretched_or_cropped() -> None:
    image = encoded(1, side=16)[0]
    with pytest.raises(UnreadableImageError, match=r"is 16x16 where 8x12 is expected; give size: \[8, 12\]"):
        ImageFormat((3, 8, 12)).decode(image, "x")
    assert ImageFormat((3, 8, 12), "stretch").decode(image, "x").shape == (3, 8, 12)
    # A frame of another colour is what a centre crop leaves away: 224 of 256 pixels remain.
    framed = np.full((256, 320, 3), 200, dtype=np.uint8)
    framed[:15], framed[-15:], framed[:, :40], framed[:, -40:] = 0, 0, 0, 0
    buffer = io.BytesIO()
    Image.fromarray(framed).save(buffer, "PNG")
    cropped = ImageFormat((3, 224, 224), "crop").decode(buffer.getvalue(), "x")
    assert cropped.shape == (3, 224, 224) and (cropped == 200).all()


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html>", None])
def test_what_is_no_image_is_named(content: bytes | None, tmp_path: Path) -> None:
    images = encoded(5)
    images[3] = images[3][:-400] if content is None else content
    form = ImageFormat((3, 16, 16))
    with pytest.raises(UnreadableImageError, match=r"in row 3 of x.parquet can't be read"):
        image_samples(rows(tmp_path, images), form)
    stream = image_samples(rows(tmp_path, images), form, in_memory_bytes=1)
    split = stream.split(np.zeros(5, dtype=np.int64), np.arange(5))
    assert len(split.inputs(torch.arange(3), torch.device("cpu"))) == 3
    with pytest.raises(UnreadableImageError, match="row 3"):
        split.batch()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    source = files(tmp_path, encoded(3))
    (tmp_path / "1.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"1\.png can't be read \(No such file"):
        image_samples(source, ImageFormat((3, 16, 16)))
