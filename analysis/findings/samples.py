"""What became of single samples."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from analysis.statistics import crossed
from analysis.statistics.crossed import Flips, Measured
from analysis.statistics.paired import Interval

Metric = Literal["accuracy", "repair_rate", "negative_flip_rate"]
METRICS: Final[tuple[Metric, ...]] = get_args(Metric)


class Samples:
    """What became of every test image of a subject under every fixer and seed.

    Only images that some fix changed are kept one by one; the others are two counts.

    Args:
        flips: per fixer with predictions that agree with its trials' rows; all of the same images.
        rest_wrong: images wrong in the original and under every fix.
        rest_right: images right in the original and under every fix.
        seeds: of the rows of every fixer's flips, ascending; empty where not known.

    Attributes:
        intervals: of every fixer, over images and seeds.
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
        self._rest_wrong, self._rest_right = rest_wrong, rest_right
        self.intervals = {fixer: self._of(fixer) for fixer in flips}

    @property
    def fixers(self) -> tuple[str, ...]:
        """Fixers with predictions that agree with their trial rows."""
        return tuple(self._flips)

    def difference(self, first: str, second: str | None) -> dict[Metric, Interval]:
        """First minus second (None: the original), with 95 % intervals, paired by image."""
        a = self._flips[first]
        if second is None:
            # The original repairs and breaks nothing, in any study.
            return self.intervals[first] | {"accuracy": self._rise(a)}
        b = self._flips[second]
        n_wrong = a.repaired.shape[1] + self._rest_wrong
        n = n_wrong + a.broken.shape[1] + self._rest_right
        shared = crossed.shared_covariance
        # What is wrong after the one and after the other: accuracies differ by as much, the other way round.
        wrong = shared(_wrong(a), _wrong(b), n, self._rest_wrong)
        return {
            "accuracy": crossed.difference(self._wrong(b), self._wrong(a), wrong),
            "repair_rate": crossed.difference(
                self._repaired(a), self._repaired(b), shared(a.repaired, b.repaired, n_wrong)
            ),
            "negative_flip_rate": crossed.difference(self._broken(a), self._broken(b), shared(a.broken, b.broken, n)),
        }

    def _of(self, fixer: str) -> dict[Metric, Interval]:
        flips = self._flips[fixer]
        wrong = crossed.interval(self._wrong(flips))
        return {
            "accuracy": Interval(1 - wrong.high, 1 - wrong.estimate, 1 - wrong.low),
            "repair_rate": crossed.interval(self._repaired(flips)),
            "negative_flip_rate": crossed.interval(self._broken(flips)),
        }

    def _rise(self, flips: Flips) -> Interval:
        """Of accuracy: what was repaired minus what was broken, of all images."""
        others = flips.broken.shape[1] + self._rest_right
        gained = crossed.measure(flips.repaired, never=self._rest_wrong + others)
        lost = self._broken(flips)
        both = crossed.measure(
            np.concatenate([flips.repaired.astype(float), -flips.broken.astype(float)], axis=1),
            never=self._rest_wrong + self._rest_right,
        )
        return crossed.difference(gained, lost, (gained.variance + lost.variance - both.variance) / 2)

    def _repaired(self, flips: Flips) -> Measured:
        return crossed.measure(flips.repaired, never=self._rest_wrong)

    def _broken(self, flips: Flips) -> Measured:
        failures = flips.repaired.shape[1] + self._rest_wrong
        return crossed.measure(flips.broken, never=failures + self._rest_right)

    def _wrong(self, flips: Flips) -> Measured:
        return crossed.measure(_wrong(flips), always=self._rest_wrong, never=self._rest_right)

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


def _wrong(flips: Flips) -> NDArray[np.bool_]:
    """Which of the changed images every seed gets wrong; (seeds, images)."""
    return np.concatenate([~flips.repaired, flips.broken], axis=1)
