"""Tables with a row per sample: which column has the images, paths of pictures, and labels that aren't there."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from own_subjects import images, png, sizes, spec

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.parquet import read_parquet
from orchestrator.subjects.reading.streaming import image_samples

N = 12
LABELS = list(range(N))
CELLS = [png(one) for one in images(N)]


def read(tmp_path: Path, **columns: Any) -> Any:
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    rows = read_parquet([tmp_path / "d.parquet"], None, "label")
    assert (image_samples(rows.images, ImageFormat((3, 12, 12))).array == images(N).transpose(0, 3, 1, 2)).all()  # type: ignore[union-attr]
    return rows


def test_a_column_of_bytes_that_are_no_images_is_passed_over(tmp_path: Path) -> None:
    ids = [bytes([i] * 16) for i in range(N)]
    for name in ("img", "scan"):
        read(tmp_path, id=ids, **{name: CELLS}, label=LABELS)
    read(tmp_path, id=ids, thing=[{"bytes": cell, "path": None} for cell in CELLS], label=LABELS)


@pytest.mark.parametrize("kind", ["list", "large_binary", "binary_view"])
def test_images_in_lists_of_one_and_other_types(kind: str, tmp_path: Path) -> None:
    structs = [[{"bytes": cell, "path": None}] for cell in CELLS]
    column = pa.array(structs) if kind == "list" else pa.array(CELLS, getattr(pa, kind)())
    read(tmp_path, images=column, label=LABELS)
    if kind == "list":
        pq.write_table(pa.table({"images": [structs[0] * 2], "label": [0]}), tmp_path / "d.parquet")
        with pytest.raises(UserError, match=r"has rows with 2 images; a sample is one image"):
            image_samples(read_parquet([tmp_path / "d.parquet"], None, "label").images, ImageFormat((3, 12, 12)))


@pytest.mark.parametrize("kind", ["text", "struct", "csv", "tsv"])
def test_paths_of_pictures_beside_a_table(kind: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    paths = [f"pictures/Bild {i} ä.png" for i in range(N)]
    for path, cell in zip(paths, CELLS, strict=True):
        (tmp_path / path).write_bytes(cell)
    names = ["x.png"] * N
    if kind in ("text", "struct"):
        column = paths if kind == "text" else [{"bytes": None, "path": path} for path in paths]
        pq.write_table(pa.table({"note": names, "file_name": column, "label": LABELS}), tmp_path / "d.parquet")
        file = "d.parquet"
    else:
        file = f"d.{kind}"
        options = pa.csv.WriteOptions(delimiter="," if kind == "csv" else "\t")
        pa.csv.write_csv(pa.table({"note": names, "where": paths, "label": LABELS}), tmp_path / file, options)
    splits = {"train": 0.25, "valid": 0.25, "repair": 0.25, "test": 0.25}
    definition = resolve(spec(file, arguments={"n_classes": N}, splits=splits, metadata=["note"]), base_dir=tmp_path)
    data = definition.load_data()
    assert sum(sizes(definition)) == N and set(data.metadata["test"]["note"]) == {"x.png"}
    for name, label in zip(data.repair_names, data.repair.labels.tolist(), strict=True):
        assert name.endswith(f"pictures/Bild {label} ä.png")
    (tmp_path / paths[3]).unlink()
    with pytest.raises(UserError, match=r"Bild 3 ä\.png can't be read"):
        definition.load_data()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    gone = [f"/home/someone/{i}.png" for i in range(N)]
    for column, message in (
        (
            [{"bytes": None, "path": path} for path in gone],
            r"only the path of an image in its first row, /home/someone/0",
        ),
        (gone, r"names images in column 'image' that aren't there, such as /home/someone/0\.png"),
        (LABELS, "has no column with images, neither their encoded bytes nor paths of files"),
    ):
        pq.write_table(pa.table({"image": column, "label": LABELS}), tmp_path / "d.parquet")
        with pytest.raises(UserError, match=message):
            read_parquet([tmp_path / "d.parquet"], None, "label")


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": CELLS, "label": [*LABELS[:-2], None, None]}), tmp_path / "d.parquet")
    with pytest.raises(
        UserError, match=r"2 rows of .*d\.parquet have no label in column 'label', the first of them row 10"
    ):
        read_parquet([tmp_path / "d.parquet"], None, "label")


def test_a_csv_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("path,label\nä.png,0\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"d\.csv (can't be read as CSV in UTF-8|has no column)"):
        resolve(spec("d.csv"), base_dir=tmp_path)
    (tmp_path / "d.csv").write_text("path,label\na.png,0\nb.png\n")
    with pytest.raises(UserError, match=r"d\.csv can't be read as CSV"):
        resolve(spec("d.csv"), base_dir=tmp_path)
    (tmp_path / "d.csv").write_text("path,class\na.png,0\n")
    with pytest.raises(UserError, match=r"has no column 'label'; it has path, class"):
        resolve(spec("d.csv"), base_dir=tmp_path)


def test_a_grey_image_among_coloured_ones(tmp_path: Path) -> None:
    """And the other way round: whichever comes first, no colour is lost without being asked for."""
    grey, coloured = [png(one[..., 0]) for one in images(N)], list(CELLS)
    one_class = {"arguments": {"n_classes": N}, "splits": dict.fromkeys(("train", "valid", "repair", "test"), 0.25)}

    def write(cells: list[bytes], group: int = N) -> None:
        pq.write_table(pa.table({"image": cells, "label": LABELS}), tmp_path / "d.parquet", row_group_size=group)

    for cells in ([grey[0], *coloured[1:]], [*grey[:6], *coloured[6:]], [*coloured[:6], *grey[6:]]):
        write(cells, group=6)
        assert resolve(spec("d.parquet", **one_class), base_dir=tmp_path).input_shape == (3, 12, 12)
    write([*grey[:-1], coloured[-1]])
    given = one_class | {"arguments": {"n_classes": N, "n_channels": 1}}
    for channels in (1, 3):
        both = spec(
            "d.parquet", channels=channels, **one_class | {"arguments": {"n_classes": N, "n_channels": channels}}
        )
        definition = resolve(both, base_dir=tmp_path)
        assert definition.input_shape == (channels, 12, 12) and sum(sizes(definition)) == N
    with pytest.raises(
        UserError, match=r"can't take inputs of shape \(3, 12, 12\): .*; channels: 1 or 3 converts images"
    ):
        resolve(spec("d.parquet", **given), base_dir=tmp_path)


def test_colour_beyond_the_images_looked_at_is_refused_and_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.subjects.reading import streaming

    monkeypatch.setattr(streaming.look, "__defaults__", (5,))
    grey = [png(one[..., 0]) for one in images(N)]
    pq.write_table(pa.table({"image": [*grey[:-1], CELLS[-1]], "label": LABELS}), tmp_path / "d.parquet")
    splits = dict.fromkeys(("train", "valid", "repair", "test"), 0.25)
    given = spec("d.parquet", arguments={"n_classes": N, "n_channels": 1}, splits=splits)
    with pytest.raises(UserError, match=r"row 11 of d\.parquet is in colour, where others are grey; give channels: 3"):
        resolve(given, base_dir=tmp_path).load_data()


def test_the_channels_of_an_onnx_file_are_those_of_its_images(tmp_path: Path) -> None:
    from factories import convnet

    from orchestrator.subjects.onnx.exporting import export_onnx

    export_onnx(convnet(3, n_channels=1).eval(), tmp_path / "grey.onnx", input_shape=(1, 12, 12))
    export_onnx(convnet(3).eval(), tmp_path / "colour.onnx", input_shape=(3, 12, 12))
    labels = [i % 3 for i in range(N)]
    splits = dict.fromkeys(("train", "valid", "repair", "test"), 0.25)
    for cells in (CELLS, [png(one[..., 0]) for one in images(N)]):
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "d.parquet")
        for model, channels in (("grey.onnx", 1), ("colour.onnx", 3)):
            definition = resolve(spec("d.parquet", model=model, splits=splits), base_dir=tmp_path)
            assert definition.load_data().train.shape == (channels, 12, 12)


def test_transparent_pixels_are_told(tmp_path: Path) -> None:
    alpha = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 1), dtype=np.uint8)
    splits = dict.fromkeys(("train", "valid", "repair", "test"), 0.25)
    for opaque in (False, True):
        cells = [
            png(np.concatenate([a, np.full_like(b, 255) if opaque else b], 2))
            for a, b in zip(images(N), alpha, strict=True)
        ]
        pq.write_table(pa.table({"image": cells, "label": LABELS}), tmp_path / "d.parquet")
        remarks = (
            resolve(spec("d.parquet", arguments={"n_classes": N}, splits=splits), base_dir=tmp_path).load_data().remarks
        )
        assert [f"{N} of {N} images that were looked at have transparent pixels" in one for one in remarks] == [
            True
        ] * (not opaque)
