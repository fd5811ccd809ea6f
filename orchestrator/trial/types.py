"""Failure types of a loaded subject, and a trial that repairs some of them.

The samples are those of the repair and the test split: failures of both are divided into types, and each type and what
is right into parts that train, select and judge. So what a type trial calls test is one part of both splits; train and
valid, which the original was made with, take no part.
"""

import base64
import dataclasses
import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from fixers import RepairProblem
from fixers.cache import Cache
from fixers.code_version import version_of
from fixers.failure_types import Division, Grouping, Pool, Types, accuracies_by_type, divide, find_types
from fixers.failure_types.divisions import ROLES
from fixers.views import JoinedSplit
from orchestrator.storage.store import Store
from orchestrator.study.schema import TypeGrouping
from orchestrator.subjects.subject import Subject
from orchestrator.trial import outcomes
from orchestrator.trial.attempts import MICRO_BATCHES, Phase
from orchestrator.trial.baseline import Baseline
from orchestrator.trial.columns import verdict_columns
from orchestrator.trial.loading import names_of, pairs_of
from orchestrator.trial.trial import Bench, Report, TrialRecord, run_trial

SOURCES: Final = ("repair", "test")
"""Splits of which the pool is made."""
_PICTURES_PER_TYPE = 60


def pool_of(subject: Subject, seed: int, device: torch.device, cache: Cache) -> Pool:
    """The samples of a subject whose failures are divided into types: repair, then test."""
    data = subject.data
    problem = RepairProblem(
        subject.original,
        train=data.train,
        valid=data.valid,
        repair=JoinedSplit([data.repair, data.test]),
        task=subject.task,
        device=device,
        seed=seed,
        cache=cache,
        recipe=subject.definition.recipe,
        history=subject.history_tensors(),
        fingerprint=f"{subject.fingerprint}/{version_of('fixers.failure_types')}",
        micro_batch=MICRO_BATCHES[0],
    )
    return Pool(problem)


def group(
    subject: Subject, grouping: TypeGrouping, pool: Pool, picture: Callable[[int], bytes | None]
) -> dict[str, Any]:
    """The columns of ``failure_types`` that a grouping of a subject's failures comes to, but for those that name it.

    Args:
        subject: loaded.
        grouping: of the study file.
        pool: of the subject and a seed.
        picture: a PNG of the sample at a position of the pool; None for none.

    Raises:
        FixFailedError: there are no types, with the reason.
    """
    settings = grouping.model_dump(exclude={"grouping", "name", "repair"})
    columns = subject.data.metadata
    known = [name for name in columns.get("test", {}) if name in columns.get("repair", {})]
    metadata = {name: np.concatenate([columns["repair"][name], columns["test"][name]]) for name in known}
    types = find_types(pool, Grouping(grouping.grouping, **settings), metadata)
    division = divide(pool, types.assigned)
    rule = types.nearest_centre(division)
    facts = {**types.facts, "assignment_accuracy": None if rule is None else rule.accuracy}
    failures, names = pool.failures, subject.definition.class_names
    labels, decided = pool.problem.repair.labels[failures].numpy(), pool.predicted[failures].numpy()
    in_repair = len(subject.data.repair)
    pictured = _nearest(types)
    return {
        "source": [SOURCES[position >= in_repair] for position in failures.tolist()],
        "sample_id": [position - in_repair * (position >= in_repair) for position in failures.tolist()],
        "split": [ROLES[role] for role in division.roles[failures].tolist()],
        "type": (types.assigned + 1).numpy(),
        "type_name": [types.names[kind] if types.names else None for kind in types.assigned.tolist()],
        "distance": types.distance.double().numpy(),
        "x": types.place[:, 0].double().numpy(),
        "y": types.place[:, 1].double().numpy(),
        "label": labels,
        "prediction": decided,
        "class_name": names_of(labels, names),
        "prediction_name": names_of(decided, names),
        "metadata": pairs_of({name: values[failures.numpy()] for name, values in metadata.items()}, len(failures)),
        "facts": [json.dumps(facts, sort_keys=True)] * len(failures),
        "picture": [
            base64.b64encode(png).decode() if row in pictured and (png := picture(position)) else None
            for row, position in enumerate(failures.tolist())
        ],
    }


