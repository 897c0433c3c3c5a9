"""The job of a stage of matrices: y = norm(x) @ W.T + bias (+ residual) for one or several W at once.

    phase 1   every token's input is normalised (where there is a norm) and becomes what the product reads
    phase 2   blocks of 32 outputs of all matrices, one behind the other, shared by counters

It follows the stage protocol (stages.py).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_offload.cpu_kernels import matrix_block as word
from moe_offload.cpu_kernels.activation_rows import Arithmetic, make_quantise
from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.jit import native, specialised
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.memory import load_f32, load_i64, store_i64
from moe_offload.cpu_kernels.packed_job import make_product
from moe_offload.cpu_kernels.packed_layout import WIDTH, ZERO_POINT, PackedMatrix
from moe_offload.cpu_kernels.row_job import make_matrix, make_tiles
from moe_offload.cpu_kernels.target import Target
from moe_offload.cpu_kernels.vector_ops import (
    add_vector,
    copy_vector,
    round_all,
    scale_by_weights,
    sum_square_distances,
    sum_squares,
    sum_values,
)


@native
def normalise(to: int, x: int, count: int, weight: int, bias: int, epsilon: float, code: int) -> None:
    """RMSNorm of `count` f32 values at x, or LayerNorm where there is a bias (not 0); to may be x."""
    shift = 0.0
    squares = float(sum_squares(x, count)) / count
    if bias != 0:
        shift = float(sum_values(x, count)) / count
        squares = float(sum_square_distances(x, count, np.float32(shift))) / count
    factor = 1.0 / math.sqrt(squares + epsilon)
    scale_by_weights(to, count, x, np.float32(shift), np.float32(factor), weight, bias, code)


@native
def _entry_of(args: int, block: int) -> int:
    """Address of the entry that a block belongs to."""
    entry = load_i64(args + word.ENTRIES)
    while block >= load_i64(entry + word.FIRST) + (load_i64(entry + word.OUTPUTS) + WIDTH - 1) // WIDTH:
        entry += word.ENTRY_BYTES
    return entry  # type: ignore[no-any-return]


@native
def _finish(args: int, entry: int, t: int, y: int, start: int, count: int) -> None:
    """Bias, rounding and residual of one token's outputs start to start + count at y, then store them."""
    code = load_i64(args + word.ROUND)
    bias, add = load_i64(entry + word.BIAS), load_i64(entry + word.ADD)
    if bias != 0:
        add_vector(y, count, bias + 4 * start)
    round_all(y, count, code)
    if add != 0:
        add_vector(y, count, add + t * load_i64(entry + word.ADD_STEP) + 4 * start)
        round_all(y, count, code)
    copy_vector(load_i64(entry + word.OUT) + t * load_i64(entry + word.OUT_STEP) + 4 * start, count, y)


