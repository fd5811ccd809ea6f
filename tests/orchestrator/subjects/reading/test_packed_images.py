"""Parquet images that don't fit into memory: on disk, made once, whole or not at all, the same on every node."""

import io
import os
import pickle  # noqa: TID251 (what Ray does to a split)
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from analysis.contract.errors import UserError
from orchestrator.cluster.presence import NodeLacksImagesError, check_images
from orchestrator.subjects.own.data import OwnData
from orchestrator.subjects.reading.images import ImageFormat, UnreadableImageError
from orchestrator.subjects.reading.packed_images import PackedImages
from orchestrator.subjects.reading.parquet import ParquetImages, read_parquet
from orchestrator.subjects.reading.roots import CACHE_VARIABLE
from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.reading.streaming import StreamedImages, StreamedSplit, image_samples

FORM = ImageFormat((3, 16, 16))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed images are."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def write(path: Path, n: int = 40, seed: int = 0, side: int = 16, copies: int = 1) -> Path:
    encoded = []
    for pixels in np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    table = pa.table({"image": encoded * copies, "label": [i % 2 for i in range(n * copies)]})
    # In one row group, but not in pages of a thousand images, one of which would be in memory.
    pq.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=32)
    return path


def parquet(*paths: Path) -> ParquetImages:
    return read_parquet(paths, None, "label").images


def all_of(images: PackedImages) -> list[bytes]:
    return [images.fetch(i) for i in range(len(images))]


def streamed(images: PackedImages) -> StreamedSplit:
    split = StreamedImages(images, FORM).split(np.arange(len(images)), np.arange(3, len(images), 2))
    assert isinstance(split, StreamedSplit)
    return split


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def names(folder: Path) -> list[str]:
    """Files of the folder but locks, which stay."""
    return sorted(path.suffix for path in folder.iterdir() if path.suffix != ".lock")


