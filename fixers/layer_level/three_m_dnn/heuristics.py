"""Searching the values to prescribe at separation layers: random, greedy and Monte-Carlo tree search.

A state says by how much each output of each point moves (``separated_network.State``). The duals of the last
layer's program tell how its optimum reacts to every one of them, and so which moves are worth trying.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from fixers.errors import DeadlineExceededError
from fixers.exact.arrays import FloatArray, IntArray
from fixers.exact.linear_program import Status
from fixers.exact.minimal_change import Norm
from fixers.layer_level.three_m_dnn.separated_network import Modification, SeparatedNetwork, State

_IMPROVEMENT = 1e-9
_SENSITIVE = 20
_MOST_NEURONS = 256
_TRIED_TOGETHER = 8
_ACTIONS = 12
_DEPTH = 4
_EXPLORATION = 0.5
_IDLE = 1000


class SearchEnded(Exception):
    """The budget is spent."""


@dataclass
class Search:
    """What every heuristic works with: evaluate states, keep the incumbents.

    Args:
        network: what the states are of.
        solve: the modification of a state, given rows that a similar one used.
        verified: the modification (or a safer one) if the exported model really gives the labels, else None.
        proceed: told how many evaluations are done and the best cost; False ends the search.
        first: the single-layer optimum, cost_0 and the first incumbent.
        rng: for random choices.
    """

    network: SeparatedNetwork
    solve: Callable[[State, IntArray], Modification]
    verified: Callable[[Modification], Modification | None]
    proceed: Callable[[int, float], bool]
    first: Modification
    rng: np.random.Generator
    incumbents: list[Modification] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    """Cost of the best incumbent after each evaluation."""
    done: int = 0
    infeasible: int = 0
    rejected: int = 0

    def __post_init__(self) -> None:
        self.incumbents.append(self.first)
        self.costs.append(self.first.cost)
        self._known = {_key(self.first.state): self.first}
        self._idle = 0

    @property
    def best(self) -> Modification:
        """The cheapest verified modification so far."""
        return self.incumbents[-1]

    def evaluate(self, state: State) -> Modification:
        """Solve a state; a state met before costs nothing.

        Raises:
            SearchEnded: the budget is spent.
        """
        key = _key(state)
        if key in self._known:
            self._idle += 1
            if self._idle > _IDLE:  # a network so small that every state is known
                raise SearchEnded
            return self._known[key]
        self._idle = 0
        if not self.proceed(self.done, self.best.cost):
            raise SearchEnded
        try:
            found = self.solve(state, self.best.used)
            if found.status is Status.TIMEOUT:
                raise SearchEnded
            self.done += 1
            self.infeasible += not found.is_feasible
            if found.cost < self.best.cost - _IMPROVEMENT * self.first.cost:
                checked = self.verified(found)
                self.rejected += checked is None
                if checked is not None and checked.cost < self.best.cost:
                    found = checked
                    self.incumbents.append(checked)
        except DeadlineExceededError as error:
            raise SearchEnded from error
        self.costs.append(self.best.cost)
        self._known[key] = found
        return found


def random_search(search: Search) -> None:
    """Each time a new state: a few neurons of a few points, some steps up or down."""
    rng = search.rng
    while search.first.cost > 0:
        state = search.network.unchanged
        at = int(rng.integers(len(state)))
        layer, grid = state[at], search.network.grid[at]
        rows = rng.choice(layer.shape[0], size=min(layer.shape[0], int(rng.integers(1, 4))), replace=False)
        units = rng.choice(layer.shape[1], size=min(layer.shape[1], int(rng.integers(1, 6))), replace=False)
        shape = (len(rows), len(units))
        where = np.ix_(rows, units)
        layer[where] = grid[where] * rng.integers(1, 4, size=shape) * rng.choice([-1, 1], size=shape)
        try:
            search.evaluate(state)
        except SearchEnded:
            return


def greedy_search(search: Search) -> None:
    """From the best state, try the moves of highest promise; go to the best improving one of a handful."""
    try:
        while True:
            here = search.best
            moves = neighbours(here, search.network)
            while handful := list(islice(moves, _TRIED_TOGETHER)):
                for move in handful:
                    search.evaluate(_moved(here.state, move))
                if search.best is not here:
                    break
            else:
                return
    except SearchEnded:
        return


@dataclass
class _Node:
    found: Modification
    moves: list[State]
    children: "list[_Node]" = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0
    """The best below."""


def monte_carlo_tree_search(search: Search) -> None:
    """UCB1 selection, one expansion, one random roll-out; the best reward max(0, 1 - cost / cost_0) is backed up."""

    def node(found: Modification) -> _Node:
        moves = list(islice(neighbours(found, search.network), _ACTIONS)) if found.is_feasible else []
        return _Node(found, moves)

    def reward(found: Modification) -> float:
        return max(0.0, 1.0 - found.cost / search.first.cost)

    def worth(parent: _Node, child: _Node) -> float:
        return child.reward + _EXPLORATION * math.sqrt(2.0 * math.log(parent.visits) / child.visits)

    root = node(search.first)
    while root.moves:
        path = [root]
        while not _open(path[-1]) and path[-1].children:
            parent = path[-1]
            path.append(max(parent.children, key=lambda child: worth(parent, child)))
        try:
            here = path[-1]
            if _open(here):
                child = node(search.evaluate(_moved(here.found.state, here.moves[len(here.children)])))
                here.children.append(child)
                path.append(child)
            gained = max(reward(path[-1].found), reward(_roll_out(search, path[-1])))
        except SearchEnded:
            return
        for each in path:
            each.visits += 1
            each.reward = max(each.reward, gained)


def _open(node: _Node) -> bool:
    return len(node.children) < len(node.moves)


def _roll_out(search: Search, node: _Node) -> Modification:
    """The state after a few random moves of the node's own."""
    state = node.found.state
    if node.moves:
        for move in search.rng.integers(len(node.moves), size=int(search.rng.integers(1, _DEPTH + 1))):
            state = _moved(state, node.moves[move])
    return search.evaluate(state)


