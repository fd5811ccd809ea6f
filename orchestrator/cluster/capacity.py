"""What a cluster has, and how many trials it can run at once, with the nodes that its autoscaler may still start.

A cluster that has scaled itself down to nothing has no GPU at the moment, and yet its trials belong on GPUs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from analysis.contract.errors import UserError

BOOTSTRAP_CONFIG = "~/ray_bootstrap_config.yaml"
"""Where ``ray up`` leaves the cluster's own file on the head node; Ray Tune looks for it too."""
Resources = Mapping[str, float]


def live_nodes() -> list[Resources]:
    """Resources of every node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_resources() -> list[Resources]:
    """Resources of every node that is there, or that may yet start."""
    alive, startable = live_nodes(), _startable_nodes()
    # Nodes that run already are among those that the autoscaler may start.
    return startable if len(startable) > len(alive) else alive


def has_gpus(nodes: Iterable[Resources]) -> bool:
    """Whether any node has a GPU."""
    return any(node.get("GPU", 0) > 0 for node in nodes)


def gpus_of_trial(asked: float | None) -> float:
    """GPUs that a trial gets: those that the study asks for, or one where the cluster has any."""
    if asked is not None:
        return asked
    return 1.0 if has_gpus(node_resources()) else 0.0


def fitting(resources: Resources, nodes: Iterable[Resources]) -> int:
    """How many trials fit into the nodes at once.

    Args:
        resources: what one trial takes, by Ray's names.
        nodes: what each node has.
    """
    asked = {name: amount for name, amount in resources.items() if amount}
    return sum(min((int(node.get(name, 0) / amount) for name, amount in asked.items()), default=1) for node in nodes)


def lanes(resources: Resources) -> int:
    """How many trials the cluster can run at once.

    Raises:
        UserError: a trial fits on no node.
    """
    fits = fitting(resources, node_resources())
    if fits < 1:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
        raise UserError(f"A trial needs {wanted}, more than any node has; lower resources in the study file.")
    return fits


def memory(resources: Resources) -> list[tuple[int, int]]:
    """Bytes of memory, and trials at once, of every node that takes trials; empty where that of one isn't known.

    Where a node that may yet start doesn't say its memory, a trial that asks for some would keep it from starting.

    Args:
        resources: what one trial takes at least, by Ray's names.
    """
    taking = [(node, trials) for node in node_resources() if (trials := fitting(resources, [node]))]
    if not all(node.get("memory") for node, _ in taking):
        return []
    return [(int(node["memory"]), trials) for node, trials in taking]


def smallest_gpu() -> int | None:
    """Bytes of memory of the smallest GPU that is there; None where no node has one that torch can use."""
    task: Any = ray.remote(num_cpus=0, num_gpus=0.01)(_gpu_here)
    found = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in ray.nodes()
        if node["Alive"] and has_gpus([node["Resources"]])
    ]
    return min((size for size in ray.get(found) if size is not None), default=None)


def _gpu_here() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _startable_nodes() -> list[Resources]:
    path = Path(BOOTSTRAP_CONFIG).expanduser()
    if not path.exists():
        return []
    return nodes_of_file(yaml.safe_load(path.read_text(encoding="utf-8")))


def nodes_of_file(cluster: Mapping[str, Any]) -> list[Resources]:
    """The nodes that a cluster file allows at most: the head, and ``max_workers`` of each type.

    Args:
        cluster: content of a file for ``ray up`` with the providers' defaults filled in.
    """
    head = cluster.get("head_node_type")
    nodes: list[Resources] = []
    workers: list[Resources] = []
    for name, kind in (cluster.get("available_node_types") or {}).items():
        if name == head:
            nodes.append(kind.get("resources", {}))
        else:
            workers += [kind.get("resources", {})] * int(kind.get("max_workers", 0))
    return nodes + workers[: int(cluster.get("max_workers", len(workers)))]