def process(script: str, *arguments: object, cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SCRIPT + script, *map(str, arguments)]
    environment = os.environ | {CACHE_VARIABLE: str(cache)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def answer(process: "subprocess.Popen[str]") -> list[str]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.split()


SCRIPT = """
import hashlib, pickle, sys, time
from pathlib import Path
import numpy as np
from orchestrator.subjects.reading import parquet
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.parquet import ParquetImages, read_parquet
from orchestrator.subjects.reading.streaming import image_samples

parquet.IMAGES_AT_ONCE = 4
images = read_parquet([Path(sys.argv[1])], None, "label").images
as_they_are = ParquetImages.pieces

def slowly(self):
    print("reads", flush=True)
    for piece in as_they_are(self):
        yield piece
        time.sleep(0.2)

def said(images):
    return hashlib.sha256(b"".join(images.fetch(i) for i in range(len(images)))).hexdigest()
"""


def test_a_subject_is_the_same_whether_its_images_fit_into_memory_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    source = OwnData(write(tmp_path / "x.parquet"), SplitPlan(*[("", 0.25)] * 4))
    memory = source.load(None, None)
    assert not folder.exists()
    monkeypatch.setattr(image_samples, "__defaults__", (1,))
    disk = source.load(None, None)
    assert names(folder) == [".images"]
    for name, here in memory.splits().items():
        there = disk.splits()[name]
        assert isinstance(there, StreamedSplit)
        assert torch.equal(here.batch().inputs, there.batch().inputs) and torch.equal(here.labels, there.labels)
    assert source.load(None, None).split_hash == disk.split_hash


def test_an_image_of_several_files_is_called_by_its_own_file_and_row(tmp_path: Path) -> None:
    images = parquet(write(tmp_path / "a.parquet", 5), write(tmp_path / "b.parquet", 7, seed=1)).packed()
    assert [images.name(i) for i in (0, 4, 5, 11)] == [
        "in row 0 of a.parquet", "in row 4 of a.parquet", "in row 0 of b.parquet", "in row 6 of b.parquet",
    ]  # fmt: skip
    assert images.take(np.array([9])).name(0) == "in row 4 of b.parquet"


MEASURE = """
def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)

def worked_with(path):
    parquet.IMAGES_AT_ONCE = 32
    rows = read_parquet([Path(path)], None, "label")
    samples = image_samples(rows.images, ImageFormat((3, 96, 96)), in_memory_bytes=1)
    assert len(set(samples.digests().tolist())) == 400
    split = pickle.loads(pickle.dumps(samples.split(rows.labels, np.arange(1, len(rows.labels)))))
    for batch in split.batches(100):
        batch.inputs.sum()

worked_with(sys.argv[1])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
worked_with(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_holds_no_more_of_large_data_than_of_small(tmp_path: Path, folder: Path) -> None:
    """110 MB in one row group, of which the images in memory would be as much."""
    small = write(tmp_path / "small.parquet", 400, side=96)
    large = write(tmp_path / "large.parquet", 400, side=96, copies=10)
    (more,) = map(int, answer(process(MEASURE, small, large, cache=folder.parent)))  # KiB
    assert more * 1024 < 0.4 * large.stat().st_size


def test_a_split_is_read_where_the_cache_is_another(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "x.parquet")
    split = streamed(parquet(path).packed())
    pickled = tmp_path / "split.pickle"
    for state in (split, split.select(torch.arange(len(split)))):
        assert len(state.batch().inputs) == 19
        pickled.write_bytes(pickle.dumps(state))
        assert len(pickled.read_bytes()) < 5000
    there = process(
        "split = pickle.loads(Path(sys.argv[2]).read_bytes()); print(split.batch().inputs.double().sum().item())",
        path, pickled, cache=tmp_path / "other",
    )  # fmt: skip
    assert float(answer(there)[0]) == split.batch().inputs.double().sum().item()
    assert names(tmp_path / "other" / "images") == names(folder) == [".images"]


def test_one_process_makes_the_file_while_another_waits(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "x.parquet")
    both = [
        process("ParquetImages.pieces = slowly; print(said(images.packed()))", path, cache=folder.parent) for _ in "12"
    ]
    first, second = sorted(map(answer, both), key=len)
    assert second[0] == "reads" and first == second[1:]
    assert names(folder) == [".images"]


def test_a_process_killed_while_writing_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "x.parquet")
    half = process("ParquetImages.pieces = slowly; images.packed()", path, cache=folder.parent)
    assert half.stdout is not None and half.stdout.readline() == "reads\n"
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    half.kill()
    half.communicate()
    assert names(folder) == [".part"]
    assert all_of(parquet(path).packed()) == [image for piece in parquet(path).pieces() for image in piece.images]
    assert names(folder) == [".images"]


@pytest.mark.parametrize("harm", ["empty", "short", "no index", "in the index", "a gap", "foreign", "zeros at its end"])
def test_a_damaged_file_is_made_anew(harm: str, tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "x.parquet")
    images = parquet(path).packed()
    expected, before = all_of(images), next(folder.glob("*.images"))
    digests = [images.digest(i) for i in range(40)]
    content = before.read_bytes()
    if harm == "foreign":
        parquet(write(tmp_path / "y.parquet", seed=1)).packed()
        content = next(each for each in folder.glob("*.images") if each != before).read_bytes()
    harmed = {
        "empty": b"", "short": content[:-5], "no index": content[:200], "foreign": content,
        "in the index": content[:-70] + b"!" + content[-69:], "a gap": content[:300] + content[400:],
        "zeros at its end": content[:-300] + bytes(300),
    }  # fmt: skip
    before.write_bytes(harmed[harm])
    again = parquet(path).packed()
    assert all_of(again) == expected and [again.digest(i) for i in range(40)] == digests
    before.write_bytes(harmed[harm])
    assert all_of(sent(images)) == expected


def test_a_file_cut_short_while_it_is_in_use_is_named(tmp_path: Path, folder: Path) -> None:
    images = parquet(write(tmp_path / "x.parquet")).packed()
    assert images.fetch(39)
    os.truncate(next(folder.glob("*.images")), 1000)
    with pytest.raises(UnreadableImageError, match=r"in row 39 of x\.parquet can't be read: .*\.images was cut short"):
        images.fetch(39)


def test_images_that_changed_are_packed_again_and_old_splits_refuse_them(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "x.parquet")
    before = parquet(path).packed()
    in_use, expected = parquet(path).packed(), all_of(before)
    assert in_use.fetch(1) == expected[1]
    write(path, seed=1)
    after = parquet(path).packed()
    assert len(list(folder.glob("*.images"))) == 1
    assert not set(all_of(after)) & set(expected)
    assert all_of(in_use) == expected, "who has it open keeps it"
    with pytest.raises(UserError, match=r"The images in .* are others than those that the subject was loaded from"):
        sent(before).ready()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", 400, side=64)
    monkeypatch.setenv(CACHE_VARIABLE, str(small_disk))
    expected = (
        r"^The images in .* can't be laid into the cache folder .*small/images \(No space left on device\), where "
    )
    with pytest.raises(UserError, match=expected + r"they take about \d\.\d GB; .* in FIXSTUDY_CACHE\.$"):
        parquet(path).packed()
    assert names(small_disk / "images") == []


def test_a_node_makes_its_file_before_a_trial_or_says_why_it_cannot(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "x.parquet")
    split = streamed(parquet(path).packed())
    subject = SimpleNamespace(data=SimpleNamespace(splits=lambda: {"test": split}), definition=None)
    next(folder.glob("*.images")).unlink()
    check_images(subject, None)
    assert names(folder) == [".images"]
    path.unlink()
    split = sent(split)
    with pytest.raises(NodeLacksImagesError, match=r"On node .*: .*x\.parquet.* can't be opened \(No such file"):
        check_images(subject, None)
