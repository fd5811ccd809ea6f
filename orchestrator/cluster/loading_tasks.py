"""Loading subjects as tasks of the cluster, and loading them again when the last node that held one is gone.

Ray could make a lost object once more by itself, but that task would wait for a core and a GPU for ever where trials
have them all, the one that wants the subject among them; and it might run on a node that joined late and lacks the
data. So Ray is told not to. The driver loads the subject again between trials, and leaves out nodes that failed to.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from analysis.contract.errors import UserError
from orchestrator.cluster import capacity
from orchestrator.cluster.luggage import FOLDER, Luggage
from orchestrator.cluster.node_events import pause_when_full, telling_epochs
from orchestrator.cluster.presence import check_nodes, complaint, loading_nodes, this_node
from orchestrator.storage.patience import StorageError
from orchestrator.storage.store import Store
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.subjects.reading.roots import DataRoot, use_cache_dir
from orchestrator.subjects.subject import SubjectDefinition
from orchestrator.trial.loading import load_subject, sample_columns

MOST_RUNS = 3
"""Of a loading task whose process or node dies."""
NODE_LABEL = "ray.io/node-id"
"""The label that Ray gives every node."""


class NotLoadedError(UserError):
    """A node couldn't load a subject, because of what it has or hasn't.

    Args:
        sentence: what is wrong.
        subject: its name.
        node_id: of the node, as Ray lists it.
        node: the node for people.
    """

    def __init__(self, sentence: str, subject: str, node_id: str, node: str) -> None:
        # Ray copies exceptions by their arguments.
        super().__init__(sentence, subject, node_id, node)
        self.sentence, self.subject, self.node_id, self.node = sentence, subject, node_id, node

    def __str__(self) -> str:
        return f"On node {self.node}: {self.sentence}"


@dataclass
class SubjectLoader:
    """Loads the subjects of a study on its cluster.

    Args:
        definitions: of the subjects, by name.
        luggage: what they need of this machine.
        store: the study's results.
        data_root: folder of datasets on the nodes.
        cache_dir: folder for originals and for what travelled, on the nodes.
        keep_history: whether a fixer of the study needs the weights after each epoch.
        gpus: that loading a subject takes.
        monitor: handle of the monitor actor.
        on_event: told in a sentence which nodes are left out.
    """

    definitions: Mapping[str, SubjectDefinition]
    luggage: Luggage
    store: Store
    data_root: DataRoot | None
    cache_dir: Path
    keep_history: bool
    gpus: float
    monitor: Any
    on_event: Callable[[str], None]
    unfit: dict[str, NotLoadedError] = field(default_factory=dict)
    """Nodes that couldn't load a subject, by id; they still run trials."""

    def load_all(self) -> tuple[dict[str, Any], dict[str, LoadedSubject]]:
        """Load all subjects in parallel, after the nodes were asked for the data; missing originals are trained.

        Returns:
            References to (subject, baseline), and what the driver knows of each, by name.

        Raises:
            UserError: a node lacks something; the sentence names the node where there are several.
        """
        check_nodes(self.definitions, self.data_root, self.gpus)
        try:
            return self._load(self.definitions)
        except NotLoadedError as error:
            # The only machine needs no name.
            raise UserError(str(error) if len(capacity.live_nodes()) > 1 else error.sentence) from error

    def load_again(self, name: str) -> tuple[Any, LoadedSubject]:
        """Load a subject whose last node is gone, on a node that hasn't failed to load one.

        Raises:
            UserError: no node is left that could; the sentences name those that couldn't.
        """
        while True:
            fit = [node for node in loading_nodes(ray.nodes(), self.gpus) if node["NodeID"] not in self.unfit]
            if self.unfit and not fit:
                raise UserError(complaint({each.node: [each.sentence] for each in self.unfit.values()}))
            try:
                references, loaded = self._load([name])
            except NotLoadedError as error:
                self.unfit[error.node_id] = error
                self.on_event(f"{str(error).rstrip('.')}; it is left out of loading")
            else:
                return references[name], loaded[name]

    def _load(self, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, LoadedSubject]]:
        started = {name: self._start(name) for name in names}
        ended = {name: self._ended(name, *references) for name, references in started.items()}
        references = {name: reference for name, (reference, _) in ended.items()}
        return references, {name: loaded for name, (_, loaded) in ended.items()}

    def _ended(self, name: str, subject: Any, summary: Any) -> tuple[Any, LoadedSubject]:
        """Wait for a loading task, and start it again when its process or node dies."""
        for left in reversed(range(MOST_RUNS)):
            try:
                return subject, ray.get(summary)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                if not left:
                    reason = str(error).strip().partition("\n")[0].rstrip(".")
                    raise UserError(
                        f"The subject {name} couldn't be loaded: its process or node was lost again and again "
                        f"({reason})."
                    ) from error
                subject, summary = self._start(name)
        raise AssertionError("unreachable: the last run returns or raises")

    def _start(self, name: str) -> Any:
        """References to what loading returns."""
        task = ray.remote(num_cpus=1, num_gpus=self.gpus, num_returns=2, max_retries=0)(_load_task)
        if self.unfit:
            task = task.options(label_selector={NODE_LABEL: f"!in({','.join(self.unfit)})"})
        return task.remote(
            self.definitions[name],
            self.luggage,
            self.store,
            self.data_root,
            self.cache_dir,
            self.keep_history,
            self.monitor,
        )


def _not_loaded(sentence: str, definition: SubjectDefinition) -> NotLoadedError:
    return NotLoadedError(sentence, definition.name, ray.get_runtime_context().get_node_id(), this_node())


def _load_task(
    definition: SubjectDefinition,
    luggage: Luggage,
    store: Store,
    data_root: DataRoot | None,
    cache_dir: Path,
    keep_history: bool,
    monitor: Any,
) -> tuple[Any, LoadedSubject]:
    use_cache_dir(cache_dir)
    monitor.loaded.remote(definition.name)
    pause_when_full(store, monitor)
    try:
        loaded, summary = load_subject(
            luggage.unpack(definition, cache_dir / FOLDER),
            store=store,
            data_root=data_root,
            cache_dir=cache_dir / "originals",
            keep_history=keep_history,
            on_progress=telling_epochs(definition.name, monitor),
        )
    except StorageError:
        raise
    except UserError as error:
        raise _not_loaded(str(error), definition) from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise _not_loaded(
            f"{definition.name} can't be loaded: {error.strerror or error}{where}; originals and what belongs to them "
            f"are kept in {cache_dir}, which FIXSTUDY_CACHE names.",
            definition,
        ) from error
    # Here, so that the driver needs no sample; and before it writes the subject's row.
    store.write_test_samples(summary.fingerprint, sample_columns(loaded[0]))
    # What is said of a subject doesn't depend on where it was loaded.
    subject, baseline = loaded
    subject = dataclasses.replace(subject, definition=definition)
    return (subject, baseline), dataclasses.replace(summary, definition=definition)
