"""Which experts a layer will want: what prefetching and eviction ask. Never needed for correctness.

`Popularity` goes by how often experts were used, which costs next to nothing; `PerfectForecast` knows, for the oracle.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Forecast(Protocol):
    """Expected use of experts at the next call of a layer, for a given number of tokens."""

    def presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the probability that an expert gets at least one token."""

    def expected_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the expected number of tokens of each expert."""

    def usual_presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] as `presence`, on average over the calls that follow."""

    def usual_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] as `expected_rows`, on average over the calls that follow."""

    def fresh(self, layer: int) -> bool:
        """Whether something is known of the layer's next call alone, that may change before it comes. Costs nothing."""

    def observe(self, layer: int, experts: NDArray[Any], rows: NDArray[Any], tokens: int) -> None:
        """What the router chose: the active experts, each once, and the rows of each."""


_BUCKETS = 12  # powers of two of tokens, the last one open
_PRIOR = 8.0  # steps that the prior counts for
_BLEND = 4.0  # steps at a batch size after which they count as much as what single tokens say
_RESCALE = 1e100


class Popularity:
    """Moving averages of what was observed, per layer.

    top_k: experts per token, for the prior. order [L][E]: experts by expected use, most used first; without it all are
    alike. half_life: calls of a layer after which an observation counts for half.

    Averages are kept as sums whose newest addend is the largest, so that a call touches its active experts only.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        *,
        top_k: int = 1,
        order: Sequence[Sequence[int]] | None = None,
        half_life: float = 64.0,
    ) -> None:
        if layers < 1 or experts < 1 or not 1 <= top_k <= experts or not half_life > 0:
            raise ValueError(
                f"{layers} layers, {experts} experts, {top_k} of them per token, a half-life of {half_life}: all at "
                "least 1, and a token has no more experts than there are"
            )
        self._growth = 0.5 ** (-1.0 / half_life)
        prior = _prior_shares(layers, experts, top_k, order)
        self._rows = list(_PRIOR * prior)  # per layer: [E] sums of rows per token
        self._weight = [_PRIOR] * layers  # what the sums are to be divided by
        self._addend = [1.0] * layers
        self._active = [[np.zeros(experts) for _ in range(_BUCKETS)] for _ in range(layers)]
        self._active_weight = [[0.0] * _BUCKETS for _ in range(layers)]

    def observe(self, layer: int, experts: NDArray[Any], rows: NDArray[Any], tokens: int) -> None:
        """What the router chose: the active experts, each once, and the rows of each."""
        if tokens < 1:
            return
        addend = self._addend[layer] * self._growth
        self._addend[layer] = addend
        bucket = min(tokens.bit_length(), _BUCKETS) - 1
        index = experts.astype(np.intp)  # other integers as an index cost twice the time
        self._rows[layer][index] += rows * (addend / tokens)
        self._weight[layer] += addend
        self._active[layer][bucket][index] += addend
        self._active_weight[layer][bucket] += addend
        if addend > _RESCALE:
            self._rescale(layer)

    def presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the probability that an expert gets at least one of `tokens` tokens.

        Tokens chosen one by one would say 1 - (1 - p)^tokens; tokens of a batch are alike, which only batches of that
        size show.
        """
        if tokens < 1:
            return np.zeros_like(self._rows[layer])
        single = self.share(layer)
        alone: NDArray[np.float64] = (
            single if tokens == 1 else -np.expm1(tokens * np.log1p(-np.minimum(single, 1 - 1e-12)))
        )
        bucket = min(tokens.bit_length(), _BUCKETS) - 1
        weight = self._active_weight[layer][bucket]
        if weight == 0:
            return alone
        trust = weight / (weight + _BLEND * self._addend[layer])
        return np.asarray(alone + trust * (self._active[layer][bucket] / weight - alone))

    def usual_presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the same: nothing is known of a single call."""
        return self.presence(layer, tokens)

    def expected_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the expected number of tokens of each expert."""
        return self.share(layer) * tokens

    def usual_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the same."""
        return self.share(layer) * tokens

    def fresh(self, layer: int) -> bool:
        """Never: what is said changes with a layer's own calls only."""
        return False

    def share(self, layer: int) -> NDArray[np.float64]:
        """[E] rows per token."""
        return np.asarray(np.minimum(self._rows[layer] / self._weight[layer], 1.0))

    def _rescale(self, layer: int) -> None:
        factor = 1.0 / self._addend[layer]
        self._addend[layer] = 1.0
        self._rows[layer] *= factor
        self._weight[layer] *= factor
        for bucket, active in enumerate(self._active[layer]):
            active *= factor
            self._active_weight[layer][bucket] *= factor


class RoutedCall(NamedTuple):
    """What a router chose in one call of a layer."""

    layer: int
    experts: NDArray[Any]  # [A] each once
    rows: NDArray[Any]  # [A]


class PerfectForecast:
    """Knows every layer's next calls: the upper bound of prefetching and caching.

    trace: the calls that will come, in order within each layer. An observation is the call itself and turns to the
    next. foreseen: calls of each layer that it is asked about.
    """

    def __init__(self, layers: int, experts: int, trace: Iterable[RoutedCall], *, foreseen: int = 8) -> None:
        self._foreseen = foreseen
        self._nothing = np.zeros(experts)
        self._nothing.setflags(write=False)
        self._coming: list[deque[NDArray[np.float64]]] = [deque() for _ in range(layers)]
        for call in trace:
            rows = np.zeros(experts)
            rows[call.experts] = call.rows
            self._coming[call.layer].append(rows)

    def presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] 1 for the experts that the layer's next call will have; nothing after the last."""
        return (self.expected_rows(layer, tokens) > 0).astype(np.float64)

    def usual_presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the share of the next calls that will have each expert."""
        coming = self._next(layer)
        return np.asarray(np.mean([rows > 0 for rows in coming], axis=0)) if coming else self._nothing

    def expected_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the rows that the layer's next call will have."""
        coming = self._coming[layer]
        return coming[0] if coming else self._nothing

    def usual_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the rows that the next calls will have on average."""
        coming = self._next(layer)
        return np.asarray(np.mean(coming, axis=0)) if coming else self._nothing

    def fresh(self, layer: int) -> bool:
        """Never: what is said changes with a layer's own calls only."""
        return False

    def observe(self, layer: int, experts: NDArray[Any], rows: NDArray[Any], tokens: int) -> None:
        """The layer's next call has come."""
        if self._coming[layer]:
            self._coming[layer].popleft()

    def _next(self, layer: int) -> list[NDArray[np.float64]]:
        """The calls that it is asked about."""
        return list(itertools.islice(self._coming[layer], self._foreseen))


def _prior_shares(layers: int, experts: int, top_k: int, order: Sequence[Sequence[int]] | None) -> NDArray[np.float64]:
    """[L, E] rows per token before anything is known."""
    if order is None:
        return np.full((layers, experts), top_k / experts)
    if len(order) != layers:
        raise ValueError(f"an order of {len(order)} layers for a model of {layers}")
    by_rank = 1.0 / (np.arange(experts) + experts / 4)  # flat: an order from elsewhere is a hint
    by_rank = np.minimum(by_rank * (top_k / by_rank.sum()), 1.0)
    shares = np.empty((layers, experts))
    for layer, ranked in enumerate(order):
        if sorted(ranked) != list(range(experts)):
            raise ValueError(f"the order of layer {layer} does not name each of {experts} experts once")
        shares[layer, list(ranked)] = by_rank
    return shares
