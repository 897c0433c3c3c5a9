"""Experts in transposed layout: an output is a column, and the rows go by."""

from collections.abc import Callable

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.columns import make_columns
from moe_offload.cpu_kernels.jit import specialised
from moe_offload.cpu_kernels.layer_job import add_gate_up_bias, make_layer_job
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, ActivationKind, WeightType
from moe_offload.cpu_kernels.memory import clear, load_f32, load_i64
from moe_offload.cpu_kernels.target import Target

STREAMS = 8  # rows added at once; 4 reach 10 to 15 % less, 16 lose half with several tokens
SLAB = 8  # rows of each stream that all tokens use before the next rows are read
AHEAD = 2048  # bytes prefetched ahead of each stream


def make_column_job(
    key: str, dtype: WeightType, gated: bool, kind: ActivationKind, step: int, target: Target
) -> Callable[[int, int], None]:
    """The job function `(thread, args)`; `key` names this specialisation.

    `step` 2 means gate and up columns interleaved.
    """
    size, lanes = ELEMENT_BYTES[dtype], target.lanes
    columns4, columns2, columns1 = (make_columns(dtype, STREAMS, tokens, lanes) for tokens in (4, 2, 1))
    single_row = make_columns(dtype, 1, 1, lanes)
    activate = make_activate(kind, gated, step, lanes)

    @specialised(key)
    def matrix(weights: int, stride: int, width: int, xs: int, tokens: int, depth: int, to: int, step: int) -> None:
        """to[t][c] = sum over k of x[t][k] * weights[k][c]."""
        for t in range(tokens):
            clear(to + t * step, width)
        gap = depth // STREAMS
        # a wide row is its own run of memory; of narrow ones, enough rows to hide the latency
        ahead = AHEAD
        if width * size < 2 * AHEAD:
            ahead = stride * (1 + AHEAD // (width * size))
        for k0 in range(0, gap, SLAB):
            k1 = min(gap, k0 + SLAB)
            t = 0
            while tokens - t >= 4:
                at, y = xs + 8 * t, to + t * step
                columns4(weights, stride, width, at, k0, k1, gap, ahead, y, step)
                t += 4
            if tokens - t >= 2:
                at, y = xs + 8 * t, to + t * step
                columns2(weights, stride, width, at, k0, k1, gap, ahead, y, step)
                t += 2
            if tokens - t >= 1:
                at, y = xs + 8 * t, to + t * step
                columns1(weights, stride, width, at, k0, k1, gap, ahead, y, step)
        for t in range(tokens):
            at, y = xs + 8 * t, to + t * step
            single_row(weights, stride, width, at, STREAMS * gap, depth, 0, 0, y, step)

    @specialised(key)
    def middle(args: int, record: int, start: int, count: int, begin: int, tokens: int, local: int) -> None:
        hidden, stride = load_i64(args + word.HIDDEN), load_i64(args + word.ROW_STRIDE)
        alpha, limit = load_f32(args + word.ALPHA), load_f32(args + word.LIMIT)
        xs = load_i64(args + word.INPUTS) + 8 * begin
        middles = load_i64(args + word.MIDDLES) + 8 * begin
        gate, up = load_i64(record), load_i64(record + 8)
        to_step = 4 * count * step
        if step == 2:
            # one run of columns holds both, whichever of the two comes first
            low = min(gate, up)
            matrix(low + start * 2 * size, stride, 2 * count, xs, tokens, hidden, local, to_step)
            gates = local + 4 if up < gate else local
            ups = local if up < gate else local + 4
        else:
            gates, ups = local, local + to_step * tokens if gated else local
            matrix(up + start * size, stride, count, xs, tokens, hidden, ups, to_step)
            if gated:
                matrix(gate + start * size, stride, count, xs, tokens, hidden, gates, to_step)
        for t in range(tokens):
            g, u = gates + t * to_step, ups + t * to_step
            add_gate_up_bias(args, record, start, count, g if gated else 0, u, step)
            activate(g, u, load_i64(middles + 8 * t) + 4 * start, count, alpha, limit)

    return make_layer_job(key, middle, matrix, size, transposed=True)
