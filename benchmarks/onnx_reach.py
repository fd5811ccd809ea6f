"""Which ONNX files come in: the table of docs/subjects.md.

    python benchmarks/onnx_reach.py [NAME ...] [--files FOLDER]

exports hub models of torchvision and timm by both exporters of torch, with weights drawn at random, and imports them
and the files of the folder (``onnx/`` of ``FIXSTUDY_DATA`` when not given). A model counts as loaded when it agrees
with onnxruntime, has a weight of every shape that the original has, takes any batch and can be cut by torch.fx.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fixers.network import cut
from orchestrator.subjects.onnx.importing import ImportedModel, ModelImportError, load_onnx

HUB = {
    "torchvision": ("mobilenet_v3_small", "swin_t", "swin_v2_t", "convnext_tiny", "vit_b_16"),
    "timm": (
        "mobilenetv3_small_100", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny",
        "convnextv2_atto", "ghostnet_100", "levit_128s", "poolformer_s12", "edgenext_xx_small",
        "swinv2_tiny_window8_256",
    ),
}  # fmt: skip
"""Models by their library."""

EXPORTERS = ("legacy", "dynamo")
OPEN_SIZES = {"paddle_hardsigmoid.onnx": (3, 48, 192)}
"""Shapes of samples for files that leave them open."""


def hub_model(library: str, name: str) -> nn.Module:
    """A model of a library with weights that all differ, as after training: exporters merge equal ones."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model: nn.Module = timm.create_model(name)
    else:
        from torchvision.models import get_model

        model = get_model(name)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.empty_like(value).normal_(0, 0.01))
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
    return model.eval()


def export(model: nn.Module, path: Path, exporter: str, size: int = 224) -> None:
    """Write a model as either exporter does it by default, with a free batch."""
    example = (torch.rand(2, 3, size, size),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            torch.onnx.export(
                model, example, str(path), dynamo=False, opset_version=17, input_names=["x"],
                dynamic_axes={"x": {0: "batch"}},
            )  # fmt: skip


def missing_weights(model: nn.Module, imported: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of matrices and kernels of ``model`` for which ``imported`` has no parameter; a norm may be folded."""
    sizes = Counter(value.numel() for value in imported.parameters())
    wanted = Counter(value.numel() for value in model.parameters() if value.squeeze().ndim > 1)
    shapes = {value.numel(): tuple(value.shape) for value in model.parameters()}
    return [shapes[size] for size in (wanted - sizes).elements()]


def is_usable(imported: ImportedModel) -> str | None:
    """Why a model that came in can't be fixed; None where it can."""
    batch = torch.rand(3, *imported.input_shape)
    with torch.no_grad():
        whole = imported.model(batch)
    layers = [name for name, module in imported.model.named_modules() if isinstance(module, nn.Linear)]
    for name in layers[-1:]:
        parts = cut(imported.model, name)
        with torch.no_grad():
            again = parts.suffix(*parts.features(batch))
        if not torch.allclose(again, whole, atol=1e-5):
            return f"cutting at {name} changes its outputs"
    return None


def attempt(path: Path, model: nn.Module | None = None) -> tuple[str, ...]:
    """One row: file, what came of it, reader, largest difference, weights; or the reason of a refusal."""
    try:
        imported = load_onnx(path, input_shape=OPEN_SIZES.get(path.name))
    except ModelImportError as error:
        return path.name, f"refused: {str(error).removeprefix(f'Cannot import {path.name}: ')}", "", "", ""
    missing = [] if model is None else missing_weights(model, imported.model)
    lost = (
        f"loads, but {len(missing)} weights are constants in the file, such as one of {missing[0]}" if missing else ""
    )
    reason = lost or is_usable(imported)
    count = sum(value.numel() for value in imported.model.parameters())
    reader = "onnx2torch" if imported.second_reader else "fixstudy"
    return path.name, reason or "loads", reader, f"{imported.parity_max_difference:.0e}", f"{count:,}"


def rows(names: list[str], files: Path | None) -> Iterator[tuple[str, ...]]:
    """The rows of the table, one by one."""
    for path in sorted(files.glob("*.onnx")) if files is not None else ():
        if not names or path.stem in names:
            yield attempt(path)
    for library, models in HUB.items():
        for name in models:
            if names and name not in names:
                continue
            with tempfile.TemporaryDirectory() as folder:
                model = hub_model(library, name)
                for exporter in EXPORTERS:
                    path = Path(folder) / f"{library} {name}, {exporter}"
                    export(model, path, exporter, 256 if "256" in name else 224)
                    yield attempt(path, model)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models and files, all when not given")
    parser.add_argument("--files", type=Path, help="folder of ONNX files")
    arguments = parser.parse_args()
    root = os.environ.get("FIXSTUDY_DATA")
    files = arguments.files or (Path(root) / "onnx" if root else None)
    print("| file | | reader | largest difference | weights |\n|---|---|---|---|---|")
    for row in rows(arguments.names, files):
        print("| " + " | ".join(row) + " |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
