"""Finding the failure types of subjects on the cluster: a task for each grouping and seed, kept by content."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from fixers import FixFailedError
from fixers.cache import DirectoryCache
from orchestrator.cluster.loading_tasks import SubjectLoader
from orchestrator.cluster.luggage import FOLDER, Luggage
from orchestrator.driver.pictures import is_picture, png
from orchestrator.planning.failure_types import Grouped
from orchestrator.storage.store import Store
from orchestrator.study.schema import Study, TypeGrouping
from orchestrator.study.trials import grouping_key
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.subjects.reading.roots import use_cache_dir
from orchestrator.trial.types import group, pool_of


def find_types(
    study: Study, references: Mapping[str, Any], subjects: Mapping[str, LoadedSubject], loader: SubjectLoader
) -> list[Grouped]:
    """The types of all groupings of a study, for every subject and seed; those that the results lack are computed.

    Args:
        study: expanded.
        references: to (subject, baseline), by name.
        subjects: what the driver knows of them.
        loader: of the subjects.
    """
    store, found = loader.store, []
    waiting: dict[str, Any] = {}
    pairs = [(name, own, seed) for name in subjects for own in study.failure_types for seed in study.seeds]
    for name, grouping, seed in pairs:
        key = grouping_key(grouping, subjects[name].fingerprint, seed)
        if store.failure_types(key, ["type"]) is None:
            if not waiting:
                loader.on_event("dividing failures into types")
            task = ray.remote(num_cpus=1, num_gpus=loader.gpus)(_group_there)
            carried = store, loader.luggage, loader.cache_dir
            pictures = study.pictures and seed == study.seeds[0]
            waiting[key] = task.remote([references[name]], study.study, grouping, seed, key, pictures, *carried)
    for name, grouping, seed in pairs:
        key = grouping_key(grouping, subjects[name].fingerprint, seed)
        problem = ray.get(waiting[key]) if key in waiting else None
        if problem is not None:
            loader.on_event(f"{grouping.label} finds no types of {name}: {problem}")
        rows = store.failure_types(key, ["type", "split"]) or []
        training = Counter(row["type"] for row in rows if row["split"] == "train")
        counts = tuple(training[kind] for kind in range(1, max((row["type"] for row in rows), default=0) + 1))
        found.append(Grouped(name, grouping, seed, key, counts, problem))
    return found


def _group_there(
    references: list[Any], study: str, grouping: TypeGrouping, seed: int, key: str, pictures: bool,
    store: Store, luggage: Luggage, cache_dir: Path,
) -> str | None:  # fmt: skip
    """Write the types of a grouping; why there are none, as a sentence."""
    use_cache_dir(cache_dir)
    luggage.unpack_code(cache_dir / FOLDER)
    subject, _ = ray.get(references[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    pool = pool_of(subject, seed, device, DirectoryCache(cache_dir / "intermediate"))

    def picture(position: int) -> bytes | None:
        if not (pictures and is_picture(subject)):
            return None
        return png(pool.problem.repair.inputs(torch.tensor([position]), torch.device("cpu"))[0])

    try:
        columns = group(subject, grouping, pool, picture)
    except FixFailedError as error:
        return str(error)
    names = {
        "study": study, "subject": subject.name, "subject_fingerprint": subject.fingerprint, "grouping": grouping.label,
        "grouping_key": key, "seed": seed,
    }  # fmt: skip
    length = len(columns["source"])
    store.write_failure_types(key, {**columns, **{name: [value] * length for name, value in names.items()}})
    return None
