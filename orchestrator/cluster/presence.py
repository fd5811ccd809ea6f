"""Whether the nodes of a cluster have what a study reads there: asked before the first trial, node by node.

Data are read by the tasks that load subjects: trials get theirs through the object store, but for images that don't fit
into memory, which are read as they are asked for. A loading task runs on any node with the cores and GPUs for it. So
these nodes are asked before the first trial. A node that joins later is asked when it loads a subject, or when a trial
there takes up one with such images.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.base.errors import UserError
from orchestrator.subjects.own.data import OwnData
from orchestrator.subjects.own.targets import is_target
from orchestrator.subjects.reading.formats import dataset_folder
from orchestrator.subjects.reading.roots import DataRoot, RemoteRoot
from orchestrator.subjects.reading.roots import data_root as root_of_machine
from orchestrator.subjects.reading.streaming import StreamedSplit
from orchestrator.subjects.sources import datasets
from orchestrator.subjects.sources.corruption import CorruptedData
from orchestrator.subjects.subject import DataSource, Subject, SubjectDefinition

SECONDS_TO_ANSWER = 120.0
"""A node may have to start a process for the question first."""


def missing(definitions: Mapping[str, SubjectDefinition], data_root: DataRoot | None) -> list[str]:
    """What this machine lacks of some subjects' data, in a sentence each. Opens folders, reads no samples."""
    said = []
    for definition in definitions.values():
        try:
            _check_data(definition.data, data_root)
        except UserError as error:
            said.append(str(error))
    return said


def _check_data(source: DataSource, data_root: DataRoot | None) -> None:
    match source:
        case CorruptedData():
            _check_data(source.source, data_root)
        case OwnData():
            if not is_target(source.location):
                _check_readable(Path(source.location), "the data")
        case datasets.ImageNet():
            try:
                _check_folder(data_root, "imagenet")
            except UserError:
                # Loading takes a sample of it where there is one.
                _check_folder(data_root, "imagenet_samples")
        case datasets.IdxDigits() | datasets.MedMnist():
            _check_folder(data_root, source.folder)
        case datasets.Cifar10() | datasets.SkewedCifar10():
            _check_folder(data_root, "cifar10")
        case datasets.UtkFace():
            _check_folder(data_root, "utkface")
        case _:
            # Embedded data come with a package.
            return


def _check_folder(data_root: DataRoot | None, name: str) -> None:
    root = data_root or root_of_machine(None)
    if isinstance(root, RemoteRoot):
        # Fetched where a subject is loaded; here it only has to be within reach.
        if not root.files(name):
            raise UserError(f"There is no dataset {name} in {root}: put its files into {name} there.")
        return
    folder = dataset_folder(root, name, "its files")
    _check_readable(folder, f"the dataset {name}")
    if not any(folder.iterdir()):
        raise UserError(f"The folder {folder} is empty: put the files of {name} there.")


def _check_readable(path: Path, what: str) -> None:
    if not path.exists():
        raise UserError(f"There is no {path}, which has {what}.")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UserError(f"{path}, which has {what}, can't be read; give the user that runs Ray the right to.")


class NodeLacksImagesError(UserError):
    """A trial was to run on a node without the images of its subject."""


def check_images(subject: Subject, data_root: DataRoot | None) -> None:
    """See that this machine has the images that a subject's splits read as they are asked for.

    Raises:
        NodeLacksImagesError: it hasn't; the sentence names the node.
    """
    streamed = [split for split in subject.data.splits().values() if isinstance(split, StreamedSplit)]
    for folder in {split.folder for split in streamed}:
        if isinstance(data_root, RemoteRoot) and folder.is_relative_to(data_root.local("")):
            data_root.fetch(folder.relative_to(data_root.local("")).parts[0])
        if not folder.is_dir():
            raise NodeLacksImagesError(
                f"On node {this_node()}: There is no {folder}, which has the images of {subject.definition.name}; put "
                "them there, or take the node away, then run the same command again."
            )
    for split in streamed:
        try:
            split.ready()
        except UserError as error:
            raise NodeLacksImagesError(f"On node {this_node()}: {error}") from error


def this_node() -> str:
    """The node of this process, for people."""
    import ray.util

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def check_nodes(definitions: Mapping[str, SubjectDefinition], data_root: DataRoot | None, gpus: float) -> None:
    """Ask every node on which a subject may be loaded; where that is the driver's alone, loading itself will tell.

    Args:
        definitions: of the study's subjects.
        data_root: folder of datasets on the nodes.
        gpus: that a loading task takes.

    Raises:
        UserError: something is missing on a node; the sentence names it.
    """
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = loading_nodes(ray.nodes(), gpus)
    if [node["NodeID"] for node in nodes] in ([], [ray.get_runtime_context().get_node_id()]):
        return
    task = ray.remote(num_cpus=0, max_retries=0)(missing)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            definitions, data_root
        ): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in nodes
    }
    # Who is too busy to answer: its loading tasks, if it gets any, will tell or run elsewhere.
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    answers: dict[str, list[str]] = {}
    for answer in answered:
        try:
            # Raylets of one machine have one name.
            answers.setdefault(asked[answer], []).extend(ray.get(answer))
        except ray.exceptions.RayError:
            # Lost since it was asked.
            continue
    sentence = complaint(answers)
    if sentence is not None:
        raise UserError(sentence)


def loading_nodes(nodes: Sequence[Mapping[str, Any]], gpus: float) -> list[Mapping[str, Any]]:
    """The nodes, as Ray lists them, that a loading task may run on."""
    return [
        node
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and node["Resources"].get("GPU", 0) >= gpus
    ]


def complaint(answers: Mapping[str, Sequence[str]]) -> str | None:
    """One sentence per thing that is missing, with the nodes that lack it; None when nothing is."""
    nodes: dict[str, list[str]] = {}
    for node, sentences in answers.items():
        for sentence in dict.fromkeys(sentences):
            nodes.setdefault(sentence, []).append(node)
    lines = []
    for sentence, lacking in nodes.items():
        some = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        lines.append(f"On {'node' if len(lacking) == 1 else 'nodes'} {some}: {sentence}")
    return "\n".join(lines) or None
