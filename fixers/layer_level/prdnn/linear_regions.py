"""The linear regions of a network on a flat polygon, all of them: on each the network is one affine map.

A call after the other: wherever an activation or a max-pooling changes its branch inside a region, the region is cut
in two along that line. A cut is made only where the line really passes through, so what is left at the end is the
partition by branches and nothing finer. Values are carried at the three corners of one triangle in the polygon's
plane, where the affine map of each region is extended to: an affine call is then the call itself.

Source of the idea: Sotoudeh and Thakur, "A Symbolic Neural Network Representation and its Application to Understanding,
Verifying, and Patching Networks", 2019, arXiv 1908.06223 (SyReNN).
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fixers import network
from fixers.errors import FixFailedError, UnadaptableError
from fixers.exact.arrays import FloatArray
from fixers.exact.piecewise_linear import (
    Kind,
    branch_at,
    call,
    kind_of,
    module_of,
    pool_of,
    pool_windows,
    why_not_piecewise_linear,
)

_NEAR = 1e-9
"""A distance, relative to the polygon's radius: a corner that is nearer to a line lies on it."""
_ROUNDING = 1e-12
"""Of a number, relative to the largest it is made of: what is smaller counts as zero."""


@dataclass(frozen=True)
class LinearRegions:
    """A partition of a convex polygon into R convex polygons with M corners together."""

    corners: Tensor
    """(M, *shape) float64 inputs, region by region, each anticlockwise in the plane; neighbours repeat what they
    share."""
    region: Tensor
    """(M,) int64 the region of a corner."""
    inside: Tensor
    """(R, *shape) float64: the mean of each region's corners, where no branch is in doubt."""
    polygons: tuple[FloatArray, ...]
    """R times (corners, 2): the same corners in coordinates of the plane, in which the polygon has radius 1."""

    def __len__(self) -> int:
        return len(self.polygons)


def linear_regions(model: nn.Module, polygon: Tensor, *, at_most: int = 100_000) -> LinearRegions:
    """Enumerate the regions of a convex polygon on which a network takes one branch everywhere.

    Takes about 24 bytes for each value of the widest calls and region, and some ten microseconds for each cut.

    Args:
        model: traceable, piecewise linear; not changed.
        polygon: (V, *shape) at least three inputs in one plane, in any order; the polygon is their convex hull.
        at_most: regions.

    Raises:
        UnadaptableError: a call is neither affine nor piecewise linear.
        FixFailedError: there are more regions.
        ValueError: the inputs don't span a plane.
    """
    graph_module = network.as_graph(copy.deepcopy(model).double().eval().requires_grad_(False))
    reason = why_not_piecewise_linear(graph_module, smooth=False)
    if reason is not None:
        raise UnadaptableError(f"Linear regions are those of piecewise linear networks, and {reason} isn't.")
    triangle, outline = _plane(polygon)
    with torch.no_grad():
        polygons = _Subdivision(graph_module, at_most).run(triangle, outline)
    region = np.repeat(np.arange(len(polygons)), [len(each) for each in polygons])
    centres = np.stack([each.mean(axis=0) for each in polygons])
    return LinearRegions(
        _inputs(triangle, np.concatenate(polygons)),
        torch.from_numpy(region),
        _inputs(triangle, centres),
        tuple(polygons),
    )


def _plane(polygon: Tensor) -> tuple[Tensor, FloatArray]:
    """Inputs (3, *shape) at (0, 0), (1, 0), (0, 1) of the plane, and the polygon (corners, 2), anticlockwise."""
    flat = polygon.double().flatten(1)
    origin = flat.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(flat - origin, full_matrices=False)
    flat_enough = len(sizes) < 3 or sizes[2] <= 1e-6 * sizes[0]
    if len(sizes) < 2 or sizes[1] <= 1e-9 * sizes[0] or not flat_enough:
        raise ValueError("A polygon needs three or more inputs that lie in one plane, and not on a line.")
    placed = (flat - origin) @ axes[:2].T
    radius = placed.norm(dim=1).max()
    triangle = torch.stack([origin, origin + radius * axes[0], origin + radius * axes[1]])
    points = (placed / radius).cpu().numpy()
    # Here, because it takes a quarter of a second to import and every process that runs trials imports this module.
    from scipy.spatial import ConvexHull, QhullError

    try:
        outline: FloatArray = points[ConvexHull(points).vertices]
    except QhullError as error:
        raise ValueError("A polygon needs three or more inputs that lie in one plane, and not on a line.") from error
    return triangle.reshape(3, *polygon.shape[1:]), outline


