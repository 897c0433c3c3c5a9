"""Matrices of an expert's record as torch tensors, on whatever device the bytes are.

bf16, f16 and f32 matrices lie row by row and are seen in place. int8, int4 and mxfp4 ones lie in blocks of 32 outputs
(the picture is in `cpu_kernels/packed_layout.py`) and are multiplied out: codes times scales, in f32, rounded once to
the type asked for. In f32 the result is bit for bit that of `cpu_kernels.packing.unpack_matrix`.
"""

from dataclasses import dataclass

import torch

ELEMENT_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WIDTH = 32  # outputs of a block
PACKED_TYPES = ("int8", "int4", "mxfp4")


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Where the codes and scales of a packed matrix [rows, cols] lie; blocks, then records, then codes and scales."""

    rows: int
    cols: int
    dtype: str
    group: int

    @property
    def groups_per_record(self) -> int:
        return 2 if self.dtype == "mxfp4" else 1

    @property
    def blocks(self) -> int:
        return -(-self.rows // WIDTH)

    @property
    def records(self) -> int:
        return -(-self.cols // (self.group * self.groups_per_record))

    @property
    def groups(self) -> int:
        return self.records * self.groups_per_record

    @property
    def scales_at(self) -> int:
        """Bytes of codes before a record's scales."""
        return self.group * self.groups_per_record * (WIDTH if self.dtype == "int8" else WIDTH // 2)

    @property
    def record_bytes(self) -> int:
        return self.scales_at + self.groups_per_record * WIDTH * (1 if self.dtype == "mxfp4" else 2)

    @property
    def nbytes(self) -> int:
        return self.blocks * self.records * self.record_bytes


def matrix_bytes(dtype: str, rows: int, cols: int, group: int) -> int:
    """Bytes of a matrix [rows, cols]; also where row `rows` of a longer one begins, if that is a multiple of 32."""
    if dtype in ELEMENT_TYPES:
        return rows * cols * ELEMENT_TYPES[dtype].itemsize
    return PackedShape(rows, cols, dtype, group).nbytes


def lies_as(dtype: str, compute: torch.dtype) -> bool:
    """Whether matrices lie in memory as they are computed with."""
    return ELEMENT_TYPES.get(dtype) == compute


def scratch_bytes(dtype: str, rows: int, cols: int, group: int, compute: torch.dtype) -> int:
    """Memory that `matrix` asks for, its result included, at most."""
    if lies_as(dtype, compute):
        return 0
    if dtype in ELEMENT_TYPES:
        return rows * cols * compute.itemsize
    shape = PackedShape(rows, cols, dtype, group)
    return int(shape.blocks * WIDTH * shape.groups * group * (compute.itemsize + _SPARE[dtype]))


def matrix(data: torch.Tensor, dtype: str, rows: int, cols: int, group: int, compute: torch.dtype) -> torch.Tensor:
    """The matrix [rows, cols] that begins at data[0], in the type `compute`. data: uint8, contiguous, aligned to 64."""
    if dtype in ELEMENT_TYPES:
        stored = ELEMENT_TYPES[dtype]
        return data[: rows * cols * stored.itemsize].view(stored).view(rows, cols).to(compute)
    if dtype not in PACKED_TYPES:
        raise ValueError(f"unknown weight type {dtype!r}; use one of {', '.join((*PACKED_TYPES, *ELEMENT_TYPES))}")
    return _multiplied_out(data, PackedShape(rows, cols, dtype, group), compute)


def _multiplied_out(data: torch.Tensor, shape: PackedShape, compute: torch.dtype) -> torch.Tensor:
    parts = shape.blocks, shape.records, shape.groups_per_record, shape.group // 4
    records = data[: shape.nbytes].view(shape.blocks, shape.records, shape.record_bytes)
    # codes as they lie: [blocks, records, groups of one, G/4, outputs side by side, 4]
    stored = records[:, :, : shape.scales_at].view(*parts, -1, 4)
    scales = _scales(records[:, :, shape.scales_at :], shape)
    out = torch.empty((shape.blocks * WIDTH, shape.groups * shape.group), dtype=compute, device=data.device)
    # ... and as a matrix wants them: [blocks, outputs, records, groups of one, G/4, 4]
    whole = out.view(shape.blocks, WIDTH, *parts[1:], 4)
    width = stored.shape[4]
    for first in range(0, WIDTH, width):
        outputs = slice(first, first + width)
        codes = _NUMBERS[shape.dtype](stored, first > 0).permute(0, 4, 1, 2, 3, 5)
        torch.mul(codes, scales[:, outputs], out=whole[:, outputs])
        del codes  # before the next are made
    return out[: shape.rows, : shape.cols]


def _int8(stored: torch.Tensor, upper: bool) -> torch.Tensor:
    """q from q + 128."""
    return (stored ^ 128).view(torch.int8)


def _int4(stored: torch.Tensor, upper: bool) -> torch.Tensor:
    """q from q + 8 in the lower or upper nibbles."""
    numbers = (stored ^ 0x88).view(torch.int8)  # two's complement in each nibble; >> carries the sign
    if not upper:
        numbers <<= 4
    numbers >>= 4
    return numbers


def _fp4(stored: torch.Tensor, upper: bool) -> torch.Tensor:
    """Numbers from E2M1 codes: their bits, put on top of f16's, are the same numbers times 2^-14."""
    numbers = (stored & (0x70 if upper else 0x07)).to(torch.int16)
    numbers <<= 5 if upper else 9
    sign = (stored & (0x80 if upper else 0x08)).to(torch.int16)
    sign <<= 8 if upper else 12
    numbers |= sign
    halves = numbers.view(torch.float16)
    halves *= 2.0**14
    return halves


_NUMBERS = {"int8": _int8, "int4": _int4, "mxfp4": _fp4}
# Bytes for a number beside the result, at most: codes, and scales on their way to f32.
_SPARE = {"int8": 1.25, "int4": 0.75, "mxfp4": 2.75}


def _scales(stored: torch.Tensor, shape: PackedShape) -> torch.Tensor:
    """f32 scales, [blocks, outputs, records, groups of one, 1, 1]."""
    if shape.dtype == "mxfp4":
        exponents = stored.to(torch.int32)
        # 0 is 2^-127, a subnormal f32; 255 is NaN: both have f32's uppermost fraction bit
        odd = ((exponents == 0) | (exponents == 255)).to(torch.int32) << 22
        values = (exponents << 23 | odd).view(torch.float32)
    else:
        values = stored.contiguous().view(torch.float16).to(torch.float32)
    by_group = values.view(shape.blocks, shape.records, shape.groups_per_record, WIDTH, 1, 1)
    return by_group.permute(0, 3, 1, 2, 4, 5)