def neighbours(found: Modification, network: SeparatedNetwork) -> Iterator[State]:
    """Moves from a state, the most promising first.

    First those that a linear model of both programs favours (:func:`_along_weights`), then steps of the grid: the most
    sensitive outputs together, those of one point, single ones.
    """
    if found.front > found.rear:
        for share in (0.1, 0.3, 0.03, 0.6):
            yield tuple(-share * layer for layer in found.state)
    yield from _along_weights(found, network)
    flat = np.concatenate([(slope * grid).ravel() for slope, grid in zip(found.gradients, network.grid, strict=True)])
    order = np.argsort(-np.abs(flat), kind="stable")
    order = order[np.abs(flat[order]) > 0]
    for count in (_SENSITIVE, 5):
        if len(order) > count:
            yield _on_grid(network, flat, order[:count])
    points = np.concatenate([np.indices(grid.shape)[0].ravel() + 10**9 * at for at, grid in enumerate(network.grid)])
    for point in dict.fromkeys(points[order].tolist()):
        yield _on_grid(network, flat, order[points[order] == point][:_SENSITIVE])
    for entry in order[: 10 * _SENSITIVE]:
        yield _on_grid(network, flat, np.array([entry]))


def _along_weights(found: Modification, network: SeparatedNetwork) -> Iterator[State]:
    """Moves that a change of weights of least norm makes, in the direction in which the last program gains the most.

    A change D of the norm's unit ball lowers the last layer's optimum at a rate of at most the dual norm of the
    gradient with respect to weights. Under the maximum norm that is D = -sign, of as many neurons as one likes; under
    the sum norm it is one single weight. The size of the step is the one at which front and rear would balance.
    """
    slopes = []
    for slope, features, by_weights in zip(found.gradients, found.features, network.by_weights, strict=True):
        slopes.append(slope if by_weights else features.T @ slope)
    for position, slope in enumerate(slopes):
        for weights, size in _directions(found, slope, network.norm):
            move = network.unchanged
            reach = weights if network.by_weights[position] else found.features[position] @ weights
            for share in (1.0, 0.5, 0.2):
                yield tuple(share * size * reach if at == position else zeros for at, zeros in enumerate(move))


def _directions(found: Modification, slope: FloatArray, norm: Norm) -> Iterator[tuple[FloatArray, float]]:
    """Changes of weights (width, units) of norm 1, with the length of the step."""
    if norm.linf:
        rates = np.abs(slope).sum(axis=0)
        order = np.argsort(-rates, kind="stable")[:_MOST_NEURONS]
        order = order[rates[order] > 0]
        for count in dict.fromkeys((len(order), len(order) // 2, len(order) // 8)):
            if count:
                weights = np.zeros_like(slope)
                weights[:, order[:count]] = -np.sign(slope[:, order[:count]])
                yield weights, max(found.rear - found.front, 0.1 * found.rear) / (1.0 + rates[order[:count]].sum())
        return
    for entry in np.argsort(-np.abs(slope), axis=None, kind="stable")[:_ACTIONS]:
        rate = float(np.abs(slope.flat[entry]))
        if rate > 1.0:  # else the front costs more than the rear gains
            weights = np.zeros_like(slope)
            weights.flat[entry] = -np.sign(slope.flat[entry])
            yield weights, found.rear / rate


def _on_grid(network: SeparatedNetwork, flat: FloatArray, entries: IntArray) -> State:
    """A step of some entries of all layers against their gradients."""
    signs = np.zeros(len(flat))
    signs[entries] = -np.sign(flat[entries])
    ends = np.cumsum([grid.size for grid in network.grid])[:-1]
    return tuple(
        part.reshape(grid.shape) * grid for part, grid in zip(np.split(signs, ends), network.grid, strict=True)
    )


def _moved(state: State, move: State) -> State:
    return tuple(layer + change for layer, change in zip(state, move, strict=True))


def _key(state: State) -> bytes:
    return b"".join(layer.tobytes() for layer in state)


HEURISTICS: dict[str, Callable[[Search], None]] = {
    "random": random_search,
    "greedy": greedy_search,
    "mcts": monte_carlo_tree_search,
}
