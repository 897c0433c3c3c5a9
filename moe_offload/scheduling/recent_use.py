"""A forecast from popularity and from what a layer's last call used: tokens in a row like the same experts.

How much more likely an expert is for having been used just now is learned for each layer: `again` is the share of the
doubt that its last use takes away, p + again * (1 - p). What these gain the others lose. With many tokens in a batch
popularity says nearly all, and `again` goes to zero by itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.forecast import Popularity

_NEWEST = 0.03  # how much a call counts for what is learned


class RecentUse(Popularity):
    """As `Popularity`, for calls with as many tokens as the last one more exact."""

    def __init__(
        self,
        layers: int,
        experts: int,
        *,
        top_k: int = 1,
        order: Sequence[Sequence[int]] | None = None,
        half_life: float = 64.0,
    ) -> None:
        super().__init__(layers, experts, top_k=top_k, order=order, half_life=half_life)
        self._last: list[NDArray[np.intp] | None] = [None] * layers
        self._tokens = [0] * layers
        self._again = np.zeros(layers)
        self._usual: list[NDArray[np.float64] | None] = [None] * layers  # until the next call, as the next
        self._usual_for = [0] * layers  # tokens
        self._made: list[NDArray[np.float64] | None] = [None] * layers

    def again(self, layer: int) -> float:
        """How much more likely an expert is that the last call of the layer used, 0 to 1."""
        return float(self._again[layer])

    def observe(self, layer: int, experts: NDArray[Any], rows: NDArray[Any], tokens: int) -> None:
        last = self._last[layer]
        if tokens == self._tokens[layer] and last is not None and len(last):
            usual = self.usual_presence(layer, tokens)[last]
            used = np.zeros(len(self._rows[layer]), np.bool_)
            used[experts] = True
            doubt = float((1.0 - usual).sum())
            if doubt > 1e-9:
                found = (np.count_nonzero(used[last]) - float(usual.sum())) / doubt
                self._again[layer] += _NEWEST * (min(max(found, -1.0), 1.0) - self._again[layer])
        super().observe(layer, experts, rows, tokens)
        self._last[layer], self._tokens[layer] = experts.astype(np.intp), tokens
        self._usual[layer] = self._made[layer] = None

    def presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        last, again = self._last[layer], float(self._again[layer])
        if tokens != self._tokens[layer] or last is None or again <= 0:
            return self.usual_presence(layer, tokens)
        made = self._made[layer]
        if made is None:
            usual = self.usual_presence(layer, tokens)
            lifted = usual[last] + again * (1.0 - usual[last])
            gained, others = float((lifted - usual[last]).sum()), float(usual.sum() - usual[last].sum())
            made = usual * max(1.0 - gained / others, 0.0) if others > 0 else usual.copy()
            made[last] = lifted
            self._made[layer] = made
        return made

    def usual_presence(self, layer: int, tokens: int) -> NDArray[np.float64]:
        usual = self._usual[layer]
        if usual is None or self._usual_for[layer] != tokens:
            usual = self._usual[layer] = super().presence(layer, tokens)
            self._usual_for[layer] = tokens
        return usual

    def expected_rows(self, layer: int, tokens: int) -> NDArray[np.float64]:
        rows = super().expected_rows(layer, tokens)
        if tokens != self._tokens[layer] or self._again[layer] <= 0:
            return rows
        usual = self.usual_presence(layer, tokens)
        return np.asarray(rows * (self.presence(layer, tokens) / np.maximum(usual, 1e-12)))
