"""Dequantised matrices: bit for bit those of `unpack`, in every format, type and shape, and nothing beside them."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_offload.gpu_kernels import unpack
from moe_offload.gpu_kernels.dequantise import TYPE_NUMBERS, VARIANTS, Dequantiser
from moe_offload.gpu_kernels.launch import KernelError
from moe_offload.gpu_kernels.sources import read_source
from tests.gpu_kernels.host_kernels import ORDERS, HostKernels, needs_compiler, numbers_only

pytestmark = needs_compiler
FORMATS = [
    ("int8", 32), ("int8", 64), ("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128), ("mxfp4", 32),
    ("bf16", 32), ("f16", 32), ("f32", 32),
]  # fmt: skip
TYPES = list(TYPE_NUMBERS)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def any_bytes(count: int, seed: int) -> torch.Tensor:
    """Aligned to 64. Any bytes at all are a matrix: every code meets scales of every kind, NaN and infinity too."""
    memory = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count + 64, np.uint8))
    return memory[-memory.data_ptr() % 64 :][:count]


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """NaN is NaN, whichever."""
    same = found.view(BITS[found.dtype]) == expected.contiguous().view(BITS[expected.dtype])
    return bool((same | (found.isnan() & expected.isnan())).all())


def compare(kernels: HostKernels, dtype: str, group: int, to: torch.dtype, rows: int, cols: int, seed: int) -> None:
    data = any_bytes(unpack.matrix_bytes(dtype, rows, cols, group), seed)
    found = Dequantiser(kernels, dtype, group, to)(data, rows, cols)
    assert found.shape == (rows, cols) and found.dtype == to and found.is_contiguous()
    assert same_bits(found, unpack.matrix(data, dtype, rows, cols, group, to))


@pytest.mark.parametrize("to", TYPES, ids=str)
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from(ORDERS), st.integers(0, 2**32 - 1))
@example(32, 128, 0, 0)
@example(33, 136, 1, 1)
@example(64, 104, 2, 2)
@example(31, 259, 3, 3)
@settings(deadline=None, max_examples=4)
def test_bits_are_those_of_unpack(
    dtype: str, group: int, to: torch.dtype, rows: int, cols: int, order: int, seed: int
) -> None:
    if dtype == "mxfp4":  # comes in whole groups
        cols = -(-cols // 32) * 32
    compare(HostKernels(order), dtype, group, to, rows, cols, seed)


def right_and_alone(kernels: HostKernels, dtype: str, to: torch.dtype, rows: int, cols: int) -> bool:
    """Whether the matrix is right, and what lies on both sides of it what it was."""
    data, room = any_bytes(unpack.matrix_bytes(dtype, rows, cols, 32), 5), 8192
    whole = torch.full((rows * cols + 2 * room,), 7.0, dtype=to)
    found = whole[room:-room].view(rows, cols)
    try:
        Dequantiser(kernels, dtype, 32, to).write(data, found)
    except KernelError:
        return False
    alone = bool((whole[:room] == 7).all() and (whole[-room:] == 7).all())
    return alone and same_bits(found, unpack.matrix(data, dtype, rows, cols, 32, to))


@pytest.mark.parametrize("dtype", [name for name, group in FORMATS if group == 32])
def test_nothing_is_written_beside_the_matrix(dtype: str) -> None:
    to = torch.float16 if dtype == "f32" else torch.float32
    assert right_and_alone(HostKernels(), dtype, to, 35, 160)


@pytest.mark.parametrize(
    ("dtype", "to"),
    [("f32", torch.float16), ("f32", torch.bfloat16), ("f16", torch.bfloat16), ("bf16", torch.float16)],
    ids=str,
)
def test_every_number_is_rounded_to_nearest_even(dtype: str, to: torch.dtype) -> None:
    """All 2^16 of 16 bits; of f32 those, and what lies at and beside the middle of two."""
    stored = unpack.ELEMENT_TYPES[dtype]
    bits = torch.arange(1 << 16, dtype=torch.int32)
    if dtype == "f32":
        shift = 16 if to == torch.bfloat16 else 13
        bits = torch.cat([(bits << shift) + (1 << shift - 1) + beside for beside in (-1, 0, 1)])
        values = bits.view(torch.float32)
    else:
        values = bits.to(torch.int16).view(stored)
    matrix = values.view(-1, 64)
    found = Dequantiser(HostKernels(), dtype, 32, to)(values.view(torch.uint8), *matrix.shape)
    assert same_bits(found, matrix.to(to))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_what_lies_as_computed_is_seen_in_place(dtype: str) -> None:
    to = unpack.ELEMENT_TYPES[dtype]
    data = any_bytes(unpack.matrix_bytes(dtype, 3, 5, 32), 0)
    dequantise = Dequantiser(HostKernels(), dtype, 32, to)
    assert dequantise.in_place
    assert dequantise(data, 3, 5).data_ptr() == data.data_ptr()
    assert not Dequantiser(HostKernels(), "int4", 32, to).in_place


def test_all_variants_are_those_that_convert() -> None:
    assert len(set(VARIANTS["dequantise.cu"])) == 3 * 3 + 3 * 2  # packed to any; stored to another
    with pytest.raises(ValueError, match="'int3'"):
        Dequantiser(HostKernels(), "int3", 32, torch.float32)


BUGS = {
    "no barrier": ("    __syncthreads();\n    for (int i", "    for (int i"),
    "rows behind the end": ("row >= rows || ", ""),
    "columns behind the end": ("col + n < cols", "true"),
    "first group's scales": ("row / 8 * (OUTPUTS / 4)", "0"),
    "no zero point": ("15u) - 8", "15u) - 7"),
    "one nibble": ("codes[i] >> 4", "codes[i]"),
    "swizzled once": ("vector ^ SWIZZLE(output) * SIZE / 4", "vector"),
}


@numbers_only
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str) -> None:
    right, wrong = BUGS[name]
    text = read_source("dequantise.cu")
    assert right in text
    planted = text.replace(right, wrong)
    dtype = "mxfp4" if "group" in name else "int4"
    cases = [(order, rows, cols) for order in ORDERS for rows, cols in ((35, 160), (33, 65))]
    found = [
        not right_and_alone(HostKernels.of_text(planted, order), dtype, torch.float32, r, c) for order, r, c in cases
    ]
    assert any(found)