def _noise(forms: FloatArray) -> FloatArray:
    """What counts as zero (n,), for forms given at the triangle's corners (3, n)."""
    slopes = np.hypot(forms[1] - forms[0], forms[2] - forms[0])
    result: FloatArray = np.maximum(_NEAR * slopes, _ROUNDING * np.abs(forms).max(axis=0))
    return result


def _weights(points: FloatArray) -> FloatArray:
    """Shares (n, 3) of the triangle's corners in points (n, 2) of the plane."""
    result: FloatArray = np.concatenate([1.0 - points.sum(axis=1, keepdims=True), points], axis=1)
    return result


def _inputs(triangle: Tensor, points: FloatArray) -> Tensor:
    result: Tensor = torch.tensordot(torch.from_numpy(_weights(points)).to(triangle), triangle, dims=1)
    return result


class _Subdivision:
    """One walk through the calls; the regions grow in number on the way."""

    def __init__(self, graph_module: fx.GraphModule, at_most: int) -> None:
        self._graph, self._at_most = graph_module, at_most
        self._values: dict[fx.Node, Tensor] = {}  # (3 R, ...): at the triangle's corners, for each region
        self._polygons: list[FloatArray] = []

    def run(self, triangle: Tensor, outline: FloatArray) -> list[FloatArray]:
        """The polygons of all regions."""
        self._polygons = [outline]
        passed: set[fx.Node] = set()
        for node in self._graph.graph.nodes:
            if node.op == "output":
                break
            passed.add(node)
            if node.op == "placeholder":
                self._values[node] = triangle
                continue
            kind = kind_of(self._graph, node)
            if kind is Kind.CONSTANT:
                continue
            if kind is Kind.ACTIVATION:
                self._values[node] = self._activated(node)
            elif kind is Kind.MAX_POOL:
                self._values[node] = self._pooled(node)
            else:
                self._values[node] = call(self._graph, node, self._value)
            for source in node.all_input_nodes:
                if all(user in passed and kind_of(self._graph, user) is not Kind.CONSTANT for user in source.users):
                    self._values.pop(source, None)
        return self._polygons

    def _value(self, node: fx.Node) -> Any:
        # The number of regions changes on the way, and with it what a call of size gives: ask when it is needed.
        return self._values[node] if node in self._values else call(self._graph, node, self._value)

    def _activated(self, node: fx.Node) -> Tensor:
        source, module = node.all_input_nodes[0], module_of(self._graph, node)
        before = self._at_corners(source)
        corners = _corners_of(module)
        cells: list[list[FloatArray]] = []
        for polygon, own in zip(self._polygons, before, strict=True):
            parts = [polygon]
            numbers, least = _weights(polygon) @ own, _noise(own)  # (corners, numbers), (numbers,)
            for corner in corners:
                crossed = ((numbers - corner).min(axis=0) < -least) & ((numbers - corner).max(axis=0) > least)
                for index in np.flatnonzero(crossed):
                    parts = _cut(parts, own[:, index] - corner, float(least[index]))
            cells.append(parts)
        self._divide(cells)
        before = self._at_corners(source)
        centre = np.stack([_weights(each.mean(axis=0)[None])[0] for each in self._polygons])  # (R, 3)
        reference = np.einsum("rt,rtn->rn", centre, before)
        branch = branch_at(module, torch.from_numpy(reference))
        after = branch.slope[:, None] * torch.from_numpy(before) + branch.offset[:, None]
        return after.to(self._values[source]).reshape(self._values[source].shape)

    def _pooled(self, node: fx.Node) -> Tensor:
        source, pool = node.all_input_nodes[0], pool_of(self._graph, node)
        entering = self._values[source]
        shape = pool(entering[:1]).shape[1:]
        windows = pool_windows(pool, tuple(entering.shape[1:]), tuple(shape))
        cells: list[list[FloatArray]] = []
        for polygon, own in zip(self._polygons, self._at_corners(source), strict=True):
            members = np.where(windows >= 0, (_weights(polygon) @ own)[:, windows], -np.inf)  # (corners, windows, k)
            # A difference of two has at most the noise of both.
            least = 2.0 * np.where(windows >= 0, _noise(own)[windows], 0.0).max(axis=1)
            best = members.max(axis=2, keepdims=True)
            contested = ~(members >= best - least[:, None]).all(axis=0).any(axis=1)
            parts = [polygon]
            for index in np.flatnonzero(contested):
                candidates = own[:, windows[index][windows[index] >= 0]]
                parts = [cell for part in parts for cell in _winning(part, candidates, float(least[index]))]
            cells.append(parts)
        self._divide(cells)
        before = self._at_corners(source)
        centre = np.stack([_weights(each.mean(axis=0)[None])[0] for each in self._polygons])
        reference = np.einsum("rt,rtn->rn", centre, before)
        winner = windows[
            np.arange(len(windows)), np.where(windows >= 0, reference[:, windows], -np.inf).argmax(axis=2)
        ]  # (R, windows)
        taken = np.take_along_axis(before, winner[:, None], axis=2)
        return torch.from_numpy(taken).to(entering).reshape(-1, *shape)

    def _at_corners(self, node: fx.Node) -> FloatArray:
        """(R, 3, numbers)."""
        result: FloatArray = self._values[node].reshape(len(self._polygons), 3, -1).cpu().numpy()
        return result

    def _divide(self, cells: list[list[FloatArray]]) -> None:
        """Replace each region by its parts, which inherit its values."""
        count = sum(len(parts) for parts in cells)
        if count > self._at_most:
            raise FixFailedError(
                f"The polygon has more than {self._at_most} linear regions; use a smaller one or raise at_most."
            )
        parent = torch.from_numpy(np.repeat(np.arange(len(cells)), [len(parts) for parts in cells]))
        for node, values in self._values.items():
            self._values[node] = values.unflatten(0, (-1, 3))[parent.to(values.device)].flatten(0, 1)
        self._polygons = [part for parts in cells for part in parts]


