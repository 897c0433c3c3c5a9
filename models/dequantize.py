"""Encoded expert matrices (FP8 blocks, MXFP4) as ordinary tensors, one expert at a time.

The values equal those of transformers' own dequantising load: FP8 value times its block's scale, MXFP4 value times
two to its group's exponent.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.expert_weights import MatrixSet, WeightFormat

# The 16 values of the OCP microscaling FP4 (E2M1) format, by code: sign, two exponent bits, one mantissa bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4_VALUES = np.array(_FP4, np.float32)


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


def read_f32(matrix: MatrixSet, weights: WeightFormat, checkpoint: Checkpoint, expert: int) -> NDArray[np.float32]:
    """Expert `expert`'s matrix [out, in] or bias [out], with the values of `read_matrix`.

    Runs on the calling thread alone: torch would start a team of threads for each of the threads that convert.
    """
    stored = matrix.view(checkpoint, expert)
    if matrix.scales is not None:
        scales = matrix.scales.view(checkpoint, expert)
        if weights == "mxfp4":
            codes, exponents = read_mxfp4(matrix, checkpoint, expert)
            scale = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
            decoded: NDArray[np.float32] = _FP4_VALUES[codes] * np.repeat(scale, 32, axis=1)
            return decoded
        values = _fp8_values()[stored.view(torch.uint8).numpy()]
        factors = _floats(scales)
        blocks = values.reshape(len(factors), len(values) // len(factors), factors.shape[1], -1)
        return (blocks * factors[:, None, :, None]).reshape(values.shape)  # type: ignore[no-any-return]
    return _floats(stored)


def read_mxfp4(matrix: MatrixSet, checkpoint: Checkpoint, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An MXFP4 matrix undecoded: codes [out, in], a byte each, and exponents [out, in / 32], biased by 127."""
    if matrix.scales is None:
        raise ValueError("this matrix has no scales: it is not stored as MXFP4")
    blocks = matrix.view(checkpoint, expert).numpy()
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(len(blocks), -1)
    return codes, np.ascontiguousarray(matrix.scales.view(checkpoint, expert).numpy())


def _floats(stored: torch.Tensor) -> NDArray[np.float32]:
    if stored.dtype == torch.bfloat16:  # the upper half of an f32
        bits = stored.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return stored.numpy().astype(np.float32)


def _fp8_values() -> NDArray[np.float32]:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


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
