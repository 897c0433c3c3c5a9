"""What llama.cpp's formats make of weights: the values after a way there and back, as its quantiser rounds them.

Blocks of 32 along a row with an f16 scale. Q8_0: the greatest magnitude becomes 127. Q4_0: the value of greatest
magnitude becomes -8, codes from -8 to 7.
"""

import torch

_BLOCK = 32


def rounded(weights: torch.Tensor, kind: str) -> torch.Tensor:
    """f32 weights (..., columns, a multiple of 32) as type BF16 (unchanged), Q8_0 or Q4_0 holds them."""
    if kind == "BF16":
        return weights
    blocks = weights.reshape(-1, _BLOCK)
    greatest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = greatest.abs() / 127 if kind == "Q8_0" else greatest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = blocks * inverse
    # Halves go away from zero in Q8_0, upwards in Q4_0.
    codes = codes.abs().add_(0.5).floor_().copysign_(codes) if kind == "Q8_0" else (codes + 0.5).floor_().clamp_(max=7)
    return codes.mul_(scale.half().float()).reshape(weights.shape)
