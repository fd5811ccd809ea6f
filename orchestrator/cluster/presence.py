"""Whether the nodes of a cluster have what a study reads there: asked before the first trial, node by node.

Data are read by the tasks that load subjects: trials get theirs through the object store, but for images that don't fit
into memory, which are read as they are asked for. A loading task runs on any node with the cores and GPUs for it. So
these nodes are asked before the first trial. A node that joins later is asked when it loads a subject, or when a trial
there takes up one with such images.
"""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.roots import DataRoot, RemoteRoot
from orchestrator.subjects.reading.streaming import StreamedSplit
from orchestrator.subjects.subject import Subject, SubjectDefinition

SECONDS_TO_ANSWER = 120.0
"""A node may have to start a process for the question first."""


def missing(definitions: Mapping[str, SubjectDefinition], data_root: DataRoot | None) -> list[str]:
    """What this machine lacks of some subjects' data, in a sentence each. Opens folders, reads no samples."""
    said = []
    for definition in definitions.values():
        try:
            definition.data.check(data_root)
        except UserError as error:
            said.append(str(error))
    return said


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
