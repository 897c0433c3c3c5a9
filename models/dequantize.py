"""Encoded expert matrices (FP8 blocks, MXFP4) as ordinary tensors, one expert at a time.

The values equal those of transformers' own dequantising load: FP8 value times its block's scale, MXFP4 value times
two to its group's exponent.
"""

import torch

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.expert_weights import MatrixSet, WeightFormat

# The 16 values of the OCP microscaling FP4 (E2M1) format, by code: sign, two exponent bits, one mantissa bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def read_matrix(
    matrix: MatrixSet, weights: WeightFormat, checkpoint: Checkpoint, expert: int, dtype: torch.dtype
) -> torch.Tensor:
    """Expert `expert`'s matrix [out, in] in `dtype`: a view of the file where that is what is stored, else a new
    tensor.
    """
    stored = matrix.view(checkpoint, expert)
    if matrix.scales is None:
        return stored.to(dtype)
    scales = matrix.scales.view(checkpoint, expert)
    if weights == "mxfp4":
        return decode_mxfp4(stored, scales).to(dtype)
    return decode_fp8(stored, scales).to(dtype)


def decode_fp8(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[out, in] float8 and [out / b0, in / b1] scales -> [out, in] float32."""
    rows, cols = scales.shape
    blocks = stored.float().reshape(rows, stored.shape[0] // rows, cols, stored.shape[1] // cols)
    return (blocks * scales.float()[:, None, :, None]).reshape(stored.shape)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[out, groups, 16] bytes (low nibble first) and [out, groups] exponents biased by 127 -> [out, groups * 32]
    float32.
    """
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2).to(torch.int32)
    values = torch.tensor(_FP4)[codes]
    return torch.ldexp(values, scales.to(torch.int32)[..., None] - 127).flatten(1)
