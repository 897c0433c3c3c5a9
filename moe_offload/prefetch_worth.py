"""What a slot of each expert saves, at its layer's next run and in a step, and the cache's scores made of it.

A slot that is taken for an expert holds it for some steps: what it is worth keeping is what it saves at the next run of
its layer, of which more may be known, for one step, and what it saves usually for the others. The same saving is worth
less the later it comes: of two experts, the one whose layer runs first stays.
"""

import numpy as np
from numpy.typing import NDArray

from moe_offload.dispatch_parts import Parts
from moe_offload.scheduling.layer_plan import LayerCosts
from moe_offload.scheduling.prefetch import savings
from moe_offload.transfer.eviction import Score

STAY = 8.0  # steps that an expert which is to stay is expected to
FRESH_SCORES = 256  # steps after which all scores are set anew, so that none gets too small


class ExpertWorth:
    """Of one model's experts, by what `parts.forecast` says."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._layers = len(parts.kinds)
        eviction = parts.cache.eviction
        self._scores = eviction if isinstance(eviction, Score) else None
        self._saved: list[NDArray[np.float64]] = [np.empty(0)] * self._layers
        self._kept: list[NDArray[np.float64]] = [np.empty(0)] * self._layers
        self._saved_for = [0] * self._layers  # tokens
        self._turn = self._now = 0  # layers since all scores were set, and the one that ran last
        self.asked = 0.0  # seconds of the host that the forecast took, ever

    def passed(self, layer: int, tokens: int) -> None:
        """A layer has run: all others are one nearer."""
        self._now, self._turn = layer, self._turn + 1
        if self._turn > FRESH_SCORES * self._layers:
            self._turn = 0
            self.renew(tokens)

    def renew(self, tokens: int) -> None:
        """Set all scores: what is worth most to keep depends on the batch."""
        for layer in range(self._layers):
            self.saved(layer, tokens, anew=True)

    def saved(self, layer: int, tokens: int, *, anew: bool = False) -> NDArray[np.float64]:
        """[E] seconds at the layer's next run. anew: more may be known than when it was asked last."""
        if anew or self._saved_for[layer] != tokens:
            forecast, clock, costs = self._parts.forecast, self._parts.accelerator.now, self._costs(layer)
            began = clock()
            presence, rows = forecast.presence(layer, tokens), forecast.expected_rows(layer, tokens)
            self.asked += clock() - began
            saved = self._saved[layer] = savings(presence, rows, costs)
            self._saved_for[layer] = tokens
            later = savings(forecast.usual_presence(layer, tokens), forecast.usual_rows(layer, tokens), costs)
            self._kept[layer] = kept = saved / STAY + later * (1 - 1 / STAY)
            if self._scores is not None:
                self._scores.set_scores(layer, kept * self.nearness(layer))
        return self._saved[layer]

    def kept(self, layer: int, tokens: int) -> NDArray[np.float64]:
        """[E] seconds per step, of a slot from now on."""
        self.saved(layer, tokens)
        return self._kept[layer]

    def nearness(self, layer: int) -> float:
        """What a saving at the layer's next run counts: a share 1 / STAY less for a whole step later.

        From a fixed point in time, so that as time passes all scores keep their proportion.
        """
        return float((1 - 1 / STAY) ** (self.place(layer) / self._layers))

    def place(self, layer: int) -> int:
        """When its next run is, in layers from that point."""
        return self._turn + (layer - self._now - 1) % self._layers + 1

    def _costs(self, layer: int) -> LayerCosts:
        return self._parts.costs.layer_costs(self._parts.kinds[layer])
