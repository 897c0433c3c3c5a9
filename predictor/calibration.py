"""From scores to probabilities that mean what they say, and how well they do.

An expert's *margin* is how far its score lies above the line between chosen and not chosen: the middle between the K-th
and the (K + 1)-th largest score of its token. Its probability is sigmoid(a * margin + b), with a and b fitted per layer
and distance by logistic regression. Two numbers are enough: on the demo model's held-out text the expected calibration
error is 0.3 to 1.4 points, and neither an isotonic map of 32 knots nor a slope of its own on each side of the line
brings the Brier score down by more than 0.0005.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
_ITERATIONS = 30
_RIDGE = 1e-4  # of the pairs, on the slope in units of the margins' spread: finite where the line divides perfectly
_CLIP = 15.0  # float32 tells sigmoids apart up to here


@dataclass(frozen=True, slots=True)
class Calibration:
    """p = sigmoid(a * margin + b)."""

    a: float
    b: float

    def __call__(self, margins: NDArray[Any]) -> NDArray[np.float32]:
        """Probabilities, in the shape of the margins."""
        logits = np.float32(self.a) * np.asarray(margins, np.float32) + np.float32(self.b)
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -_CLIP, _CLIP))), np.float32)


def margins(scores: NDArray[Any], top_k: int) -> NDArray[np.float32]:
    """[n, E] scores as distances from the line between chosen and not chosen; 0 all over where all are chosen."""
    values = np.asarray(scores, np.float32)
    experts = values.shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"{top_k} experts per token of {experts}: from 1 to {experts}")
    if top_k == experts:
        return np.zeros_like(values)
    ranked = np.partition(values, experts - top_k, axis=-1)
    line = (ranked[..., experts - top_k] + ranked[..., : experts - top_k].max(axis=-1)) / 2
    return np.asarray(values - line[..., None])


def fit_calibration(margin: NDArray[Any], chosen: NDArray[np.bool_]) -> Calibration:
    """Logistic regression of what was chosen on margins, alike in shape; Newton's method, the slope held by a ridge."""
    x, y = np.asarray(margin, np.float64).ravel(), np.asarray(chosen, np.float64).ravel()
    if x.shape != y.shape or not x.size:
        raise ValueError(f"{x.size} margins for {y.size} choices: as many, and at least one")
    if not np.isfinite(x).all():
        raise ValueError("margins are to be finite numbers")
    scale = float(x.std()) or 1.0
    x = x / scale
    share = (y.sum() + 0.5) / (y.size + 1)
    slope, offset = 0.0, float(np.log(share / (1 - share)))
    ridge = _RIDGE * x.size
    best = _loss(x, y, slope, offset, ridge)
    for _ in range(_ITERATIONS):
        p = _sigmoid(slope * x + offset)
        error, weight = p - y, np.maximum(p * (1 - p), 1e-12)
        gradient = np.array([error @ x + ridge * slope, error.sum()])
        cross = weight @ x
        curvature = np.array([[weight @ (x * x) + ridge, cross], [cross, weight.sum() + 1e-9 * x.size]])
        step = np.linalg.solve(curvature, gradient)
        for _ in range(20):  # halved until it helps
            value = _loss(x, y, slope - step[0], offset - step[1], ridge)
            if value <= best:
                break
            step /= 2
        else:
            break
        slope, offset = float(slope - step[0]), float(offset - step[1])
        if best - value <= 1e-10 * best:
            break
        best = value
    return Calibration(slope / scale, offset)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -500.0, 500.0))))


def _loss(x: NDArray[np.float64], y: NDArray[np.float64], slope: float, offset: float, ridge: float) -> float:
    logits = slope * x + offset
    return float(np.logaddexp(0.0, logits).sum() - logits @ y + ridge * slope * slope / 2)


@dataclass(frozen=True, slots=True)
class Reliability:
    """A calibration curve: sums over predictions, in equal bins of the predicted probability. Curves add up."""

    count: NDArray[np.int64]
    predicted: NDArray[np.float64]  # sums of probabilities
    observed: NDArray[np.int64]  # how many came true

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(
            self.count + other.count, self.predicted + other.predicted, self.observed + other.observed
        )  # fmt: skip

    @property
    def error(self) -> float:
        """Expected calibration error: how far bins' means lie from what was observed, weighted by their counts."""
        total = int(self.count.sum())
        return float(np.abs(self.predicted - self.observed).sum() / total) if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Bins that hold something: mean predicted, share observed, count."""
        full = np.flatnonzero(self.count)
        return {
            "predicted": (self.predicted[full] / self.count[full]).tolist(),
            "observed": (self.observed[full] / self.count[full]).tolist(),
            "count": self.count[full].tolist(),
            "error": self.error,
        }


def reliability(probabilities: NDArray[Any], chosen: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """The calibration curve of predictions."""
    p, y = np.asarray(probabilities, np.float64).ravel(), np.asarray(chosen).ravel()
    if p.shape != y.shape:
        raise ValueError(f"{p.size} probabilities for {y.size} outcomes: as many")
    if p.size and not (p.min() >= 0 and p.max() <= 1):  # NaN too
        raise ValueError(f"probabilities from {p.min()} to {p.max()}: from 0 to 1")
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    return Reliability(
        np.bincount(index, minlength=bins),
        np.bincount(index, p, minlength=bins).astype(np.float64),
        np.bincount(index[y.astype(np.bool_)], minlength=bins),
    )
