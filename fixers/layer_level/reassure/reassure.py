"""REASSURE: patch networks that correct whole linear regions of the last dense layers and leave the rest untouched.

Departures from the published code: HiGHS in place of Gurobi; a region is described by matrix products instead of one
backward pass a unit; failing points that share a region share a patch; points of one region with different labels
can't all be met, and the label with more points wins; features beyond the box are held at its surface inside a
correction, so that none is larger than its gate closes; a prefix of the patches may be selected on the validation
split; sharpness may be given relative to how far apart regions lie. See also ``reassure.gated_patches``.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network
from fixers.errors import FixFailedError
from fixers.exact.dense_tail import PiecewiseLinearTail, Tail, TailLayer, find_tail, patterns, region
from fixers.exact.linear_program import check_size
from fixers.exact.margins import guarded
from fixers.fixer import Fixer, Level, parameter
from fixers.layer_level.reassure.gated_patches import Correction, GatedPatches, extended
from fixers.layer_level.reassure.region_corrections import Found, minimal_correction, scaled_correction
from fixers.problem import RepairProblem
from fixers.requirements import ConsecutiveLinear, Requirement, Traceable
from fixers.selection import Choice

# Float32 rounds outputs at about 1e-7 of their size, times the square root of the terms.
_MEDIAN_SAMPLES = 2000


@dataclass(frozen=True)
class Reassure(Fixer):
    """Add to the outputs a patch network for each failing point's linear region; no weight changes.

    The result is the original extended by a submodule ``patch``. A region is patched as a whole: every input in it
    gets the label. Each patch costs one more pass through the dense layers.

    Peak memory: the program of one region (150 bytes for each of hidden units x features, at most ``memory_gib`` or
    it is refused; about 30 times that for the minimal correction), and 8 bytes for each of micro-batch x patches x
    hidden units.
    """

    name: ClassVar[str] = "reassure"
    abbreviation: ClassVar[str] = "RA"
    level: ClassVar[Level] = "layer"
    reference: ClassVar[str] = (
        "Fu and Li: Sound and Complete Neural Network Repair with Minimality and Locality Guarantees, ICLR 2022, "
        "arXiv 2110.07682"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (ConsecutiveLinear(3), Traceable(), PiecewiseLinearTail(3))
    extends_architecture: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"points": 10},
        "study": {
            "points": 10, "sharpness": 0.5, "sharpness_unit": "absolute", "margin": 0.0, "selection": "all",
        },
    }  # fmt: skip

    correction: Literal["scaled", "minimal"] = parameter(
        "scaled",
        help="The published code's correction, or the smallest one, which takes ten times as long.",
        grid=("scaled", "minimal"),
    )
    sharpness: float = parameter(
        100.0,
        help="How fast a patch fades outside its region: below 1 (relative) it reaches typical inputs.",
        grid=(0.5, 0.9, 1.5, 10.0, 100.0),
        low=1e-9,
    )
    sharpness_unit: Literal["relative", "absolute"] = parameter(
        "relative",
        help="Relative: in 1 / the median violation of a region by other repair inputs; absolute: the paper's.",
        grid=("relative", "absolute"),
    )
    points: int = parameter(
        50, help="Failing repair samples to fix, the least violated first.", grid=(10, 20, 50, 100, 1000), low=1
    )
    margin: float = parameter(
        0.05, help="Logits by which a label must beat its rivals.", grid=(0.0, 0.05, 0.5), low=0.0
    )
    span: float = parameter(
        100.0, help="Logits by which a label may beat its rivals at most; 0 is no limit.", grid=(0.0, 100.0), low=0.0
    )
    widening: float = parameter(
        0.1, help="By how much the box of train features is widened, relative.", grid=(0.1, 0.5), low=0.0
    )
    tail: Literal["last_three", "all"] = parameter(
        "last_three", help="Patched layers: the last three dense ones or all at the end.", grid=("last_three", "all")
    )
    selection: Literal["prefix", "all"] = parameter(
        "prefix", help="Keep the first patches that are best on valid, or all.", grid=("prefix", "all")
    )
    solver_seconds: float = parameter(60.0, help="Seconds for one region, which is skipped beyond.", low=0.0)
    memory_gib: float = parameter(8.0, help="GiB that a linear program may take.", low=0.01)

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Correct one region after another, then choose how many patches to keep.

        Raises:
            FixFailedError: a region's program is too large, or none was solved.
            DeadlineExceededError: the time limit has passed.
        """
        tail = find_tail(problem.original)
        assert tail is not None  # a requirement
        tail = tail.last(3) if self.tail == "last_three" else tail
        hidden, width = tail.size
        # Before anything is copied to float64: VGG16's region alone would take 1.6 GB.
        check_size(hidden, width, hidden * width, int(self.memory_gib * 2**30))
        return _Fix(self, problem, tail).run()


