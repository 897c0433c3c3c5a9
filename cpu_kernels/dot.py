"""Dot products of weight rows with several tokens: the inner loop of row-major experts.

A tile takes 2 (or 4) weight rows and T tokens. Each (row, token) pair has ONE vector of partial
sums, which walks the row from its begin to its end, and one order in which its lanes are added.
So a number does not depend on the tile that computed it: not on the thread count, not on where
a block of rows ends, not on how many tokens share the expert.

The rows of a tile lie far apart (gate and up, or the halves of a block), so that each is a
sequential stream through memory: two streams reach what one cannot, and a prefetch ahead of a
row's end falls on the row that the same stream reads next.
"""

from typing import Any

from moe_offload.cpu_kernels.emit import F32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.weights import load_weights

PREFETCH_BYTES = 1024  # ahead of each stream
LINE = 64


def make_dot(dtype: WeightType, rows: int, tokens: int, lanes: int) -> Any:
    """Intrinsic (row_a, row_b, xs, count, dst_a, dst_b, stride_a, stride_b).

    xs: address of `tokens` int64 addresses of f32 vectors of `count` elements.
    Stores row_a . x[t] at dst_a + t * stride_a (bytes), and with two rows likewise for b.
    """
    size = ELEMENT_BYTES[dtype]
    unroll = max(2, LINE // (lanes * size))  # whole cache lines, so that each is prefetched once

    def emit(
        em: Emitter,
        row_a: Value,
        row_b: Value,
        xs: Value,
        count: Value,
        dst_a: Value,
        dst_b: Value,
        stride_a: Value,
        stride_b: Value,
    ) -> None:
        weights = [row_a, row_b][:rows]
        inputs = [em.load(I64, xs, 8 * t) for t in range(tokens)]
        zero = em.const(vector(F32, lanes), 0.0)

        def step(vectors: int, width: int, ahead: bool) -> Any:
            def body(k: Value, sums: list[Value]) -> list[Value]:
                at_w, at_x = em.mul(k, size), em.mul(k, 4)
                w_at = [em.add(w, at_w) for w in weights]
                x_at = [em.add(x, at_x) for x in inputs]
                for v in range(vectors):
                    offset = v * width * size
                    if ahead and offset % LINE == 0:
                        for w in w_at:
                            em.prefetch(w, offset + PREFETCH_BYTES)
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
        for t in range(tokens):
            em.store(totals[t], dst_a, em.mul(stride_a, t))
            if rows == 2:
                em.store(totals[tokens + t], dst_b, em.mul(stride_b, t))

    return micro_kernel(f"dot_{dtype}_{rows}x{tokens}", "iiiiiiii:v", emit)