def make_matrix_job(
    key: str, layout: PackedMatrix | WeightType, arithmetic: Arithmetic, target: Target
) -> Callable[[int, int], None]:
    """The job `(thread, args)` for packed matrices (only dtype and group of the layout matter), or for rows of
    stored elements.
    """
    if isinstance(layout, PackedMatrix):
        prepare, compute = _packed_parts(key, layout, arithmetic, target)
    else:
        prepare, compute = _row_parts(key, layout, target)

    @specialised(key)
    def rows_of(args: int, t: int) -> None:
        cols = load_i64(args + word.COLS)
        x = load_i64(args + word.X) + t * load_i64(args + word.X_STEP)
        norm = load_i64(args + word.NORM)
        if norm != 0:
            to = load_i64(args + word.NORM_OUT) + 4 * cols * t
            bias, epsilon = load_i64(args + word.NORM_BIAS), load_f32(args + word.EPSILON)
            normalise(to, x, cols, norm, bias, epsilon, load_i64(args + word.ROUND))
            x = to
        prepare(args, t, x)

    @specialised(key)
    def blocks_of(args: int, local: int, entry: int, start: int, count: int) -> None:
        """Blocks start to start + count of a matrix, for all tokens."""
        tokens, chunk, begin = load_i64(args + word.TOKENS), load_i64(args + word.CHUNK), 0
        outputs = min(WIDTH * count, load_i64(entry + word.OUTPUTS) - WIDTH * start)
        planes = 2 if tokens <= load_i64(args + word.BOTH_PLANES) else 1
        while begin < tokens:
            now = min(chunk, tokens - begin)
            rows = load_i64(args + word.ROW_LIST) + 8 * begin
            compute(args, entry, start, count, outputs, rows, now, planes, local)
            for t in range(now):
                _finish(args, entry, begin + t, local + 4 * WIDTH * count * t, WIDTH * start, outputs)
            begin += now

    def run(thread: int, args: int) -> None:
        local = load_i64(args + word.LOCAL) + thread * load_i64(args + word.LOCAL_BYTES)
        tokens = load_i64(args + word.TOKENS)
        while True:
            t = fetch_add(args + word.NEXT_ROWS, 1)
            if t >= tokens:
                break
            rows_of(args, t)
            fetch_add(args + word.DONE_ROWS, 1)
        wait_for_count(args + word.DONE_ROWS, tokens)
        jobs, cuts, most = load_i64(args + word.JOBS), load_i64(args + word.CUTS), load_i64(args + word.RUN)
        while True:
            job = fetch_add(args + word.NEXT_BLOCKS, 1)
            if job >= jobs:
                break
            at, end = load_i64(cuts + 8 * job), load_i64(cuts + 8 * job + 8)
            while at < end:
                entry = _entry_of(args, at)
                start = at - load_i64(entry + word.FIRST)
                blocks = (load_i64(entry + word.OUTPUTS) + WIDTH - 1) // WIDTH
                count = min(most, end - at, blocks - start)
                blocks_of(args, local, entry, start, count)
                at += count
            fetch_add(args + word.DONE_BLOCKS, 1)
        wait_for_count(args + word.DONE_BLOCKS, jobs)

    return run


def _packed_parts(key: str, layout: PackedMatrix, arithmetic: Arithmetic, target: Target) -> tuple[Any, Any]:
    product = make_product(key, layout, arithmetic, target)
    quantise = make_quantise(arithmetic, layout.group, ZERO_POINT[layout.dtype], target)
    record_bytes = layout.record_bytes

    @specialised(key)
    def prepare(args: int, t: int, x: int) -> None:
        row, padded = load_i64(args + word.ROWS) + t * load_i64(args + word.ROW_BYTES), load_i64(args + word.PADDED)
        quantise(x, load_i64(args + word.COLS), row, padded, 0, padded)

    @specialised(key)
    def compute(
        args: int, entry: int, start: int, count: int, outputs: int, rows: int, tokens: int, planes: int, local: int
    ) -> None:
        records, padded = load_i64(args + word.RECORDS), load_i64(args + word.PADDED)
        at = load_i64(entry + word.WEIGHTS) + start * records * record_bytes
        for b in range(count):
            to = local + 4 * WIDTH * b
            product(at + b * records * record_bytes, records, rows, tokens, planes, padded, to, 4 * WIDTH * count)

    return prepare, compute


def _row_parts(key: str, dtype: WeightType, target: Target) -> tuple[Any, Any]:
    matrix = make_matrix(key, *make_tiles(key, dtype, target))
    size = ELEMENT_BYTES[dtype]

    @specialised(key)
    def prepare(args: int, t: int, x: int) -> None:
        store_i64(x, load_i64(args + word.ROW_LIST) + 8 * t)

    @specialised(key)
    def compute(
        args: int, entry: int, start: int, count: int, outputs: int, rows: int, tokens: int, planes: int, local: int
    ) -> None:
        cols = load_i64(args + word.COLS)
        at = load_i64(entry + word.WEIGHTS) + WIDTH * start * cols * size
        matrix(at, cols * size, outputs, rows, tokens, cols, local, 4 * WIDTH * count)

    return prepare, compute
