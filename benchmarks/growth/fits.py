"""How a figure grows: the exponent a of figure ~ grown^a, by least squares of logarithms.

Over all points, and over the upper half of them: where a fixed cost hides the growth at first, that is nearer to what
comes beyond the last point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST_POINTS = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """exponent, upper: over all points, and over the upper half. r2: share of the logarithms' variance explained."""

    exponent: float
    upper: float
    r2: float

    def __str__(self) -> str:
        return f"{self.exponent:+.2f} (upper half {self.upper:+.2f})"


def fit(grown: Sequence[float], figures: Sequence[float]) -> Fit | None:
    """None where there are too few points, or a figure has no logarithm."""
    if len(grown) != len(figures):
        raise ValueError(f"{len(grown)} points have {len(figures)} figures: give one each")
    if len(grown) < _LEAST_POINTS or min(*grown, *figures) <= 0:
        return None
    x, y = np.log(np.asarray(grown, np.float64)), np.log(np.asarray(figures, np.float64))
    half = len(x) // 2 if len(x) >= 2 * _LEAST_POINTS else 0
    slope, residual = _line(x, y)
    total = float(((y - y.mean()) ** 2).sum())
    return Fit(slope, _line(x[half:], y[half:])[0], 1 - residual / total if total > 0 else 1.0)


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """The slope of the least squares' line, and the sum of its squared residuals."""
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(((y - slope * x - offset) ** 2).sum())


MEASURED = ("plan_us", "forecast_us", "lookup_us", "divide_us", "layer_us", "scheduler_bytes")
SIMULATED = ("tokens_per_s",)


def figure(cell: Mapping[str, Any], name: str) -> float | None:
    """A cell's figure, the median where there are several; None where the model does not fit the card."""
    part = cell["measured" if name in MEASURED else "simulated"]
    if part is None:
        return None
    value = part[name]
    return float(value["median"] if isinstance(value, dict) else value)


def points(axis: str, cells: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """What grows, and the figure, of the cells that have one."""
    found = [(float(cell[axis]), value) for cell in cells if (value := figure(cell, name)) is not None]
    return [x for x, _ in found], [y for _, y in found]


def fits(axis: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Fit | None]:
    """Of all figures along an axis."""
    return {name: fit(*points(axis, cells, name)) for name in (*MEASURED, *SIMULATED)}
