"""Do the engines compute the same model? Asked before anything is timed.

The yardstick is `noise`: how far transformers in bf16 is from exact (f32) logits of the same bf16 weights. Distances
are relative (L2 over the vocabulary), medians over positions: where rounding tips a router's choice between two nearly
equal experts, single positions are far off for every engine alike.

- An engine that computes from known weights may be off their exact logits by `slack * noise`. bf16 products: slack 2.
  llama.cpp's Q8_0 and Q4_0 products round activations to 8 bits in groups of 32, about three times bf16's error
  (greatest magnitude of 32 normal values 2.1 sigma, / 127 / sqrt(12): 0.5 %; bf16 0.17 %): slack 4.
- moe_offload's int8 and int4 choose other codes and scales than llama.cpp's formats of the same size. They may be off
  the exact logits of the *unrounded* weights by what llama.cpp's rounding of the weights costs, with the slack beside
  it (the two errors are independent: a sum of squares).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]  # [prompts, tokens, vocabulary]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One engine's distance from what it is compared with.

    distance, bound: median relative distance and what it may be. greedy: share of positions with the same best token.
    """

    distance: float
    bound: float
    greedy: float

    @property
    def holds(self) -> bool:
        return self.distance <= self.bound  # NaN does not

    def __str__(self) -> str:
        return f"{self.distance:.2%} from exact (bound {self.bound:.2%}), {self.greedy:.0%} of greedy tokens equal"


def distance(found: Logits, exact: Logits) -> float:
    """Median over positions of |found - exact| / |exact|."""
    return float(np.median(np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)))


def slack(kind: str) -> float:
    """How many times bf16's noise an engine may be off its own weights' exact logits, by GGUF type."""
    return 2.0 if kind == "BF16" else 4.0


def from_same_weights(found: Logits, exact: Logits, kind: str, noise: float) -> Agreement:
    """An engine against the exact logits of the weights that it holds."""
    return Agreement(distance(found, exact), slack(kind) * noise, _greedy(found, exact))


def from_other_rounding(found: Logits, exact: Logits, rounded: Logits, kind: str, noise: float) -> Agreement:
    """An engine with its own rounding against the exact logits; `rounded`: those of weights rounded as `kind`."""
    bound = math.hypot(distance(rounded, exact), slack(kind) * noise)
    return Agreement(distance(found, exact), bound, _greedy(found, exact))


def _greedy(found: Logits, exact: Logits) -> float:
    return float((found.argmax(-1) == exact.argmax(-1)).mean())
