"""Predictors that need no training worth the name: what a learned one has to beat.

Each counts once over training sequences (`fit`) and is behind `Predictor` then. Counts are smoothed: an expert that was
never seen is improbable, not impossible.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.calibration import Calibration, fit_calibration, margins
from moe_offload.predictor.trace import Trace

Sequences = Sequence[int] | NDArray[np.int64]
_PRIOR = 8.0  # tokens that the prior counts for
_MOST = 65536  # training tokens that two numbers are fitted on


def source_of(trace: Trace, layer: int, distance: int) -> int:
    """The source from which `layer` is `distance` ahead."""
    source = layer - distance + 1
    if not 1 <= distance <= trace.info.distances or not 0 <= source <= layer < trace.info.layers:
        raise ValueError(
            f"layer {layer} from {distance} before: layers are 0 to {trace.info.layers - 1}, distances 1 to "
            f"{trace.info.distances} and at most the layer's number + 1"
        )
    return source


@dataclass(frozen=True, slots=True)
class Frequency:
    """How often each layer used each expert. shares: [L, E]."""

    shares: NDArray[np.float32]
    name: ClassVar[str] = "frequency"

    @classmethod
    def fit(cls, trace: Trace, sequences: Sequences) -> Self:
        """Count over training sequences."""
        tokens = _some(trace, sequences)
        prior = trace.info.top_k / trace.info.experts
        counts = np.stack([_counts(trace, layer, tokens) for layer in range(trace.info.layers)])
        return cls(((counts + _PRIOR * prior) / (len(tokens) + _PRIOR)).astype(np.float32))

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """As of `Predictor`."""
        source_of(trace, layer, distance)
        return np.repeat(self.shares[layer][None], len(tokens), axis=0)


@dataclass(frozen=True, slots=True)
class PreviousToken:
    """Whether the token before had the expert in the same layer. In a prompt that is not known: frequency.

    again: [L, 2, E] probabilities where the token before had it not, and where it had.
    """

    frequency: Frequency
    again: NDArray[np.float32]
    name: ClassVar[str] = "previous token"

    @classmethod
    def fit(cls, trace: Trace, sequences: Sequences) -> Self:
        """Count over training sequences."""
        frequency = Frequency.fit(trace, sequences)
        tokens = _some(trace, sequences)
        tokens = tokens[trace.before(tokens) >= 0]
        again = np.empty((trace.info.layers, 2, trace.info.experts), np.float32)
        for layer in range(trace.info.layers):
            last, now = trace.chosen(layer, tokens - 1), trace.chosen(layer, tokens)
            for had in (0, 1):
                where = last == bool(had)
                seen, came = where.sum(axis=0), (where & now).sum(axis=0)
                prior = (came.sum() + 1e-3) / (seen.sum() + 2e-3)  # of all experts of the layer
                again[layer, had] = (came + _PRIOR * prior) / (seen + _PRIOR)
        return cls(frequency, again)

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """As of `Predictor`."""
        found = self.frequency.probabilities(trace, layer, distance, tokens, decode=decode)
        known = np.flatnonzero(trace.before(tokens) >= 0) if decode else np.empty(0, np.int64)
        last = trace.chosen(layer, tokens[known] - 1)
        found[known] = np.where(last, self.again[layer, 1], self.again[layer, 0])
        return found


@dataclass(frozen=True, slots=True)
class Transition:
    """What usually follows the experts of the layer before the source, which is known; the first source has none.

    Each of the K experts there says how probable each expert of the target is; what they say beyond the target's own
    frequency adds up (naive Bayes), and as they are not independent, the sum is calibrated. evidence: by (layer,
    distance), [E + 1, E] in logits; the last row is the frequency's.
    """

    frequency: Frequency
    evidence: dict[tuple[int, int], NDArray[np.float32]]
    calibration: dict[tuple[int, int], Calibration]
    name: ClassVar[str] = "layer to layer"

    @classmethod
    def fit(cls, trace: Trace, sequences: Sequences) -> Self:
        """Count over training sequences."""
        frequency, tokens = Frequency.fit(trace, sequences), _some(trace, sequences)
        chosen = [trace.chosen(layer, tokens) for layer in range(trace.info.layers)]
        fitted = cls(frequency, {}, {})
        for layer in range(trace.info.layers):
            base = frequency.shares[layer].astype(np.float64)
            for distance in range(1, min(trace.info.distances, layer) + 1):
                given = chosen[layer - distance].astype(np.float32)
                pairs = (given.T @ chosen[layer].astype(np.float32)).astype(np.float64)  # exact to 2^24 tokens
                conditional = (pairs + _PRIOR * base) / (given.sum(axis=0, dtype=np.float64)[:, None] + _PRIOR)
                known = _logit(conditional) - _logit(base)
                fitted.evidence[layer, distance] = np.vstack([known, _logit(base)]).astype(np.float32)
                some = slice(None, _MOST)
                said = fitted._margins(trace, layer, distance, tokens[some])
                fitted.calibration[layer, distance] = fit_calibration(said, chosen[layer][some])
        return fitted

    def _margins(self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        evidence = self.evidence[layer, distance]
        before = trace.experts[layer - distance, tokens].astype(np.int64)
        scores = np.repeat(evidence[-1][None], len(tokens), axis=0)
        for choice in range(before.shape[1]):
            scores += evidence[before[:, choice]]
        return margins(scores, trace.info.top_k)

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """As of `Predictor`."""
        if source_of(trace, layer, distance) == 0:
            return self.frequency.probabilities(trace, layer, distance, tokens, decode=decode)
        return self.calibration[layer, distance](self._margins(trace, layer, distance, tokens))


@dataclass(frozen=True, slots=True)
class LookAhead:
    """The target's own router applied to what the source knows, calibrated."""

    calibration: dict[tuple[int, int], Calibration]
    name: ClassVar[str] = "gate look-ahead"

    @classmethod
    def fit(cls, trace: Trace, sequences: Sequences) -> Self:
        """Fit slopes and offsets on training sequences."""
        tokens = _some(trace, sequences)[:_MOST]
        found = {}
        for layer in range(trace.info.layers):
            chosen = trace.chosen(layer, tokens)
            for distance in range(1, min(trace.info.distances, layer + 1) + 1):
                looked = trace.look[layer - distance + 1, tokens, distance - 1]
                found[layer, distance] = fit_calibration(margins(looked, trace.info.top_k), chosen)
        return cls(found)

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """As of `Predictor`."""
        looked = trace.look[source_of(trace, layer, distance), tokens, distance - 1]
        return self.calibration[layer, distance](margins(looked, trace.info.top_k))


@dataclass(frozen=True, slots=True)
class Perfect:
    """Knows. No predictor: the ceiling for what prediction is worth."""

    name: ClassVar[str] = "perfect"

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """As of `Predictor`."""
        source_of(trace, layer, distance)
        return trace.chosen(layer, tokens).astype(np.float32)


def _some(trace: Trace, sequences: Sequences) -> NDArray[np.int64]:
    tokens = trace.tokens(sequences)
    if not len(tokens):
        raise ValueError("no training sequences: give at least one")
    return tokens


def _counts(trace: Trace, layer: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    picked = trace.experts[layer, tokens].ravel().astype(np.int64)
    return np.bincount(picked, minlength=trace.info.experts).astype(np.float64)


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(p, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
