"""One Ray cluster and one cache of originals for all tests that run studies."""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore, make_bucket

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A cluster of one node with two cores, shared by all tests; drivers in other processes can join it."""
    import ray

    cluster = _cluster()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def without_ray() -> Iterator[None]:
    """This process leaves the shared cluster, if it is in it, until the test has ended: it starts or joins another."""
    import ray

    address = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
    ray.shutdown()
    yield
    ray.shutdown()
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    """A real S3 server with an empty bucket."""
    server = ObjectStore()
    make_bucket(server)
    yield server
    server.stop()


def _cluster() -> Any:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 500_000_000}
    for tries_left in reversed(range(3)):
        try:
            return Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:
            # Ray gives its own processes 30 s and then raises a bare Exception; a busy machine needs longer.
            if not tries_left or "timed out during startup" not in str(error):
                raise
    raise AssertionError("unreachable: the last try returns or raises")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Originals are trained once per test session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache is left alone."""
    monkeypatch.setenv("FIXSTUDY_CACHE", str(shared_cache))


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a study file that can use the misbehaving fixers of the examples."""

    def write(text: str, name: str = "study.yaml") -> Path:
        path = tmp_path / name
        plugin = f"plugins: ['{EXAMPLES / 'misbehaving_fixers.py'}']\n"
        path.write_text(plugin + textwrap.dedent(text))
        return path

    return write
