"""What a predictor is measured by, defined once.

Of each layer, each distance, and of decode and prefill apart. K experts are routed to per token:

    recall          slot recall@k: |predicted top K and routed| / K. The fresh router itself has 1.
    recall_beyond   the same with the predicted top K + m (of E at most), m = 1, 2, 4
    exact           share of tokens whose whole set is the predicted top K
    loose           |predicted top K and the K + 2 largest scores| / K
    four_in_six     the same with a predicted top 4 and the 6 largest scores, whatever K is: what LayerScope's predictor
                    (LLaPor) reports as accuracy. Not a recall: with K of 2 it counts what was never routed to.
                    Not given with fewer than 6 experts.
    brier           mean of (p - came)^2 over tokens and experts
    curve           predicted against observed, and expected calibration error

Presence, whether an expert gets any token of a batch, by the operating threshold on its probability:

    precision       of the experts predicted, how many came
    recall          of those that came, how many were predicted
    brier, curve    of the probability of presence

Tokens and batches are those of `samples`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.calibration import Reliability, reliability
from moe_offload.predictor.interface import Predictor
from moe_offload.predictor.presence import presence
from moe_offload.predictor.resampling import Ratio, ratio
from moe_offload.predictor.samples import Batch, Sample
from moe_offload.predictor.trace import Trace

BEYOND = (1, 2, 4)
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Presence:
    """Of batches of one size."""

    precision: Ratio
    recall: Ratio
    brier: Ratio
    curve: Reliability

    def __add__(self, other: "Presence") -> "Presence":
        return Presence(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_dict(self) -> dict[str, Any]:
        """Figures with intervals."""
        return {
            "precision": self.precision.interval().to_list(),
            "recall": self.recall.interval().to_list(),
            "brier": self.brier.interval().to_list(),
            "calibration": self.curve.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of a layer at a distance, or of several, added up."""

    recall: Ratio
    recall_beyond: dict[int, Ratio]
    exact: Ratio
    loose: Ratio
    four_in_six: Ratio
    brier: Ratio
    curve: Reliability
    presence: dict[int, Presence]

    def __add__(self, other: "Figures") -> "Figures":
        def both(mine: Any, theirs: Any) -> Any:
            return {key: mine[key] + theirs[key] for key in mine} if isinstance(mine, dict) else mine + theirs

        return Figures(*(both(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def to_dict(self) -> dict[str, Any]:
        """Figures as [value, low, high] of the 95 % interval."""
        single = ("recall", "exact", "loose", "four_in_six", "brier")
        return {
            **{name: getattr(self, name).interval().to_list() for name in single},
            "recall_beyond": {str(m): each.interval().to_list() for m, each in self.recall_beyond.items()},
            "calibration": self.curve.to_dict(),
            "presence": {str(size): each.to_dict() for size, each in self.presence.items()},
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One predictor on some sequences. figures: by (layer, distance)."""

    predictor: str
    decode: bool
    threshold: float
    sequences: int
    tokens: int
    figures: dict[tuple[int, int], Figures]

    def at(self, distance: int, *, sources: slice = slice(None)) -> Figures:
        """All layers at a distance, or those predicted from some sources: the first is the embedding."""
        layers = [layer for layer, far in sorted(self.figures) if far == distance][sources]
        if not layers:
            raise ValueError(f"no layer was evaluated at distance {distance} from these sources")
        return reduce(add, (self.figures[layer, distance] for layer in layers))

    def to_dict(self) -> dict[str, Any]:
        """By distance: all layers, those predicted from the embedding and from layers apart, and each."""
        found: dict[str, Any] = {}
        for distance in sorted({distance for _, distance in self.figures}):
            layers = sorted(layer for layer, far in self.figures if far == distance)
            found[str(distance)] = {
                **self.at(distance).to_dict(),
                "recall_from_embedding": self.at(distance, sources=slice(1)).recall.interval().to_list(),
                "layers": {
                    str(layer): {
                        "recall": self.figures[layer, distance].recall.interval().to_list(),
                        "exact": self.figures[layer, distance].exact.interval().to_list(),
                        "brier": self.figures[layer, distance].brier.interval().to_list(),
                        "calibration_error": self.figures[layer, distance].curve.error,
                    }
                    for layer in layers
                },
            }
            if len(layers) > 1:
                beyond = self.at(distance, sources=slice(1, None)).recall
                found[str(distance)]["recall_from_layers"] = beyond.interval().to_list()
        return {
            "predictor": self.predictor,
            "decode": self.decode,
            "threshold": self.threshold,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "distances": found,
        }


def evaluate(
    predictor: Predictor,
    trace: Trace,
    sample: Sample,
    *,
    threshold: float = THRESHOLD,
    overlaps: Mapping[int, float] | None = None,
) -> Evaluation:
    """Measure a predictor at every layer and distance.

    overlaps: of each distance, for presence in prompts (`prompt_overlaps`, fitted on other sequences); 0 without.
    """
    if not len(sample.tokens):
        raise ValueError("no tokens to measure a predictor on: give sequences of at least two tokens")
    figures = {}
    for layer in range(trace.info.layers):
        chosen = trace.chosen(layer, sample.tokens)
        ranked = np.argsort(-trace.scores[layer, sample.tokens].astype(np.float32), axis=1, kind="stable")
        for distance in range(1, min(trace.info.distances, layer + 1) + 1):
            p = predictor.probabilities(trace, layer, distance, sample.tokens, decode=sample.decode)
            if p.shape != chosen.shape:
                raise ValueError(f"{predictor.name} gave probabilities of shape {p.shape} instead of {chosen.shape}")
            overlap = 0.0 if sample.decode or overlaps is None else overlaps[distance]
            figures[layer, distance] = _figures(p, chosen, ranked, trace.info.top_k, sample, threshold, overlap)
    return Evaluation(predictor.name, sample.decode, threshold, sample.units, len(sample.tokens), figures)


def _figures(
    p: NDArray[np.float32],
    chosen: NDArray[np.bool_],
    ranked: NDArray[np.int64],
    top_k: int,
    sample: Sample,
    threshold: float,
    overlap: float,
) -> Figures:
    experts = p.shape[1]
    order = np.argsort(-p, axis=1, kind="stable")[:, : max(top_k + max(BEYOND), 4)]
    hits = np.take_along_axis(chosen, order, axis=1).cumsum(axis=1)

    def share(part: NDArray[Any], whole: float) -> Ratio:
        return ratio(part, whole, sample.unit, sample.units)

    def within(predicted: int, largest: int) -> Ratio:
        if largest > experts and predicted == 4:
            return share(np.zeros(len(p)), 0.0)
        near = np.zeros(p.shape, np.bool_)
        np.put_along_axis(near, ranked[:, :largest], True, axis=1)
        return share(np.take_along_axis(near, order[:, :predicted], axis=1).sum(axis=1), predicted)

    return Figures(
        recall=share(hits[:, top_k - 1], top_k),
        recall_beyond={m: share(hits[:, min(top_k + m, experts) - 1], top_k) for m in BEYOND},
        exact=share(hits[:, top_k - 1] == top_k, 1.0),
        loose=within(top_k, top_k + 2),
        four_in_six=within(4, 6),
        brier=share(np.square(p - chosen).sum(axis=1), experts),
        curve=reliability(p, chosen),
        presence={batch.size: _presence(p, chosen, batch, threshold, overlap) for batch in sample.batches},
    )


def _presence(
    p: NDArray[np.float32], chosen: NDArray[np.bool_], batch: Batch, threshold: float, overlap: float
) -> Presence:
    if not len(batch.unit):
        nothing = Ratio(np.zeros(0), np.zeros(0))
        return Presence(nothing, nothing, nothing, reliability(np.zeros(0), np.zeros(0, np.bool_)))
    said = presence(p[batch.rows], batch.starts, overlap=overlap)
    came = np.logical_or.reduceat(chosen[batch.rows], batch.starts[:-1], axis=0)
    predicted = said >= threshold
    right = (predicted & came).sum(axis=1)
    return Presence(
        precision=ratio(right, predicted.sum(axis=1), batch.unit, batch.units),
        recall=ratio(right, came.sum(axis=1), batch.unit, batch.units),
        brier=ratio(np.square(said - came).sum(axis=1), came.shape[1], batch.unit, batch.units),
        curve=reliability(said, came),
    )