def _nearest(types: Types) -> set[int]:
    """Rows of the failures nearest to the centre of their type; the first ones where there are no centres."""
    chosen: set[int] = set()
    for kind in range(types.count):
        rows = (types.assigned == kind).nonzero().squeeze(1)
        near = rows[types.distance[rows].nan_to_num().argsort(stable=True)][:_PICTURES_PER_TYPE]
        chosen.update(near.tolist())
    return chosen


def run_type_trial(bench: Bench, store: Store, on_phase: Callable[[Phase], None], on_progress: Report) -> TrialRecord:
    """Repair one failure type, or all, and judge the result on every type and on what was right before."""
    spec = bench.spec
    found = store.failure_types(spec.grouping_key or "", ["source", "sample_id", "type"]) or []
    pool = pool_of(bench.subject, spec.seed, bench.device, bench.cache)
    in_repair = len(bench.subject.data.repair)
    number = {row["sample_id"] + in_repair * (row["source"] == "test"): row["type"] - 1 for row in found}
    division = divide(pool, torch.tensor([number[position] for position in pool.failures.tolist()]))
    kinds = division.repairable if spec.type is None else [spec.type - 1]
    record = run_trial(_typed(bench, division, kinds), on_phase=on_phase, on_progress=on_progress)
    if record.predictions is not None:
        _judge(record, division, kinds, bench.settings.corrupted_drop)
    record.predictions = None
    return record


def _typed(bench: Bench, division: Division, kinds: list[int]) -> Bench:
    """The bench with the parts of the pool in the place of the subject's splits; without an attack."""
    subject, pool = bench.subject, division.pool
    own, labels = division.problem(kinds), pool.problem.repair.labels
    data = dataclasses.replace(
        subject.data, valid=own.valid, repair=own.repair, test=pool.problem.repair.select(division.judging),
        test_groups=None, metadata={},
    )  # fmt: skip
    decided = {"valid": division.selecting(kinds), "test": division.judging}
    predicted = {name: pool.predicted[positions].numpy() for name, positions in decided.items()}
    accuracy = {
        name: float((predicted[name] == labels[positions].numpy()).mean()) for name, positions in decided.items()
    }
    return dataclasses.replace(
        bench,
        subject=dataclasses.replace(subject, data=data, fingerprint=f"{subject.fingerprint}/{bench.spec.grouping_key}"),
        baseline=Baseline(predicted["test"], predicted["valid"], {**bench.baseline.accuracy, **accuracy}, None),
        settings=dataclasses.replace(bench.settings, attack=None, keep_models=False),
    )


def _judge(record: TrialRecord, division: Division, kinds: list[int], corrupted_drop: float) -> None:
    predictions = record.predictions or {}
    right = torch.from_numpy(np.asarray(predictions["fixed"] == predictions["label"]))
    types = division.types[division.judging]
    accuracies, counts = accuracies_by_type(right, types, division.n_types)
    names = {kind: str(kind + 1) for kind in range(division.n_types)} | {"C": "C", "All": "All"}
    there = [kind for kind, count in counts.items() if count]
    record.matrix = {
        "type_of_test": [names[kind] for kind in there],
        "accuracy": [accuracies[kind] for kind in there],
        "n": [counts[kind] for kind in there],
    }
    notes = json.loads(record.row.get("notes") or "{}")
    of_types = right[torch.isin(types, torch.tensor(kinds))]
    record.row |= {
        "accuracy_c_original": 1.0 if counts["C"] else None,
        "accuracy_c": accuracies["C"] if counts["C"] else None,
        "accuracy_type": of_types.double().mean().item() if len(of_types) else None,
        "epochs_rejected": notes.get("epochs_rejected_for_correct"),
    }
    if counts["C"]:
        text = "On samples that the original gets right, test"
        record.row |= verdict_columns(outcomes.judge_accuracy(1.0, accuracies["C"], corrupted_drop, text))
    if record.row["n_repaired"] == record.row["n_broken"] == 0:
        record.row["note"] = (
            "No weights that were tried are better on the failures that select"
            + (" and keep enough of what is right" if record.row["epochs_rejected"] else "")
            + ", so nothing changed."
        )
