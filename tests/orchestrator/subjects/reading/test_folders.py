"""Folders as people have them: hidden files, other suffixes, links, pipes and pointers."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from own_subjects import images, png, sizes, spec, write_folder

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.reading.folders import class_folders
from orchestrator.subjects.reading.formats import read_npz
from orchestrator.subjects.reading.parquet import read_parquet

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        "._0.png",
        "@eaDir/0.png/SYNOFILE_THUMB.jpg",
        "__MACOSX/._0.png",
        "Thumbs.db",
    ],
)
def test_what_systems_leave_is_skipped_at_every_depth(hidden: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    for parent in (tmp_path / "d", tmp_path / "d" / "a", tmp_path / "d" / "a" / "more"):
        (parent / hidden).parent.mkdir(parents=True, exist_ok=True)
        (parent / hidden).write_bytes(png(images(1)[0]))
    found = class_folders(tmp_path / "d")
    assert found.labels.names == ("a", "b", "c") and len(found.files) == 90
    assert found.left_out.remarks(tmp_path / "d") == () and found.left_out.n_hidden == 3


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    for name in ("a/1.gif", "a/2.GIF", "b/deep/3.heic", "b/4", "b/notes.txt", "c/5.npy"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"something")
    (tmp_path / "d" / "loose.png").write_bytes(png(images(1)[0]))
    remarks = resolve(spec("d"), base_dir=tmp_path).load_data().remarks
    assert len(remarks) == 2 and "(2 .gif, 1 without suffix, 1 .heic, 1 .npy): only .jpg" in remarks[0]
    assert remarks[1].startswith("1 pictures in ") and "lie in no class folder" in remarks[1]


def test_a_folder_with_nothing_but_other_pictures_says_so(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "d" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "a" / f"{i}.dcm").write_bytes(b"something")
    with pytest.raises(UserError, match=r"holds no images in class folders; .* were left out \(3 \.dcm\)"):
        resolve(spec("d"), base_dir=tmp_path)


def test_a_picture_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    os.mkfifo(tmp_path / "d" / "a" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is no file but a named pipe; give a file"):
        resolve(spec("d"), base_dir=tmp_path)


@pytest.mark.parametrize("name", ["d.npz", "d.parquet", "d.csv", "model.onnx", "w.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "pointer", "broken link", "folder"])
def test_what_is_no_file_is_refused_wherever_one_is_expected(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 characters
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    elif kind == "pointer":
        Path(name).write_bytes(POINTER)
    elif kind == "broken link":
        Path(name).symlink_to("../objects/ab")
    else:
        Path(name).mkdir()
    np.savez("good.npz", images=images(), labels=np.arange(90) % 3)
    given = {
        "model.onnx": spec("good.npz", model=name),
        "w.safetensors": spec("good.npz", weights=name),
    }.get(name, spec(name))
    said = {
        "pipe": "is no file but a named pipe", "socket": "is no file but a socket", "folder": "folder|no images",
        "pointer": "is a pointer of Git LFS and not the file itself; fetch it with git lfs pull",
        "broken link": r"is a link to \.\./objects/ab, which isn't there; fetch its content",
    }[kind]  # fmt: skip
    with pytest.raises(UserError, match=said):
        resolve(given, base_dir=tmp_path)


def test_a_picture_that_is_a_pointer_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    (tmp_path / "d" / "b" / "1.png").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"1\.png is a pointer of Git LFS .* git lfs pull"):
        resolve(spec("d"), base_dir=tmp_path).load_data()


def test_links_of_a_cache_count_by_their_own_names(tmp_path: Path) -> None:
    """The Hugging Face cache, DVC and git-annex: a blob's name says nothing of what it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from factories import convnet

    from orchestrator.subjects import weights
    from orchestrator.subjects.onnx.exporting import export_onnx

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    export_onnx(convnet().eval(), tmp_path / "model.onnx", input_shape=(3, 12, 12))
    weights.write_state(tmp_path / "w.safetensors", convnet().state_dict())
    np.savez(tmp_path / "d.npz", images=images(), labels=np.arange(90) % 3)
    pq.write_table(
        pa.table({"image": [png(one) for one in images()], "label": np.arange(90) % 3}), tmp_path / "d.parquet"
    )
    for i, name in enumerate(("model.onnx", "w.safetensors", "d.npz", "d.parquet")):
        (tmp_path / name).rename(blobs / f"{i}ab9f")
        (snapshot / name).symlink_to(f"../../blobs/{i}ab9f")
    for data, model in (
        ("d.npz", {"model": "snapshots/a1/model.onnx"}),
        ("d.parquet", {"weights": "snapshots/a1/w.safetensors"}),
    ):
        assert sum(sizes(resolve(spec(f"snapshots/a1/{data}", **model), base_dir=tmp_path))) == 90
    (tmp_path / "linked").symlink_to("snapshots/a1")
    assert sum(sizes(resolve(spec("linked/d.npz", model="linked/model.onnx"), base_dir=tmp_path))) == 90


def test_arrays_that_claim_more_than_there_is_are_one_sentence(tmp_path: Path) -> None:
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13, 3)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(64))
    with pytest.raises(UserError, match=r"d\.npz don't fit into memory|can't be read as npz"):
        read_npz(tmp_path / "d.npz")
    with pytest.raises(UserError, match="There is no file"):
        read_parquet([tmp_path / "e.parquet"], None, "label")
