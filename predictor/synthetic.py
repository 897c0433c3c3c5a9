"""Routing traces of models that nobody had to run: of any size, with given skew, temporal locality and predictability.

A token's hidden state at layer l is part what the token is at every layer and part the layer's own; both drift along a
sequence (an autoregressive process), so that neighbours route alike. Routers are random rows, with an offset for each
expert that makes some popular. The scores of a look-ahead are the true ones and an error that grows with the distance.
Part of the error is a fixed low-rank function of the hidden state at the source, which is in the trace: a predictor can
learn it. The rest is noise: nobody can.

Strengths are searched for until some layers of a sample show what was asked for. `measure` tells what a trace has, made
or real. Results from such a trace are to say "synthetic", as `TraceInfo.model` does: how predictable a model is, only
traces of that model can tell.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.trace import DISTANCES, FORMAT, TEST, TRAIN, VALIDATION, Trace, TraceInfo

POPULAR = 0.25  # of the experts: those whose share of all slots tells the skew
_SAMPLE = 4096  # tokens that strengths are searched on
_LAYERS = 4
_RANK = 8  # of what can be learned
_OWN = 0.5  # of a hidden state's variance: the layer's own
_STEPS = 24  # of a search
_MOST = 60.0


@dataclass(frozen=True, slots=True)
class Routing:
    """What is asked of a trace, or found in one.

    popular: share of slots on each layer's most used quarter of experts. repeats: of the experts of a token, those that
    the token before had too. recall: slot recall@k of the look-ahead from layers, at distances 1, 2, 3. embedding: the
    same from the first source, at all distances.
    """

    popular: float = 0.5
    repeats: float = 0.35
    recall: tuple[float, float, float] = (0.85, 0.81, 0.77)
    embedding: float = 0.3


@dataclass(frozen=True, slots=True)
class Size:
    """Of the model and the trace. The first prompt_tokens of each sequence count as given, the others as generated."""

    layers: int = 48
    experts: int = 128
    top_k: int = 8
    sequences: int = 16
    tokens: int = 64
    prompt_tokens: int = 32
    hidden: int = 64


def synthetic_trace(size: Size, routing: Routing, *, learnable: float = 0.5, seed: int = 0) -> Trace:
    """Make a trace. learnable: of the look-ahead error's variance, what is a function of the hidden state.

    Raises ValueError when what is asked for cannot be had together, with the bound. Sequences are split 8 to 1 to 1.
    """
    _check(size, routing, learnable)
    rng = np.random.default_rng(seed)
    layers, experts, width = size.layers, size.experts, size.hidden
    rows = rng.standard_normal((layers, experts, width)).astype(np.float32) / np.sqrt(np.float32(width))
    offsets = rng.standard_normal((layers, experts)).astype(np.float32)
    mixing = _low_rank(rng, layers, experts, width)
    strength = _strengths(rng, rows, offsets, mixing, size, routing, learnable)
    states, tokens = _states(rng, size, strength.drift), size.sequences * size.tokens
    scores = (np.einsum("lnp,lep->lne", states[1:], rows) + strength.skew * offsets[:, None]).astype(np.float16)
    look = np.zeros((layers, tokens, DISTANCES, experts), np.float16)
    for layer in range(layers):
        for distance in range(1, min(DISTANCES, layer + 1) + 1):
            source = layer - distance + 1
            error = _error(rng, states[source], mixing[layer, distance - 1], learnable)
            size_of_it = strength.errors[distance - 1 if source else DISTANCES]
            looked = scores[layer].astype(np.float32) + np.float32(size_of_it) * error
            look[source, :, distance - 1] = looked.astype(np.float16)
    chosen = _top(scores, size.top_k)
    picked = np.take_along_axis(scores, chosen, axis=2).astype(np.float32)
    weights = np.exp(picked - picked.max(axis=2, keepdims=True))
    scale = np.abs(states[:-1]).max(axis=2) / 127
    hidden = np.rint(states[:-1] / scale.astype(np.float16).astype(np.float32)[..., None])
    return Trace(
        TraceInfo(FORMAT, "synthetic", "synthetic", layers, experts, size.top_k, width, width, note=f"seed {seed}"),
        starts=np.arange(size.sequences + 1, dtype=np.int64) * size.tokens,
        prompt_tokens=np.full(size.sequences, size.prompt_tokens, np.int64),
        split=_splits(size.sequences),
        experts=chosen.astype(np.uint8 if experts <= 256 else np.uint16),
        weights=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        scores=scores,
        look=look,
        hidden=np.clip(hidden, -127, 127).astype(np.int8),
        hidden_scale=scale.astype(np.float16),
        projection=np.repeat(np.eye(width, dtype=np.float32)[None], layers, axis=0),
        offset=np.zeros((layers, width), np.float32),
        variance=np.ones((layers, width), np.float32),
    )


def measure(trace: Trace) -> Routing:
    """What a trace has of what can be asked for. Of few tokens `popular` comes out high: chance makes favourites."""
    tokens = np.arange(trace.experts.shape[1])
    follows = tokens[trace.before(tokens) >= 0]
    popular, repeats = [], []
    recall: list[list[float]] = [[] for _ in range(DISTANCES + 1)]  # by distance; the last from the embedding
    for layer in range(trace.info.layers):
        chosen = trace.chosen(layer, tokens)
        popular.append(_popular(chosen))
        if len(follows):
            repeats.append(float((chosen[follows] & chosen[follows - 1]).sum() / chosen[follows].sum()))
        for distance in range(1, min(DISTANCES, layer + 1) + 1):
            source = layer - distance + 1
            found = _recall(trace.look[source, :, distance - 1], chosen, trace.info.top_k)
            recall[distance - 1 if source else DISTANCES].append(found)
    means = tuple(float(np.mean(each)) if each else float("nan") for each in recall)
    again = float(np.mean(repeats)) if repeats else float("nan")
    return Routing(float(np.mean(popular)), again, (means[0], means[1], means[2]), means[3])


@dataclass(frozen=True, slots=True)
class _Strengths:
    skew: float
    drift: float  # correlation of neighbouring tokens' states
    errors: tuple[float, ...]  # by distance; the last from the embedding


def _strengths(
    rng: np.random.Generator,
    rows: NDArray[np.float32],
    offsets: NDArray[np.float32],
    mixing: NDArray[np.float32],
    size: Size,
    routing: Routing,
    learnable: float,
) -> _Strengths:
    """One after the other: skew does not depend on drift, nor both on the errors."""
    some, count = np.unique(np.linspace(0, size.layers - 1, _LAYERS).astype(int)), _SAMPLE // _LAYERS
    state, fresh = rng.standard_normal((2, len(some), count, size.hidden)).astype(np.float32)
    scores, moved = (np.einsum("lnp,lep->lne", each, rows[some]) for each in (state, fresh))
    bias = offsets[some][:, None]

    def popular(skew: float) -> float:
        return float(np.mean([_popular(_chosen(each, size.top_k)) for each in scores + np.float32(skew) * bias]))

    skew = _search(popular, routing.popular, 0.0, _MOST, "a share of the popular experts")
    biased = scores + np.float32(skew) * bias
    chosen = [_chosen(each, size.top_k) for each in biased]

    def repeats(drift: float) -> float:
        after = np.float32(drift) * scores + np.float32(np.sqrt(1 - drift**2)) * moved + np.float32(skew) * bias
        again = [(now & _chosen(then, size.top_k)).sum() for now, then in zip(chosen, after, strict=True)]
        return float(sum(again) / sum(now.sum() for now in chosen))

    drift = _search(repeats, routing.repeats, 0.0, 1.0, "repeats, with this skew,")
    errors = []
    for number, asked in enumerate((*routing.recall, routing.embedding)):
        # Source and target are related, which is left out here: recall comes out the same within two points.
        mixed = mixing[some, number % DISTANCES]
        error = np.stack([_error(rng, each, mix, learnable) for each, mix in zip(fresh, mixed, strict=True)])

        def recall(strength: float, error: NDArray[np.float32] = error) -> float:
            looked = biased + np.float32(strength) * error
            return -float(np.mean([_recall(a, b, size.top_k) for a, b in zip(looked, chosen, strict=True)]))

        errors.append(_search(recall, -asked, 0.0, _MOST, "a recall"))
    return _Strengths(skew, drift, tuple(errors))


def _search(value: Callable[[float], float], asked: float, low: float, high: float, what: str) -> float:
    """Where a rising function has the value asked for."""
    least, most = value(low), value(high)
    if not least - 0.02 <= asked <= most + 0.02:
        bounds = sorted((abs(least), abs(most)))
        raise ValueError(f"{what} of {abs(asked)} cannot be had: from {bounds[0]:.3f} to {bounds[1]:.3f}")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < asked else (low, middle)
    return (low + high) / 2


def _states(rng: np.random.Generator, size: Size, drift: float) -> NDArray[np.float32]:
    """[L + 1, N, P]: what each source knows, that is the token itself and then each layer's state."""
    fresh = np.float32(np.sqrt(max(1 - drift**2, 0.0)))
    states = np.empty((size.layers + 1, size.sequences, size.tokens, size.hidden), np.float32)
    for position in range(size.tokens):
        drawn = rng.standard_normal((size.layers + 1, size.sequences, size.hidden)).astype(np.float32)
        states[:, :, position] = np.float32(drift) * states[:, :, position - 1] + fresh * drawn if position else drawn
    states[1:] = np.float32(np.sqrt(_OWN)) * states[1:] + np.float32(np.sqrt(1 - _OWN)) * states[:1]
    return states.reshape(size.layers + 1, -1, size.hidden)


