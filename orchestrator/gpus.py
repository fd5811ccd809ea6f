"""The GPUs of a cluster, as far as packing needs to know them."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def smallest_bytes() -> int | None:
    """Memory of the smallest GPU of the nodes that are there; None where no node has a GPU that torch can use."""
    task: Any = ray.remote(num_cpus=0, num_gpus=0.01)(_bytes_here)
    found = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) > 0
    ]
    return min((size for size in ray.get(found) if size is not None), default=None)


def _bytes_here() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
