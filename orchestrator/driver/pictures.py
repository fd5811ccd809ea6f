"""Small pictures of the test samples that a report shows: repaired by most, broken by most, repaired by none."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from torch import Tensor

from analysis.contract.errors import UserError
from orchestrator.cluster import capacity
from orchestrator.cluster.luggage import FOLDER, Luggage
from orchestrator.storage.patience import StorageError
from orchestrator.storage.store import Store
from orchestrator.subjects.reading.roots import use_cache_dir
from orchestrator.subjects.subject import Subject

LARGEST_SIDE = 96
"""Pixels; larger images are scaled down. Small ones stay as they are, and the page scales them up."""


def draw(
    references: Mapping[str, Any],
    store: Store,
    luggage: Luggage,
    cache_dir: Path,
    on_event: Callable[[str], None],
) -> None:
    """Keep the samples that a report shows; drawn where the data are, which may be out of the driver's reach.

    Args:
        references: to the loaded subjects by name, in Ray's object store.
        store: of the study; its trials have their rows.
        luggage: what subjects need on another machine.
        cache_dir: folder for caches on the nodes.
        on_event: told in a sentence which pictures there are not, and why; they are not worth ending a study for.

    Raises:
        StorageError: the results can't be read or written.
    """
    samples = {name: ids for name, ids in wanted(store.uri).items() if name in references}
    # Where the data are on this machine, a new process would take longer to start than to draw.
    is_here = len(capacity.live_nodes()) == 1
    task = ray.remote(num_cpus=0)(_draw_there)
    carried = store, luggage, cache_dir
    drawn = {} if is_here else {name: task.remote([references[name]], samples[name], *carried) for name in samples}
    for name, ids in samples.items():
        try:
            if is_here:
                store_pictures(ray.get(references[name])[0], ids, store)
            else:
                ray.get(drawn[name])
        except ray.exceptions.ObjectLostError:
            # Loading a subject once more for its pictures is for the user to decide.
            on_event(
                f"{name} was lost with the last node that held it, so the report lacks its pictures; "
                "run the same command again to have them"
            )
        except StorageError:
            raise
        # What a node raised is of its class too.
        except UserError as error:
            sentence = str(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
            on_event(f"the report lacks pictures of {name}: {sentence}")


def _draw_there(references: list[Any], samples: list[int], store: Store, luggage: Luggage, cache_dir: Path) -> int:
    use_cache_dir(cache_dir)
    # Ray would fetch a bare reference before the code is there that the subject is made of.
    luggage.unpack_code(cache_dir / FOLDER)
    subject, _ = ray.get(references[0])
    return store_pictures(subject, samples, store)


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
    if not is_picture(subject):
        return 0
    there = store.names(folder)
    missing = [sample for sample in samples if f"{sample}.png" not in there]
    for sample in missing:
        image = subject.data.test.inputs(torch.tensor([sample]), torch.device("cpu"))[0]
        store.write_bytes(f"{folder}/{sample}.png", png(image))
    return len(missing)


def is_picture(subject: Subject) -> bool:
    """Whether inputs are grey or RGB images."""
    shape = subject.definition.input_shape
    return len(shape) == 3 and shape[0] in (1, 3)


def png(image: Tensor) -> bytes:
    """An image (C, H, W), float in [0, 1], C 1 or 3, as a PNG file."""
    pixels: Any = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
