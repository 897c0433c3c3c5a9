"""How long one expert took on a real server: Xeon Gold 6230R, bf16, torch, 16 threads.

Facts of the LayerScope artifact (repository nezha-Anonymous/LayerScope, commit f85e627, micro*.txt): 1499 token counts
for each model, noisy: more tokens take less time in places. They cannot, so what stands here is the isotonic regression
of each table (the curve that never falls and has the smallest squared distance) at selected token counts. The raw
figures lie 2 to 10 % off that curve on average (single ones up to 68 %), straight lines between the selected counts 2
%. DeepSeek-V2-Lite and Moonlight have experts of the same size: the mean of their tables.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# fmt: off
_TOKENS = (
    1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320,
    384, 448, 512, 640, 768, 896, 1024, 1280, 1499,
)
_MILLISECONDS = {  # by bytes of an expert
    3 * 4096 * 14336 * 2: (  # Mixtral-8x7B
        3.241, 5.99, 9.526, 10.17, 12.16, 12.16, 15.57, 15.57, 22.39, 22.39, 28.43, 28.43, 39.22, 39.22,
        46.96, 46.96, 61.28, 61.28, 64.6, 72.08, 87.73, 103.8, 121, 132.1, 153, 155.7, 173.2, 181.7, 198.1,
        198.1, 227.4, 239.5, 294.3, 415, 415, 415, 550.9, 857.1,
    ),
    3 * 2048 * 1408 * 2: (  # DeepSeek-V2-Lite, Moonlight-16B-A3B
        0.2041, 0.4272, 0.5114, 0.5114, 0.6133, 0.6133, 0.683, 0.683, 0.7463, 0.8156, 0.8821, 0.9425, 1.109,
        1.229, 1.397, 1.514, 1.81, 2.017, 2.367, 2.713, 3.281, 4.814, 5.543, 6.084, 6.084, 6.084, 6.084,
        6.192, 6.793, 7.537, 8.56, 9.572, 11.21, 13.18, 14.91, 17.63, 20.51, 25.7,
    ),
    3 * 2048 * 768 * 2: (  # Qwen3-30B-A3B
        0.1637, 0.4397, 0.4397, 0.4397, 0.4806, 0.4849, 0.5306, 0.5336, 0.5859, 0.6296, 0.6681, 0.7045,
        0.8099, 0.8697, 0.955, 1.019, 1.197, 1.294, 1.493, 1.608, 2.03, 2.97, 3.257, 3.658, 3.658, 3.658,
        3.658, 4.047, 4.047, 4.289, 5.819, 6.388, 7.122, 7.824, 9.462, 9.645, 11.8, 13.58,
    ),
}
# fmt: on


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTable:
    """Seconds of one bf16 expert of `nbytes` by rows, from 0 on. More rows cost in proportion to the last."""

    nbytes: int
    seconds: NDArray[np.float64]

    def describes(self, nbytes: int, flops_per_row: int) -> bool:
        """Whether these are the experts measured: of this size within 2 %, and of as many multiplications as bf16
        weights of that size have (a quantised expert of another model may be as large).
        """
        return abs(nbytes - self.nbytes) <= 0.02 * self.nbytes and abs(flops_per_row - nbytes) <= 0.1 * nbytes

    def sum(self, rows: NDArray[np.int64]) -> float:
        """Seconds of an expert for each entry of `rows`, one after another."""
        last = len(self.seconds) - 1
        inside = self.seconds[np.minimum(rows, last)]
        return float((inside * np.maximum(rows / last, 1.0)).sum())


def _table(nbytes: int, milliseconds: tuple[float, ...]) -> ExpertTable:
    every = np.arange(_TOKENS[-1] + 1)
    seconds = np.interp(every, (0, *_TOKENS), (0.0, *milliseconds)) / 1e3
    seconds.setflags(write=False)
    return ExpertTable(nbytes, seconds)


XEON_6230R = tuple(_table(nbytes, milliseconds) for nbytes, milliseconds in _MILLISECONDS.items())
