"""Weight columns times tokens: the inner loop of transposed experts.

In a transposed matrix an output is a column, so a block of columns is accumulated while its rows
go by: y[t][c] += x[t][k] * w[k][c]. Four rows are taken at once, so that a sum is loaded and
stored once per four products, and four streams are open. Each output's products are added in
order of k: no number depends on the width of a block or on the tile of tokens.
"""

from typing import Any

from moe_offload.cpu_kernels.emit import F32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.weights import load_weights

ROWS = 4
LINE = 64


def make_columns(dtype: WeightType, tokens: int, lanes: int) -> Any:
    """Intrinsic (w, stride, width, xs, k0, k1, y, y_stride).

    w: address of the block's first column in row 0; stride: bytes from row to row.
    xs: address of `tokens` int64 addresses of f32 inputs; rows k0 to k1 are added.
    y: f32 sums, `width` of them for each token, y_stride bytes apart.
    """
    size = ELEMENT_BYTES[dtype]

    def emit(
        em: Emitter,
        w: Value,
        stride: Value,
        width: Value,
        xs: Value,
        k0: Value,
        k1: Value,
        y: Value,
        y_stride: Value,
    ) -> None:
        inputs = [em.load(I64, xs, 8 * t) for t in range(tokens)]
        outputs = [em.add(y, em.mul(y_stride, t)) for t in range(tokens)]

        def rows_at(k: Value, rows: int) -> None:
            base = [em.add(w, em.mul(em.add(k, r), stride)) for r in range(rows)]
            x = [
                [em.load(F32, em.add(inputs[t], em.mul(k, 4)), 4 * r) for r in range(rows)]
                for t in range(tokens)
            ]

            def run(count: int, vectors: int, start: Value, stop: Value, ahead: bool) -> None:
                splats = [[em.splat(s, vector(F32, count)) for s in row] for row in x]

                def body(c: Value, _: list[Value]) -> list[Value]:
                    at_w, at_y = em.mul(c, size), em.mul(c, 4)
                    w_at = [em.add(b, at_w) for b in base]
                    y_at = [em.add(o, at_y) for o in outputs]
                    for v in range(vectors):
                        offset = v * count * size
                        if ahead and offset % LINE == 0:
                            for b in w_at:
                                em.prefetch(em.add(b, em.mul(stride, rows)), offset)
                        ws = [load_weights(em, dtype, count, b, offset) for b in w_at]
                        for t in range(tokens):
                            total = em.load(vector(F32, count), y_at[t], v * count * 4)
                            for r in range(rows):
                                total = em.fma(ws[r], splats[t][r], total)
                            em.store(total, y_at[t], v * count * 4)
                    return []

                em.loop(start, stop, vectors * count, [], body)

            unroll = max(1, LINE // (lanes * size))
            blocks, whole = em.floor_to(width, unroll * lanes), em.floor_to(width, lanes)
            run(lanes, unroll, 0, blocks, True)
            run(lanes, 1, blocks, whole, False)
            run(1, 1, whole, width, False)

        def several(k: Value, _: list[Value]) -> list[Value]:
            rows_at(k, ROWS)
            return []

        def single(k: Value, _: list[Value]) -> list[Value]:
            rows_at(k, 1)
            return []

        grouped = em.add(k0, em.floor_to(em.b.sub(k1, k0), ROWS))
        em.loop(k0, grouped, ROWS, [], several)
        em.loop(grouped, k1, 1, [], single)

    return micro_kernel(f"columns_{dtype}_{tokens}", "iiiiiiii:v", emit)
