"""Quantising matrices into the packed layout, and the inverse.

int8 takes each group's largest magnitude for 127. int4 searches: with 16 levels the largest magnitude is rarely the
best choice. For several scales around it (of either sign: the levels reach from -8 to 7, so the sign says which side
gets the extra one) the weights are rounded, the scale is fitted to them by least squares,

    scale = sum(w * q) / sum(q * q),

rounded to f16, and the pair with the least squared error is kept. The same idea is in the quantisers of llama.cpp.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.kernel_cache import compiled
from moe_offload.cpu_kernels.packed_layout import WIDTH, ZERO_POINT, PackedMatrix

# What the largest magnitude of a group is divided by, in turn; measured on normal weights, more change the error by
# less than half a percent.
_INT4_DIVISORS = np.array([-8.0, -7.0, -8.6, -7.5, -6.4, 7.0, 7.5, 6.5, -9.2], np.float32)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
HALF_MAX = 65504.0


@native
def _round(x: float) -> float:
    """Nearest integer of |x| < 2^22; ties to even."""
    magic = np.float32(12582912.0)
    return np.float32(np.float32(x + magic) - magic)  # type: ignore[return-value]


@native
def _to_half(x: float) -> float:
    """x rounded to a number that f16 holds."""
    size = abs(x)
    if size < np.float32(6.103515625e-05):
        half = np.float32(0.5)  # f32 numbers beside it are as far apart as f16's subnormal ones
        rounded = np.float32(np.float32(size + half) - half)
    else:
        split = np.float32(size * np.float32(8193.0))  # Veltkamp: the upper 11 bits
        rounded = np.float32(split - np.float32(split - size))
    return -rounded if x < 0 else rounded  # type: ignore[return-value]


@compiled("void(Array(float32,2,'C',readonly=True), uint8[:,:,:,::1], float32[:,:,::1], int64, int64, int64)")
def _quantise_int8(
    weights: NDArray[np.float32],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    first: int,
    last: int,
    group: int,
) -> None:
    """Blocks first to last: codes [blocks, groups, G, 32] as q + 128, scales [blocks, groups, 32]."""
    rows, cols = weights.shape
    for block in range(first, last):
        for g in range(codes.shape[1]):
            width = min(group, cols - g * group)
            for c in range(min(32, rows - 32 * block)):
                row = weights[32 * block + c]
                largest = np.float32(0.0)
                for k in range(width):
                    largest = max(largest, abs(row[g * group + k]))
                scale = _to_half(np.float32(largest * np.float32(1 / 127)))
                if scale < np.float32(6.103515625e-05) and scale * np.float32(127.0) < largest:
                    scale += np.float32(5.9604645e-08)  # among f16's subnormals the next one up is no small step
                inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
                scales[block, g, c] = scale
                for k in range(width):
                    q = _round(row[g * group + k] * inverse)
                    q = min(max(q, np.float32(-127.0)), np.float32(127.0))
                    codes[block, g, k, c] = np.uint8(np.int32(q) + 128)


@compiled(
    "void(Array(float32,2,'C',readonly=True), uint8[:,:,:,::1], float32[:,:,::1], int64, int64, int64,"
    " Array(float32,1,'C',readonly=True))"
)
def _quantise_int4(
    weights: NDArray[np.float32],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    first: int,
    last: int,
    group: int,
    divisors: NDArray[np.float32],
) -> None:
    """As for int8, with q + 8. All 32 outputs of a block at once, so that the compiler has lanes to work on."""
    rows, cols = weights.shape
    tile = np.zeros((group, 32), np.float32)
    work = np.zeros((7, 32), np.float32)
    extreme, inverse, best, fitted, dot, square, error = work[0], work[1], work[2], work[3], work[4], work[5], work[6]
    low, high = np.float32(-8.0), np.float32(7.0)
    for block in range(first, last):
        outputs = min(32, rows - 32 * block)
        for g in range(codes.shape[1]):
            width = min(group, cols - g * group)
            for c in range(outputs):
                for k in range(width):
                    tile[k, c] = weights[32 * block + c, g * group + k]
            extreme[:] = 0
            for k in range(width):
                for c in range(32):
                    w = tile[k, c]
                    extreme[c] = w if abs(w) > abs(extreme[c]) else extreme[c]
            best[:] = np.inf
            for d in range(divisors.size):
                for c in range(32):
                    inverse[c] = divisors[d] / extreme[c] if extreme[c] != 0 else np.float32(0.0)
                    dot[c] = 0
                    square[c] = 0
                    error[c] = 0
                for k in range(width):
                    for c in range(32):
                        q = min(max(_round(tile[k, c] * inverse[c]), low), high)
                        dot[c] += tile[k, c] * q
                        square[c] += q * q
                for c in range(32):
                    dot[c] = _to_half(dot[c] / square[c] if square[c] > 0 else np.float32(0.0))
                for k in range(width):
                    for c in range(32):
                        q = min(max(_round(tile[k, c] * inverse[c]), low), high)
                        off = tile[k, c] - dot[c] * q
                        error[c] += off * off
                for c in range(32):
                    if error[c] < best[c]:
                        best[c] = error[c]
                        fitted[c] = dot[c]
            for c in range(outputs):
                scales[block, g, c] = fitted[c]
                inverse[c] = np.float32(1.0) / fitted[c] if fitted[c] != 0 else np.float32(0.0)
            for k in range(width):
                for c in range(outputs):
                    q = min(max(_round(tile[k, c] * inverse[c]), low), high)
                    codes[block, g, k, c] = np.uint8(np.int32(q) + 8)


@compiled("void(Array(uint8,4,'C',readonly=True), uint8[:,:,::1], int64, int64, int64, int64)")
def _place(
    codes: NDArray[np.uint8], out: NDArray[np.uint8], first: int, last: int, groups_per_record: int, nibbles: int
) -> None:
    """codes [blocks, groups, G, 32] into the rows of out [blocks, records, record bytes]."""
    groups, group = codes.shape[1], codes.shape[2]
    for block in range(first, last):
        for g in range(groups):
            record, part = g // groups_per_record, g % groups_per_record
            at = part * (group // 4) * (64 if nibbles else 128)
            for k in range(group):
                r, j = k // 4, k % 4
                if nibbles:
                    for c in range(16):
                        both = codes[block, g, k, c] | (codes[block, g, k, c + 16] << 4)
                        out[block, record, at + r * 64 + c * 4 + j] = both
                else:
                    for c in range(32):
                        out[block, record, at + r * 128 + c * 4 + j] = codes[block, g, k, c]


COMPILED = (_quantise_int8, _quantise_int4, _place)

# Calls work(first, last) so that all of range(count) is covered, on as many threads as it likes.
Split = Callable[[Callable[[int, int], None], int], None]


def serial(work: Callable[[int, int], None], count: int) -> None:
    """A `Split` on the calling thread."""
    work(0, count)


def pack_matrix(
    weights: NDArray[np.float32], layout: PackedMatrix, out: NDArray[np.uint8], split: Split = serial
) -> None:
    """Quantise weights [N, K] into out [layout.nbytes].

    Raises ValueError when the weights hold NaN or infinity, or are too large for an f16 scale.
    """
    if weights.shape != (layout.rows, layout.cols) or layout.dtype == "mxfp4":
        raise ValueError(f"weights {weights.shape} do not go into {layout}")
    weights = np.ascontiguousarray(weights, np.float32)
    largest = float(max(weights.max(), -weights.min()))
    bound = HALF_MAX * (127 if layout.dtype == "int8" else 6)
    if not largest <= bound:  # NaN is not
        raise ValueError(
            f"weights cannot be {layout.dtype}: the largest is {largest:g}, above {bound:g}, or not a number"
        )
    codes = np.full((layout.blocks, layout.groups, layout.group, WIDTH), ZERO_POINT[layout.dtype], np.uint8)
    scales = np.zeros((layout.blocks, layout.groups, WIDTH), np.float32)

    def quantise(first: int, last: int) -> None:
        if layout.dtype == "int8":
            _quantise_int8(weights, codes, scales, first, last, layout.group)
        else:
            _quantise_int4(weights, codes, scales, first, last, layout.group, _INT4_DIVISORS)

    split(quantise, layout.blocks)
    _put(codes, scales.astype(np.float16), layout, out, split)


def pack_mxfp4(
    codes: NDArray[np.uint8], exponents: NDArray[np.uint8], layout: PackedMatrix, out: NDArray[np.uint8],
    split: Split = serial,
) -> None:  # fmt: skip
    """MXFP4 codes [N, K] (0 to 15, a byte each) and exponents [N, K/32] biased by 127, into out [layout.nbytes].

    Nothing is rounded: unpacking gives the stored numbers.
    """
    if codes.shape != (layout.rows, layout.cols) or layout.dtype != "mxfp4" or layout.cols % 32:
        raise ValueError(f"codes {codes.shape} do not go into {layout}")
    rows, cols = layout.blocks * WIDTH, layout.padded_cols
    padded = np.zeros((rows, cols), np.uint8)
    padded[: layout.rows, : layout.cols] = codes
    scales = np.full((rows, layout.groups), 127, np.uint8)
    scales[: layout.rows, : layout.cols // 32] = exponents
    blocked = padded.reshape(layout.blocks, WIDTH, layout.groups, 32).transpose(0, 2, 3, 1)
    by_block = scales.reshape(layout.blocks, WIDTH, layout.groups).transpose(0, 2, 1)
    _put(np.ascontiguousarray(blocked), np.ascontiguousarray(by_block), layout, out, split)


def _put(
    codes: NDArray[np.uint8], scales: NDArray[Any], layout: PackedMatrix, out: NDArray[np.uint8], split: Split
) -> None:
    """codes [blocks, groups, G, 32] and scales [blocks, groups, 32], as stored."""
    records = out[: layout.nbytes].reshape(layout.blocks, layout.records, layout.record_bytes)
    nibbles = int(layout.dtype != "int8")
    split(lambda first, last: _place(codes, records, first, last, layout.groups_per_record, nibbles), layout.blocks)
    records[:, :, layout.scales_at :] = scales.view(np.uint8).reshape(layout.blocks, layout.records, -1)


def unpack_matrix(packed: NDArray[np.uint8], layout: PackedMatrix) -> NDArray[np.float32]:
    """The weights [N, K] that packed [layout.nbytes] stands for."""
    records = np.asarray(packed[: layout.nbytes]).reshape(layout.blocks, layout.records, layout.record_bytes)
    rows = records[:, :, : layout.scales_at].reshape(layout.blocks, layout.groups, layout.group // 4, -1, 4)
    if layout.dtype != "int8":
        rows = np.concatenate([rows & 15, rows >> 4], axis=3)
    # [blocks, groups, G/4, 32, 4] -> [blocks, 32, groups, G/4, 4]
    codes = rows.transpose(0, 3, 1, 2, 4)
    stored = np.ascontiguousarray(records[:, :, layout.scales_at :])
    if layout.dtype == "mxfp4":
        exponents = stored.reshape(layout.blocks, layout.groups, WIDTH).astype(np.int32)
        scales = np.where(exponents == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents - 127))
        values = _FP4[codes]
    else:
        scales = stored.view(np.float16).reshape(layout.blocks, layout.groups, WIDTH).astype(np.float32)
        values = codes.astype(np.float32) - ZERO_POINT[layout.dtype]
    weights = values * scales.astype(np.float32).transpose(0, 2, 1)[..., None, None]
    return np.ascontiguousarray(
        weights.reshape(layout.blocks * WIDTH, layout.padded_cols)[: layout.rows, : layout.cols], np.float32
    )