def _low_rank(rng: np.random.Generator, layers: int, experts: int, width: int) -> NDArray[np.float32]:
    """[L, D, P, E] of rank 8, from states of variance 1 to errors of variance 1."""
    rank = min(_RANK, width, experts)
    down = rng.standard_normal((layers, DISTANCES, width, rank)).astype(np.float32) / np.sqrt(np.float32(width))
    up = rng.standard_normal((layers, DISTANCES, rank, experts)).astype(np.float32) / np.sqrt(np.float32(rank))
    return np.asarray(down @ up)


def _error(
    rng: np.random.Generator, state: NDArray[np.float32], mixing: NDArray[np.float32], learnable: float
) -> NDArray[np.float32]:
    noise = rng.standard_normal((len(state), mixing.shape[1])).astype(np.float32)
    return np.asarray(np.float32(np.sqrt(learnable)) * (state @ mixing) + np.float32(np.sqrt(1 - learnable)) * noise)


def _top(scores: NDArray[np.float16], top_k: int) -> NDArray[np.int64]:
    return np.argsort(-scores.astype(np.float32), axis=-1, kind="stable")[..., :top_k]


def _chosen(scores: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    found = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(found, np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k], True, axis=-1)
    return found


def _popular(chosen: NDArray[np.bool_]) -> float:
    counts = np.sort(chosen.sum(axis=0))[::-1]
    return float(counts[: max(round(len(counts) * POPULAR), 1)].sum() / counts.sum())


def _recall(scores: NDArray[np.floating], chosen: NDArray[np.bool_], top_k: int) -> float:
    return float((_chosen(scores.astype(np.float32), top_k) & chosen).sum() / chosen.sum())


def _splits(sequences: int) -> NDArray[np.uint8]:
    kinds = np.array([TRAIN] * 8 + [VALIDATION, TEST], np.uint8)
    return np.resize(np.roll(kinds, 2), sequences)  # small traces have all three


def _check(size: Size, routing: Routing, learnable: float) -> None:
    counts = (size.layers, size.experts, size.top_k, size.sequences, size.tokens, size.prompt_tokens, size.hidden)
    if min(counts) < 1 or not size.top_k < size.experts <= 65536 or size.prompt_tokens > size.tokens:
        raise ValueError(f"{size}: at least 1 of each, more experts than a token has, and a prompt within its sequence")
    shares = (routing.popular, routing.repeats, *routing.recall, routing.embedding, learnable)
    if len(routing.recall) != DISTANCES or not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"{routing} and {learnable} to be learned: shares from 0 to 1, recall at {DISTANCES} distances"
        )
