"""A forecast that a predictor tells what comes next; where it says nothing, popularity and the last call do.

A prediction is for one call: the next one of its layer, with as many tokens as it was made for. A later one takes its
place; the call itself consumes it. It may be promised instead of given: then it is made when somebody asks for it,
which nobody does while nothing is prefetched, and at most once. Where so many tokens come together that popularity
alone knows which experts will have some, it is not made.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.forecast import Forecast


class Foreseen(NamedTuple):
    """A prediction for a layer's next call, which has `tokens` tokens. Arrays are kept, not copied."""

    presence: NDArray[np.float64]  # [E] as of `Forecast`
    rows: NDArray[np.float64]  # [E]
    tokens: int


CERTAIN = 0.01  # mean variance of popularity's word on who will be there: below, there is nothing to add

Provider = Callable[[int], Foreseen | None]  # of a layer; None: it cannot say


class PredictedUse:
    """`usual`, and predictions for the next calls of some layers."""

    def __init__(self, usual: Forecast, layers: int) -> None:
        self.usual = usual
        self._foreseen: list[Foreseen | None] = [None] * layers
        self._promised: list[Provider | None] = [None] * layers

    def foresee(self, layer: int, presence: NDArray[np.float64], rows: NDArray[np.float64], tokens: int) -> None:
        """What the next call of `layer` will want. One that holds what is no number is left out."""
        self._promised[layer] = None
        known = bool(np.isfinite(presence.sum() + rows.sum()))
        self._foreseen[layer] = Foreseen(presence, rows, tokens) if known else None

    def expect(self, layers: Iterable[int], provider: Provider) -> None:
        """As `foresee` for each of the layers, when it is asked for."""
        for layer in layers:
            self._promised[layer], self._foreseen[layer] = provider, None

    def fresh(self, layer: int) -> bool:
        """Whether the layer's next call is predicted, or will be when it is asked for. Asks nobody."""
        return self._foreseen[layer] is not None or self._promised[layer] is not None

    def presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the probability that an expert gets at least one token."""
        found = self._next(layer, tokens)
        return self.usual.presence(layer, tokens) if found is None else found.presence

    def expected_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] the expected number of tokens of each expert."""
        found = self._next(layer, tokens)
        return self.usual.expected_rows(layer, tokens) if found is None else found.rows

    def usual_presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] as `presence`, on average over the calls that follow: predictions say nothing about those."""
        return self.usual.usual_presence(layer, tokens)

    def usual_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] as `expected_rows`, likewise."""
        return self.usual.usual_rows(layer, tokens)

    def observe(self, layer: int, experts: NDArray[Any], rows: NDArray[Any], tokens: int) -> None:
        """What the router chose. The prediction was for this call."""
        self._foreseen[layer] = self._promised[layer] = None
        self.usual.observe(layer, experts, rows, tokens)

    def _next(self, layer: int, tokens: int) -> Foreseen | None:
        provider = self._promised[layer]
        if provider is not None:
            self._promised[layer] = None
            usual = self.usual.usual_presence(layer, tokens)
            made = provider(layer) if float((usual * (1 - usual)).mean()) > CERTAIN else None
            if made is not None:
                self.foresee(layer, *made)
        found = self._foreseen[layer]
        return found if found is not None and found.tokens == tokens else None
