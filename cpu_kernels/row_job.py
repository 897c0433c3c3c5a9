"""A layer's experts in row-major layout, as one job for the thread team.

First phase: jobs are (expert, block of intermediate outputs). A thread takes the next number from
a shared counter, so that a core that is slower, or woke late, simply does fewer. It computes
act(gate x, up x) for all rows of the expert, while the block's weights come from memory once.
Second phase, after all first jobs are done (jobs are counted, not threads: a late thread holds
nobody up): jobs are stripes of output columns. The owner of a stripe adds every expert's rows in
ascending order, so nothing is atomic and the bits do not depend on who computed what.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.dot import make_dot
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, ActivationKind, WeightType
from moe_offload.cpu_kernels.memory import (
    add_elements,
    add_scaled,
    load_f32,
    load_i32,
    load_i64,
)

_inline = njit(nogil=True, error_model="numpy", boundscheck=False)


def _make_tiles(dtype: WeightType, lanes: int) -> tuple[Any, Any]:
    """Dot products of four weight rows, or of one, with any number of tokens."""
    dot4, dot2, dot1 = (make_dot(dtype, 4, tokens, lanes) for tokens in (4, 2, 1))
    single_dot = make_dot(dtype, 1, 1, lanes)

    @_inline
    def four(a, b, gap, xs, tokens, count, to_a, to_b, to_gap, step_a, step_b):  # type: ignore[no-untyped-def]
        t = 0
        while tokens - t >= 4:
            at_a, at_b = to_a + t * step_a, to_b + t * step_b
            dot4(a, b, gap, xs + 8 * t, count, at_a, at_b, to_gap, step_a, step_b)
            t += 4
        if tokens - t >= 2:
            at_a, at_b = to_a + t * step_a, to_b + t * step_b
            dot2(a, b, gap, xs + 8 * t, count, at_a, at_b, to_gap, step_a, step_b)
            t += 2
        if tokens - t >= 1:
            at_a, at_b = to_a + t * step_a, to_b + t * step_b
            dot1(a, b, gap, xs + 8 * t, count, at_a, at_b, to_gap, step_a, step_b)

    @_inline
    def one(row, xs, tokens, count, to, step):  # type: ignore[no-untyped-def]
        """Only for what is left of an odd number of rows: not worth tiles of its own."""
        for t in range(tokens):
            single_dot(row, 0, 0, xs + 8 * t, count, to + t * step, 0, 0, 0, 0)

    return four, one


def make_row_job(
    dtype: WeightType, gated: bool, kind: ActivationKind, lanes: int
) -> Callable[..., Any]:
    """The job function `(thread, args)`, to be compiled as "void(int64,int64)"."""
    size = ELEMENT_BYTES[dtype]
    four, one = _make_tiles(dtype, lanes)
    activate = make_activate(kind, gated, 1, lanes)

    @_inline
    def two_matrices(gate, up, stride, rows, xs, tokens, count, to_a, to_b, step_a, step_b):  # type: ignore[no-untyped-def]
        """to_a[t][r] = gate[r] . x[t], to_b[t][r] = up[r] . x[t]: two streams in each."""
        half = rows // 2
        gap = half * stride
        for r in range(half):
            a, b = gate + r * stride, up + r * stride
            four(a, b, gap, xs, tokens, count, to_a + 4 * r, to_b + 4 * r, 4 * half, step_a, step_b)
        for r in range(2 * half, rows):
            one(gate + r * stride, xs, tokens, count, to_a + 4 * r, step_a)
            one(up + r * stride, xs, tokens, count, to_b + 4 * r, step_b)

    @_inline
    def matrix(weights, stride, rows, xs, tokens, count, to, step):  # type: ignore[no-untyped-def]
        """to[t][r] = weights[r] . x[t]: four streams."""
        quarter = rows // 4
        gap = quarter * stride
        for r in range(quarter):
            a = weights + r * stride
            b = a + 2 * gap
            to_a = to + 4 * r
            to_b = to_a + 8 * quarter
            four(a, b, gap, xs, tokens, count, to_a, to_b, 4 * quarter, step, step)
        for r in range(4 * quarter, rows):
            one(weights + r * stride, xs, tokens, count, to + 4 * r, step)

    @_inline
    def first(args, local, entry, start, stop):  # type: ignore[no-untyped-def]
        """Intermediate outputs start to stop of one expert, for all its rows."""
        hidden = load_i64(args + word.HIDDEN)
        stride = load_i64(args + word.ROW_STRIDE)
        chunk = load_i64(args + word.CHUNK)
        bias_step = load_i64(args + word.BIAS_STEP)
        code = load_i64(args + word.BIAS_CODE)
        alpha, limit = load_f32(args + word.ALPHA), load_f32(args + word.LIMIT)
        inputs, middles = load_i64(args + word.INPUTS), load_i64(args + word.MIDDLES)
        middle_bytes = load_i64(args + word.MIDDLE_BYTES)
        expert = load_i32(load_i64(args + word.EXPERTS) + 4 * entry)
        record = load_i64(args + word.TABLE) + 48 * expert
        gate, up = load_i64(record), load_i64(record + 8)
        gate_bias, up_bias = load_i64(record + 24), load_i64(record + 32)
        offsets = load_i64(args + word.OFFSETS) + 8 * entry
        begin, end = load_i64(offsets), load_i64(offsets + 8)
        count = stop - start
        local_stride = 4 * count
        while begin < end:
            tokens = min(chunk, end - begin)
            xs = inputs + 8 * begin
            h = load_i64(middles + 8 * begin) + 4 * start
            if gated:
                a, b = gate + start * stride, up + start * stride
                two_matrices(
                    a, b, stride, count, xs, tokens, hidden, h, local, middle_bytes, local_stride
                )
            else:
                matrix(up + start * stride, stride, count, xs, tokens, hidden, h, middle_bytes)
            for t in range(tokens):
                g = h + t * middle_bytes
                u = local + t * local_stride if gated else g
                if gated and gate_bias != 0:
                    bias = gate_bias + start * bias_step * _bytes(code)
                    add_elements(g, count, bias, bias_step, code)
                if up_bias != 0:
                    bias = up_bias + start * bias_step * _bytes(code)
                    add_elements(u, count, bias, bias_step, code)
                activate(g, u, g, count, alpha, limit)
            begin += tokens

    @_inline
    def second(args, local, start, stop):  # type: ignore[no-untyped-def]
        """Output columns start to stop of every token: all experts, ascending."""
        intermediate = load_i64(args + word.INTERMEDIATE)
        hidden = load_i64(args + word.HIDDEN)
        chunk = load_i64(args + word.CHUNK)
        code = load_i64(args + word.BIAS_CODE)
        middles, out = load_i64(args + word.MIDDLES), load_i64(args + word.OUT)
        tokens_at = load_i64(args + word.TOKENS)
        weights_at = load_i64(args + word.WEIGHTS)
        count = stop - start
        stride = intermediate * size
        for entry in range(load_i64(args + word.ACTIVE)):
            expert = load_i32(load_i64(args + word.EXPERTS) + 4 * entry)
            record = load_i64(args + word.TABLE) + 48 * expert
            down = load_i64(record + 16) + start * stride
            down_bias = load_i64(record + 40)
            offsets = load_i64(args + word.OFFSETS) + 8 * entry
            begin, end = load_i64(offsets), load_i64(offsets + 8)
            while begin < end:
                tokens = min(chunk, end - begin)
                xs = middles + 8 * begin
                matrix(down, stride, count, xs, tokens, intermediate, local, 4 * count)
                for t in range(tokens):
                    y = local + 4 * count * t
                    if down_bias != 0:
                        add_elements(y, count, down_bias + start * _bytes(code), 1, code)
                    token = load_i32(tokens_at + 4 * (begin + t))
                    weight = load_f32(weights_at + 4 * (begin + t))
                    add_scaled(out + 4 * (token * hidden + start), count, y, weight)
                begin += tokens

    return make_two_phases(first, second)


@_inline
def _bytes(code):  # type: ignore[no-untyped-def]
    return 4 if code == 2 else 2


def make_two_phases(first: Any, second: Any) -> Callable[..., Any]:
    """The job of both layouts: first(args, local, entry, start, stop), then second(...)."""

    def run(thread, args):  # type: ignore[no-untyped-def]
        local = load_i64(args + word.LOCAL) + thread * load_i64(args + word.LOCAL_BYTES)
        active = load_i64(args + word.ACTIVE)
        size, block = load_i64(args + word.INTERMEDIATE), load_i64(args + word.FIRST_BLOCK)
        blocks = (size + block - 1) // block
        while True:
            job = fetch_add(args + word.NEXT_FIRST, 1)
            if job >= active * blocks:
                break
            entry = job // blocks
            start = (job - entry * blocks) * block
            first(args, local, entry, start, min(size, start + block))
            fetch_add(args + word.DONE_FIRST, 1)
        wait_for_count(args + word.DONE_FIRST, active * blocks)
        size, block = load_i64(args + word.HIDDEN), load_i64(args + word.SECOND_BLOCK)
        while True:
            start = fetch_add(args + word.NEXT_SECOND, 1) * block
            if start >= size:
                break
            second(args, local, start, min(size, start + block))

    return run