def _corners_of(activation: nn.Module | None) -> tuple[float, ...]:
    if isinstance(activation, nn.Hardtanh):
        return float(activation.min_val), float(activation.max_val)
    return (0.0,)


def _cut(parts: list[FloatArray], form: FloatArray, least: float) -> list[FloatArray]:
    """Polygons, those in two where a form, given at the triangle's corners (3,), changes its sign inside."""
    counts = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
    starts = np.cumsum(counts) - counts
    values = _weights(np.concatenate(parts)) @ form
    crossed = np.minimum.reduceat(values, starts) < -least
    crossed &= np.maximum.reduceat(values, starts) > least
    whole = [part for part, cut in zip(parts, crossed, strict=True) if not cut]
    for index in np.flatnonzero(crossed):
        own = values[starts[index] : starts[index] + counts[index]]
        whole += [_clipped(parts[index], own, least), _clipped(parts[index], -own, least)]
    return whole


def _winning(polygon: FloatArray, candidates: FloatArray, least: float) -> list[FloatArray]:
    """For each of some forms (3, k) the part where it is the largest, where there is one."""
    cells, seen = [], np.empty((3, 0))
    for candidate in candidates.T:
        values = _weights(polygon) @ (seen - candidate[:, None])
        if (np.abs(values).max(axis=0, initial=0.0) <= least).any():  # the same form again
            continue
        seen = np.concatenate([seen, candidate[:, None]], axis=1)
        part: FloatArray | None = polygon
        for rival in candidates.T:
            if part is None:
                break
            values = _weights(part) @ (candidate - rival)
            if np.abs(values).max() > least:
                part = None if values.max() <= least else _clipped(part, values, least)
        if part is not None:
            cells.append(part)
    return cells


def _clipped(polygon: FloatArray, values: FloatArray, least: float) -> FloatArray:
    """The part of a convex polygon where a form is positive, for its values (corners,), one of them positive."""
    signs = np.where(np.abs(values) <= least, 0, np.sign(values))
    corners = []
    for index, corner in enumerate(polygon):
        following = (index + 1) % len(polygon)
        if signs[index] >= 0:
            corners.append(corner)
        if signs[index] * signs[following] < 0:
            share = values[index] / (values[index] - values[following])
            corners.append(corner + share * (polygon[following] - corner))
    return np.stack(corners)
