"""A layer's experts in transposed layout, as one job for the thread team.

The phases are those of `row_job`; a block of outputs is a block of columns here. Rows of the
block go by in slabs that stay in the cache while tile after tile of tokens uses them.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.columns import make_columns
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, ActivationKind, WeightType
from moe_offload.cpu_kernels.memory import (
    add_elements,
    add_scaled,
    clear,
    load_f32,
    load_i32,
    load_i64,
)
from moe_offload.cpu_kernels.row_job import _bytes, make_two_phases

_inline = njit(nogil=True, error_model="numpy", boundscheck=False)
_SLAB = 64  # rows of weights that all tokens use before the next rows are read


def make_column_job(
    dtype: WeightType, gated: bool, kind: ActivationKind, step: int, lanes: int
) -> Callable[..., Any]:
    """The job function `(thread, args)`; `step` 2 means gate and up columns interleaved."""
    size = ELEMENT_BYTES[dtype]
    columns4, columns2, columns1 = (make_columns(dtype, tokens, lanes) for tokens in (4, 2, 1))
    activate = make_activate(kind, gated, step, lanes)

    @_inline
    def matrix(weights, stride, width, xs, tokens, count, y):  # type: ignore[no-untyped-def]
        """y[t][c] = sum over k of x[t][k] * weights[k][c]; y is dense."""
        clear(y, tokens * width)
        y_stride = 4 * width
        for k0 in range(0, count, _SLAB):
            k1 = min(count, k0 + _SLAB)
            t = 0
            while tokens - t >= 4:
                columns4(weights, stride, width, xs + 8 * t, k0, k1, y + t * y_stride, y_stride)
                t += 4
            if tokens - t >= 2:
                columns2(weights, stride, width, xs + 8 * t, k0, k1, y + t * y_stride, y_stride)
                t += 2
            if tokens - t >= 1:
                columns1(weights, stride, width, xs + 8 * t, k0, k1, y + t * y_stride, y_stride)

    @_inline
    def add_strided(target, step, count, source, source_step, code):  # type: ignore[no-untyped-def]
        for i in range(count):
            add_elements(target + 4 * step * i, 1, source + source_step * _bytes(code) * i, 1, code)

    @_inline
    def first(args, local, entry, start, stop):  # type: ignore[no-untyped-def]
        hidden = load_i64(args + word.HIDDEN)
        stride = load_i64(args + word.ROW_STRIDE)
        chunk = load_i64(args + word.CHUNK)
        bias_step = load_i64(args + word.BIAS_STEP)
        code = load_i64(args + word.BIAS_CODE)
        alpha, limit = load_f32(args + word.ALPHA), load_f32(args + word.LIMIT)
        inputs, middles = load_i64(args + word.INPUTS), load_i64(args + word.MIDDLES)
        expert = load_i32(load_i64(args + word.EXPERTS) + 4 * entry)
        record = load_i64(args + word.TABLE) + 48 * expert
        gate, up = load_i64(record), load_i64(record + 8)
        gate_bias, up_bias = load_i64(record + 24), load_i64(record + 32)
        offsets = load_i64(args + word.OFFSETS) + 8 * entry
        begin, end = load_i64(offsets), load_i64(offsets + 8)
        count = stop - start
        bias_at = start * bias_step * _bytes(code)
        while begin < end:
            tokens = min(chunk, end - begin)
            xs = inputs + 8 * begin
            if step == 2:
                # one run of columns holds both, whichever of the two comes first
                low = min(gate, up) + start * 2 * size
                matrix(low, stride, 2 * count, xs, tokens, hidden, local)
                width = 2 * count
                gates = local if gate < up else local + 4
                ups = local + 4 if gate < up else local
            else:
                width = count
                gates = local
                ups = local + 4 * count * tokens if gated else local
                matrix(up + start * size, stride, count, xs, tokens, hidden, ups)
                if gated:
                    matrix(gate + start * size, stride, count, xs, tokens, hidden, gates)
            for t in range(tokens):
                g, u = gates + 4 * width * t, ups + 4 * width * t
                if gated and gate_bias != 0:
                    add_strided(g, step, count, gate_bias + bias_at, bias_step, code)
                if up_bias != 0:
                    add_strided(u, step, count, up_bias + bias_at, bias_step, code)
                h = load_i64(middles + 8 * (begin + t)) + 4 * start
                activate(g, u, h, count, alpha, limit)
            begin += tokens

    @_inline
    def second(args, local, start, stop):  # type: ignore[no-untyped-def]
        intermediate = load_i64(args + word.INTERMEDIATE)
        hidden = load_i64(args + word.HIDDEN)
        chunk = load_i64(args + word.CHUNK)
        code = load_i64(args + word.BIAS_CODE)
        middles, out = load_i64(args + word.MIDDLES), load_i64(args + word.OUT)
        tokens_at = load_i64(args + word.TOKENS)
        weights_at = load_i64(args + word.WEIGHTS)
        count = stop - start
        for entry in range(load_i64(args + word.ACTIVE)):
            expert = load_i32(load_i64(args + word.EXPERTS) + 4 * entry)
            record = load_i64(args + word.TABLE) + 48 * expert
            down = load_i64(record + 16) + start * size
            down_bias = load_i64(record + 40)
            offsets = load_i64(args + word.OFFSETS) + 8 * entry
            begin, end = load_i64(offsets), load_i64(offsets + 8)
            while begin < end:
                tokens = min(chunk, end - begin)
                xs = middles + 8 * begin
                matrix(down, hidden * size, count, xs, tokens, intermediate, local)
                for t in range(tokens):
                    y = local + 4 * count * t
                    if down_bias != 0:
                        add_elements(y, count, down_bias + start * _bytes(code), 1, code)
                    token = load_i32(tokens_at + 4 * (begin + t))
                    weight = load_f32(weights_at + 4 * (begin + t))
                    add_scaled(out + 4 * (token * hidden + start), count, y, weight)
                begin += tokens

    return make_two_phases(first, second)
