"""Launches `dequantise.cu`: a matrix of a record, or some of its rows, as cuBLAS multiplies them.

A matrix that does not lie as computed is converted by one launch that reads its bytes once; values are those of
`unpack.matrix`. Never run on a GPU by us.
"""

import numpy as np
import torch

from moe_offload.gpu_kernels import unpack
from moe_offload.gpu_kernels.launch import Kernel, Kernels, Macros

TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as common.cuh has them
_FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4, "mxfp4": 5}  # FROM, as the kernels have them
_INPUTS = 128  # of a block
_THREADS = {"int8": 256, "int4": 128, "mxfp4": 128}
_PER_BLOCK = 1024  # numbers that a block of `convert` takes


def _macros(dtype: str, to: torch.dtype) -> Macros:
    return ("FROM", _FORMATS[dtype]), ("TO", TYPE_NUMBERS[to])


VARIANTS: dict[str, list[Macros]] = {
    "dequantise.cu": [_macros(dtype, to) for dtype in _FORMATS for to in TYPE_NUMBERS if not unpack.lies_as(dtype, to)]
}


class Dequantiser:
    """Converts matrices of one format to one type. What lies as computed is seen in place."""

    def __init__(self, kernels: Kernels, dtype: str, group: int, to: torch.dtype) -> None:
        if dtype not in _FORMATS:
            raise ValueError(f"unknown weight type {dtype!r}; use one of {', '.join(_FORMATS)}")
        self.dtype, self.group, self.to = dtype, group, to
        self._packed = dtype in unpack.PACKED_TYPES
        self._kernel: Kernel | None = None
        if not unpack.lies_as(dtype, to):
            name = "dequantise" if self._packed else "convert"
            self._kernel = kernels.get("dequantise.cu", name, _macros(dtype, to))

    @property
    def in_place(self) -> bool:
        """Whether nothing is launched, and a matrix takes no memory."""
        return self._kernel is None

    def __call__(self, data: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """The matrix [rows, cols] that begins at data[0], uint8, aligned to 64. Weights within the range of `to`."""
        if self._kernel is None:
            return unpack.matrix(data, self.dtype, rows, cols, self.group, self.to)
        out = torch.empty((rows, cols), dtype=self.to, device=data.device)
        self.write(data, out)
        return out

    def write(self, data: torch.Tensor, out: torch.Tensor) -> None:
        """The matrix into `out` [rows, cols], contiguous and aligned to 16; not for what is seen in place."""
        if self._kernel is None:
            raise ValueError(f"{self.dtype} matrices lie as they are computed with: none is converted")
        rows, cols = out.shape
        if self._packed:
            shape = unpack.PackedShape(rows, cols, self.dtype, self.group)
            span_bits = (self.group * shape.groups_per_record).bit_length() - 1
            arguments = (data, out, np.int32(rows), np.int32(cols), np.int32(span_bits))
            self._kernel((-(-cols // _INPUTS), shape.blocks), (_THREADS[self.dtype],), arguments)
        else:
            count = rows * cols
            self._kernel((-(-count // _PER_BLOCK),), (_PER_BLOCK // 4,), (data, out, np.uint64(count)))
