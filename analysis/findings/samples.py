"""What became of single samples."""

from collections.abc import Mapping, Sequence
from itertools import product

from analysis.statistics import bootstrap
from analysis.statistics.bootstrap import Flips
from analysis.statistics.paired import Interval


class Samples:
    """What became of every test image of a subject under every fixer and seed.

    Only images that some fix changed are kept one by one; the others are two counts.

    Args:
        flips: per fixer with predictions that agree with its trials' rows; all of the same images.
        rest_wrong: images wrong in the original and under every fix.
        rest_right: images right in the original and under every fix.
        seeds: of the rows of every fixer's flips, ascending; empty where not known.

    Attributes:
        replicates: bootstrap replicates of every fixer, and of the original under None.
        intervals: of every fixer, from the bootstrap.
    """

    def __init__(
        self,
        flips: Mapping[str, Flips],
        rest_wrong: int,
        rest_right: int,
        seeds: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._flips = flips
        self._seeds = seeds or {}
        self.replicates = bootstrap.replicate(flips, rest_wrong, rest_right)
        fixed = {fixer: self.replicates[fixer] for fixer in flips}
        self.intervals = bootstrap.intervals(fixed)
        self._rises = bootstrap.differences(fixed, self.replicates[None])

    @property
    def fixers(self) -> tuple[str, ...]:
        """Fixers with predictions that agree with their trial rows."""
        return tuple(self._flips)

    def difference(self, first: str, second: str | None) -> dict[bootstrap.Metric, Interval]:
        """First minus second (None: the original), with 95 % intervals, paired by image."""
        if second is None:
            return self._rises[first]
        return bootstrap.differences({first: self.replicates[first]}, self.replicates[second])[first]

    def discordant(self, first: str, second: str | None) -> list[tuple[int, int]]:
        """Images that only the first and only the second gets right, per pair of runs.

        Runs with the same seed are a pair. Fixers that don't have the same seeds are paired in every way, so that no
        run is left out of what is claimed of its fixer.
        """
        a = self._flips[first]
        if second is None:
            return [(int(x.sum()), int(y.sum())) for x, y in zip(a.repaired, a.broken, strict=True)]
        b = self._flips[second]
        runs = zip(a.repaired, a.broken, strict=True), zip(b.repaired, b.broken, strict=True)
        same = first in self._seeds and self._seeds[first] == self._seeds.get(second)
        return [
            (int((x & ~u).sum() + (v & ~y).sum()), int((u & ~x).sum() + (y & ~v).sum()))
            for (x, y), (u, v) in (zip(*runs, strict=True) if same else product(*runs))
        ]
