"""How sure a figure is: 95 % intervals by bootstrap over sequences.

Tokens of one sequence are alike, so sequences (or the groups of them that were run together) are drawn with
replacement, never tokens. Every figure here is a ratio of two sums over such units. Draws depend on nothing but the
number of units: two predictors on the same sequences get the same ones, which makes their difference a paired one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEAST_UNITS = 5  # with fewer an interval would be a pretence
_TAILS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float | None]:
        """[value, low, high], None for NaN."""
        return [None if np.isnan(each) else round(each, 6) for each in (self.value, self.low, self.high)]


@dataclass(frozen=True, slots=True)
class Ratio:
    """part and whole: [S] sums over the tokens of each unit. Ratios over the same units add up."""

    part: NDArray[np.float64]
    whole: NDArray[np.float64]

    def __add__(self, other: "Ratio") -> "Ratio":
        return Ratio(self.part + other.part, self.whole + other.whole)

    @property
    def value(self) -> float:
        """NaN of nothing."""
        whole = float(self.whole.sum())
        return float(self.part.sum()) / whole if whole else float("nan")

    def interval(self) -> Interval:
        """The ratio and its 95 % interval."""
        return _interval(self.value, self._drawn())

    def above(self, other: "Ratio") -> Interval:
        """By how much this ratio is above another one of the same units."""
        self._alike(other)
        return _interval(self.value - other.value, self._drawn() - other._drawn())

    def gap_closed(self, other: "Ratio") -> Interval:
        """Which share of what another one, of the same units, lacks to 1 this one has more."""
        self._alike(other)
        mine, theirs = self._drawn(), other._drawn()
        lacks = 1 - other.value
        with np.errstate(divide="ignore", invalid="ignore"):
            value = (self.value - other.value) / lacks if lacks else float("nan")
            return _interval(value, np.where(theirs < 1, (mine - theirs) / (1 - theirs), np.nan))

    def _alike(self, other: "Ratio") -> None:
        if len(self.part) != len(other.part):
            raise ValueError(f"figures of {len(self.part)} and {len(other.part)} units have no paired difference")

    def _drawn(self) -> NDArray[np.float64]:
        draws = _draws(len(self.part))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((draws @ self.part) / (draws @ self.whole))


def ratio(part: NDArray[Any], whole: NDArray[Any] | float, unit: NDArray[np.int64], units: int) -> Ratio:
    """Sums by unit. part, whole: [n] of each token, or one number for all; unit: [n] which unit it is of."""
    weights = np.broadcast_to(np.asarray(whole, np.float64), unit.shape)
    sums = (np.bincount(unit, each, units).astype(np.float64) for each in (part, weights))
    return Ratio(*sums)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(drawn, _TAILS)
    return Interval(value, float(low), float(high))


@lru_cache(maxsize=8)
def _draws(units: int) -> NDArray[np.float64]:
    """[R, S] how often each unit is drawn."""
    if units < LEAST_UNITS:
        return np.full((1, units), np.nan)
    drawn = np.random.default_rng(units).multinomial(units, np.full(units, 1 / units), DRAWS).astype(np.float64)
    drawn.setflags(write=False)
    return drawn
