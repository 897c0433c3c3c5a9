"""The rotary embedding of a decode step, without a call of transformers' module at every step.

Where an angle depends on its position alone, the module is asked for a block of positions at once, and the steps take
rows of its answer.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# of the kinds that transformers knows, "dynamic" and "longrope" depend on the longest position so far
_FIXED_TYPES = frozenset(("default", "linear", "llama3", "yarn"))
_BLOCK = 256  # positions asked for at once
_WIDEST = 16 * _BLOCK  # between positions of one step


class _Block(NamedTuple):
    """Rows of `cos` and `sin`, f32 [positions, D], from `start` on, and what they were made of."""

    start: int
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    frequencies: torch.Tensor
    version: int
    scaling: Any
    dtype: torch.dtype

    def holds(self, module: Any, dtype: torch.dtype, first: int, last: int) -> bool:
        return (
            self.start <= first
            and last < self.start + len(self.cos)
            and module.inv_freq is self.frequencies
            and _version(self.frequencies) == self.version
            and module.attention_scaling == self.scaling
            and dtype == self.dtype
        )


class RotaryTable:
    """Rows of one rotary embedding module's cos and sin."""

    def __init__(self) -> None:
        self._block: _Block | None = None

    def rows(
        self, module: Any, positions: NDArray[np.int64], like: torch.Tensor
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """cos and sin at positions [B], as the module gives them for tensors like `like`.

        [B, D], or [1, D] where all are at the same position; None where only the module itself can tell.
        """
        if getattr(module, "rope_type", None) not in _FIXED_TYPES:
            return None
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last - first > _WIDEST:
            return None
        block = self._block
        if block is None or not block.holds(module, like.dtype, first, last):
            start, stop = first // _BLOCK * _BLOCK, (last // _BLOCK + 1) * _BLOCK
            cos, sin = module(like, position_ids=torch.arange(start, stop)[None])
            if cos.shape != sin.shape or cos.shape[:-1] != (1, stop - start):
                return None
            tables = [part[0].to(torch.float32).contiguous().numpy() for part in (cos, sin)]
            frequencies = module.inv_freq
            block = self._block = _Block(
                start, tables[0], tables[1], frequencies, _version(frequencies), module.attention_scaling, like.dtype
            )
        if first == last:
            row = slice(first - block.start, first - block.start + 1)
            return block.cos[row], block.sin[row]
        at = positions - block.start
        return block.cos[at], block.sin[at]


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
