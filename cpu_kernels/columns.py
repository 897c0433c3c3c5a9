"""Weight columns times tokens: the inner loop of transposed experts.

In a transposed matrix an output is a column, so a block of columns is accumulated while its rows
go by: y[t][c] += x[t][k] * w[k][c]. Several rows are taken at once, so that a sum is loaded and
stored once for all their products. They lie far apart (row k of each eighth of the matrix):
neighbouring rows share a page, and the prefetcher, which follows one stream per page, loses them
(13 GB/s against 27 on one core, Zen 4). Each output's products are added in one order, whatever
the block's width or the tile of tokens.
"""

from typing import Any

from moe_offload.cpu_kernels.emit import F32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.weights import load_weights

LINE = 64


def make_columns(dtype: WeightType, rows: int, tokens: int, lanes: int) -> Any:
    """Intrinsic (w, stride, width, xs, k0, k1, gap, ahead, y, y_stride).

    For k0 <= k < k1 the rows k, k + gap, ... (`rows` of them) are added to the sums.
    w: address of the block's first column in row 0; stride: bytes from row to row.
    xs: address of `tokens` int64 addresses of f32 inputs.
    ahead: bytes to prefetch ahead in each row.
    y: f32 sums, `width` of them for each token, y_stride bytes apart.
    """
    size = ELEMENT_BYTES[dtype]
    unroll = max(1, LINE // (lanes * size))

    def emit(
        em: Emitter,
        w: Value,
        stride: Value,
        width: Value,
        xs: Value,
        k0: Value,
        k1: Value,
        gap: Value,
        ahead: Value,
        y: Value,
        y_stride: Value,
    ) -> None:
        inputs = [em.load(I64, xs, 8 * t) for t in range(tokens)]
        outputs = [em.add(y, em.mul(y_stride, t)) for t in range(tokens)]

        def add_rows(k: Value, _: list[Value]) -> list[Value]:
            ks = [em.add(k, em.mul(gap, r)) for r in range(rows)]
            base = [em.add(w, em.mul(row, stride)) for row in ks]
            x = [[em.load(F32, em.add(i, em.mul(row, 4))) for row in ks] for i in inputs]

            def run(count: int, vectors: int, start: Value, stop: Value) -> None:
                splats = [[em.splat(scalar, vector(F32, count)) for scalar in row] for row in x]

                def body(c: Value, _: list[Value]) -> list[Value]:
                    at_w, at_y = em.mul(c, size), em.mul(c, 4)
                    w_at = [em.add(row, at_w) for row in base]
                    y_at = [em.add(row, at_y) for row in outputs]
                    for v in range(vectors):
                        offset = v * count * size
                        if count > 1 and offset % LINE == 0:
                            for row in w_at:
                                em.prefetch(em.add(row, ahead), offset, locality=2)  # L1 holds sums
                        ws = [load_weights(em, dtype, count, row, offset) for row in w_at]
                        for t in range(tokens):
                            total = em.load(vector(F32, count), y_at[t], v * count * 4)
                            for r in range(rows):
                                total = em.fma(ws[r], splats[t][r], total)
                            em.store(total, y_at[t], v * count * 4)
                    return []

                em.loop(start, stop, vectors * count, [], body)

            blocks, whole = em.floor_to(width, unroll * lanes), em.floor_to(width, lanes)
            run(lanes, unroll, 0, blocks)
            run(lanes, 1, blocks, whole)
            run(1, 1, whole, width)
            return []

        em.loop(k0, k1, 1, [], add_rows)

    return micro_kernel(f"columns_{dtype}_{rows}x{tokens}", "iiiiiiiiii:v", emit)
