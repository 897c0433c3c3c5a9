"""Traces of a few tokens, with what a test says in them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.trace import DISTANCES, FORMAT, Trace, TraceInfo


def small_trace(
    experts: NDArray[Any] | list[Any],
    num_experts: int,
    *,
    lengths: list[int] | None = None,
    prompts: list[int] | None = None,
    scores: NDArray[Any] | None = None,
    look: NDArray[Any] | None = None,
) -> Trace:
    """experts: [L, N, K]. Scores are 1 for chosen experts; without `look` the look-ahead says 0 to all.

    lengths: of the sequences, one of all by default; prompts: of their prompts, all by default.
    """
    chosen = np.asarray(experts, np.int64)
    layers, tokens, top_k = chosen.shape
    lengths = [tokens] if lengths is None else lengths
    if scores is None:
        scores = np.zeros((layers, tokens, num_experts))
        np.put_along_axis(scores, chosen, 1.0, axis=2)
    if look is None:
        look = np.zeros((layers, tokens, DISTANCES, num_experts))
    return Trace(
        TraceInfo(FORMAT, "synthetic", "test", layers, num_experts, top_k, 2, 2),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_tokens=np.array(lengths if prompts is None else prompts, np.int64),
        split=np.zeros(len(lengths), np.uint8),
        experts=chosen.astype(np.uint8),
        weights=np.full(chosen.shape, 1 / top_k, np.float16),
        scores=scores.astype(np.float16),
        look=look.astype(np.float16),
        hidden=np.zeros((layers, tokens, 2), np.int8),
        hidden_scale=np.ones((layers, tokens), np.float16),
        projection=np.zeros((layers, 2, 2), np.float32),
        offset=np.zeros((layers, 2), np.float32),
        variance=np.ones((layers, 2), np.float32),
    )


class Says:
    """A predictor that says what it is told: [L, N, E], at every distance."""

    name = "says"

    def __init__(self, said: NDArray[Any]) -> None:
        self.said = said.astype(np.float32)

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """As of `Predictor`."""
        return np.asarray(self.said[layer, tokens])