class _Fix:
    """One fix."""

    def __init__(self, fixer: Reassure, problem: RepairProblem, tail: Tail) -> None:
        self._fixer, self._problem, self._tail = fixer, problem, tail
        self._layers: tuple[TailLayer, ...] = tail.layers()
        self._cut = network.cut(problem.original, tail.first)

    def run(self) -> nn.Module:
        problem, fixer = self._problem, self._fixer
        indices = self._points()
        features = self._features(indices)
        labels = problem.repair.labels[indices]
        low, high = self._box(features)
        chosen, conflicting = representatives(patterns(self._layers, features), labels)
        corrections: list[Correction] = []
        skipped: list[int] = []
        for step, position in enumerate(chosen):
            found = self._correct(features[position], int(labels[position]), low, high)
            problem.report(step, regions=len(corrections) + 1)
            if found.gain.size:
                pattern = patterns(self._layers, features[position : position + 1])[0]
                gain, offset = torch.from_numpy(found.gain), torch.from_numpy(found.offset)
                corrections.append(Correction(pattern, gain, offset))
            else:
                skipped.append(int(indices[position]))
        if not corrections:
            raise FixFailedError(f"None of {len(chosen)} regions was solved in time; raise solver_seconds.")
        gamma, typical = self._sharpness(corrections, low, high)

        def patches(count: int) -> GatedPatches:
            made = GatedPatches(self._layers, corrections[:count], sharpness=gamma, low=low, high=high)
            return made.to(problem.device).eval()

        everything = patches(len(corrections))
        scores, count = [], len(corrections)
        if fixer.selection == "prefix":
            scores, count = self._valid_scores(everything), 0
            choice = Choice(scores[0], original=True)
            for number, score in enumerate(scores[1:], start=1):
                # The largest prefix among equals: local patches leave the validation split alone, and repair more.
                if choice.offer(score, fixed=number, tie=number):
                    count = number
            problem.note(original_kept=choice.original_kept)
        model = problem.new_model()
        if count:
            model = extended(model, self._tail, patches(count)).eval()
        repaired = problem.repair.select(indices)
        wrong = problem.task.is_wrong(problem.outputs(model, repaired), repaired.labels)
        problem.note(
            points=indices.tolist(),
            points_repaired=int((~wrong).sum()),
            points_conflicting=indices[conflicting].tolist(),
            points_skipped=skipped,
            patches_made=len(corrections),
            patches_kept=count,
            sharpness=gamma,
            median_violation=typical,
            bounds=everything.ceiling.tolist(),
            valid_scores=scores,
        )
        return model

    def _points(self) -> Tensor:
        problem = self._problem
        wrong = problem.wrong.nonzero().squeeze(1)
        failing = problem.repair.select(wrong)
        depth = -problem.task.margin(problem.outputs(problem.original, failing), failing.labels)
        return wrong[depth.argsort(stable=True)][: self._fixer.points]

    def _features(self, indices: Tensor) -> Tensor:
        """What enters the tail (N, d) for repair samples, in float64 on the CPU."""
        split, found = self._problem.repair.select(indices), []
        with torch.no_grad():
            for batch in split.batches(self._problem.micro_batch, device=self._problem.device):
                self._problem.check_deadline()
                found.append(self._cut.features(batch.inputs)[0].double().cpu())
        return torch.cat(found)

    def _box(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the train features, widened, with the points inside."""
        problem = self._problem

        def compute() -> dict[str, Tensor]:
            low, high = torch.tensor(math.inf), torch.tensor(-math.inf)
            with torch.no_grad():
                for batch in problem.train.batches(problem.micro_batch, device=problem.device):
                    problem.check_deadline()
                    values = self._cut.features(batch.inputs)[0].double().cpu()
                    low, high = torch.minimum(low, values.amin(0)), torch.maximum(high, values.amax(0))
            return {"low": low, "high": high}

        seen = problem.cached("feature_range", {"layer": self._tail.first}, compute)
        extra = self._fixer.widening * (seen["high"] - seen["low"])
        return (
            torch.minimum(seen["low"] - extra, features.amin(0)),
            torch.maximum(seen["high"] + extra, features.amax(0)),
        )

    def _correct(self, inside: Tensor, label: int, low: Tensor, high: Tensor) -> Found:
        fixer, problem = self._fixer, self._problem
        where = region(self._layers, inside, low, high)
        outputs = where.gain @ where.inside + where.offset
        margin = guarded(fixer.margin, float(abs(outputs).max()))
        until = time.monotonic() + fixer.solver_seconds

        def seconds_left() -> float:
            problem.check_deadline()
            return min(until - time.monotonic(), problem.seconds_left)

        memory = int(fixer.memory_gib * 2**30)
        if fixer.correction == "minimal":
            return minimal_correction(where, label, margin=margin, seconds_left=seconds_left, memory=memory)
        span = max(fixer.span, 2 * margin) if fixer.span else math.inf
        return scaled_correction(where, label, margin=margin, span=span, seconds_left=seconds_left, memory=memory)

    def _sharpness(self, corrections: list[Correction], low: Tensor, high: Tensor) -> tuple[float, float]:
        """Gamma, and the median violation of a region by repair inputs outside of it."""
        sample = torch.arange(min(len(self._problem.repair), _MEDIAN_SAMPLES))
        features = self._features(sample)
        probe = GatedPatches(self._layers, corrections, sharpness=1.0, low=low, high=high)
        totals = []
        for part in features.split(self._problem.micro_batch):
            self._problem.check_deadline()
            totals.append(torch.stack([value.sum(2) for value in probe.violations(part)]).sum(0))
        outside = torch.cat(totals)
        outside = outside[outside > 0]
        typical = float(outside.median()) if len(outside) else 1.0
        return self._fixer.sharpness / (typical if self._fixer.sharpness_unit == "relative" else 1.0), typical

    def _valid_scores(self, patches: GatedPatches) -> list[float]:
        """Scores on the validation split with the first 0, 1, ... patches; features and gates are computed once."""
        problem = self._problem
        outputs: list[list[Tensor]] = [[] for _ in range(len(patches.pattern) + 1)]
        with torch.no_grad():
            for batch in problem.valid.batches(problem.micro_batch, device=problem.device):
                values = self._cut.features(batch.inputs)
                logits = self._cut.suffix(*values)
                supports, differences = patches.supports(values[0]), patches.differences(values[0])
                outputs[0].append(logits.cpu())
                for count in range(1, len(outputs)):
                    problem.check_deadline()
                    change = patches.combined(supports[:, :count], differences[:, :count]).to(logits.dtype)
                    outputs[count].append((logits + change).cpu())
        return [problem.task.score(torch.cat(each), problem.valid.labels) for each in outputs]


def representatives(on: Tensor, labels: Tensor) -> tuple[list[int], list[int]]:
    """One point for each region, and the points whose label another label of their region outvotes.

    Args:
        on: activation patterns (N, m) bool.
        labels: (N,).

    Returns:
        Positions of the representatives and of the outvoted, each in order; the first label wins a tie.
    """
    groups: dict[bytes, list[int]] = {}
    for position, row in enumerate(on.numpy()):
        groups.setdefault(row.tobytes(), []).append(position)
    chosen, outvoted = [], []
    for members in groups.values():
        own = labels[members].tolist()
        winner = max(own, key=own.count)
        chosen.append(members[own.index(winner)])
        outvoted += [member for member, label in zip(members, own, strict=True) if label != winner]
    return chosen, sorted(outvoted)
