"""Dot products of weight rows with several tokens: the inner loop of row-major experts.

A tile takes 4 weight rows and T tokens. Each (row, token) pair has ONE vector of partial sums,
which walks the row from its begin to its end, and one order in which its lanes are added. So a
number does not depend on the tile that computed it: not on the thread count, not on where a
block of rows ends, not on how many tokens share the expert.

The rows of a tile lie far apart (the halves of a block of gate rows and of up rows, or the
quarters of a block of down rows), so that each is a sequential stream through memory, and a
prefetch ahead of a row's end falls on the row that the same stream reads next. Four rows rather
than two, because the f32 inputs of four tokens do not fit L1 beside the weights: each vector of
them that comes from L2 has to feed four products.
"""

from typing import Any

from moe_offload.cpu_kernels.emit import F32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.weights import load_weights

LINE = 64


def _bytes_ahead(tokens: int) -> int:
    """How far to prefetch each stream, into L2: L1 is full of inputs (T = 4: 69 % of the read
    limit with the L1 hint, 85 % with this; T = 1: 87 and 93 %; Zen 4)."""
    return 1024 if tokens == 1 else 2048


def make_dot(dtype: WeightType, rows: int, tokens: int, lanes: int) -> Any:
    """Intrinsic (a, b, gap, xs, count, dst_a, dst_b, dst_gap, stride_a, stride_b).

    Four rows: at a, a + gap, b, b + gap; one row: at a.
    xs: address of `tokens` int64 addresses of f32 vectors of `count` elements.
    The row at a times x[t] is stored at dst_a + t * stride_a, its neighbour's dst_gap further on;
    likewise b. All in bytes.
    """
    assert rows in (1, 4)
    size = ELEMENT_BYTES[dtype]
    unroll = max(2, LINE // (lanes * size))  # whole cache lines, so that each is prefetched once

    def emit(
        em: Emitter,
        a: Value,
        b: Value,
        gap: Value,
        xs: Value,
        count: Value,
        dst_a: Value,
        dst_b: Value,
        dst_gap: Value,
        stride_a: Value,
        stride_b: Value,
    ) -> None:
        asks = tokens > 1 or not em.target.follows_streams
        weights = [a, em.add(a, gap), b, em.add(b, gap)][:rows]
        inputs = [em.load(I64, xs, 8 * t) for t in range(tokens)]
        zero = em.const(vector(F32, lanes), 0.0)

        def step(vectors: int, width: int, ahead: bool) -> Any:
            def body(k: Value, sums: list[Value]) -> list[Value]:
                at_w, at_x = em.mul(k, size), em.mul(k, 4)
                w_at = [em.add(w, at_w) for w in weights]
                x_at = [em.add(x, at_x) for x in inputs]
                for v in range(vectors):
                    offset = v * width * size
                    if ahead and asks and offset % LINE == 0:
                        for w in w_at:
                            em.prefetch(w, offset + _bytes_ahead(tokens), locality=2)
                    ws = [load_weights(em, dtype, width, w, offset) for w in w_at]
                    for t in range(tokens):
                        x = em.load(vector(F32, width), x_at[t], v * width * 4)
                        for r in range(rows):
                            i = r * tokens + t
                            sums[i] = em.fma(ws[r], x, sums[i])
                return sums

            return body

        block = unroll * lanes
        blocks, whole = em.floor_to(count, block), em.floor_to(count, lanes)
        sums = em.loop(0, blocks, block, [zero] * (rows * tokens), step(unroll, lanes, True))
        sums = em.loop(blocks, whole, lanes, sums, step(1, lanes, False))
        totals = [em.sum_lanes(value) for value in sums]
        totals = em.loop(whole, count, 1, totals, step(1, 1, False))
        for r in range(rows):
            target, stride = (dst_a, stride_a) if r < 2 else (dst_b, stride_b)
            target = em.add(target, dst_gap) if r % 2 else target
            for t in range(tokens):
                em.store(totals[r * tokens + t], target, em.mul(stride, t))

    return micro_kernel(f"dot_{dtype}_{rows}x{tokens}", "iiiiiiiiii:v", emit)
