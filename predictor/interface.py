"""What every predictor can do: say how probable each expert is, some layers before its router runs."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.trace import Trace


class Predictor(Protocol):
    """Probabilities for the tokens of a trace, from nothing but what was known so many layers before.

    decode: the tokens came one at a time, so all of the token before is known, its experts in every layer too. False:
    they came in one prompt, and of a token's predecessors only what the sources hold is known.
    """

    @property
    def name(self) -> str:
        """For tables."""

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> NDArray[np.float32]:
        """[n, E] for each token and expert, the probability that `layer` routes the token there.

        distance: 1 to 3, predicted from source layer - distance + 1, which is at least 0.
        """
