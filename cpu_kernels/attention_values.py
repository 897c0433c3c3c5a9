"""Outputs of a block of positions: weights times V, for the queries that share a KV head.

V is row-major, so a vector of outputs walks down the rows and needs no sum over lanes. A pass
keeps the outputs of several queries for a stripe of some slices in registers over the whole
block, so each element of V is widened once for all of them.
"""

from functools import partial
from typing import Any

from moe_offload.cpu_kernels.attention_rows import Rows, add_pairs, store_floats
from moe_offload.cpu_kernels.emit import F32, I32, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.target import Target


def _stripes(rows: Rows, queries: int, target: Target) -> tuple[int, list[range]]:
    """(queries of a pass, slices of each stripe): outputs in half of the registers."""
    outputs = target.registers // 2
    together = min(queries, 8 if target.lanes == 16 else 4)
    wide = max(1, outputs // (2 * together))
    return together, [range(s, min(s + wide, rows.slices)) for s in range(0, rows.slices, wide)]


def make_values(rows: Rows, queries: int, wide: int, pairs: bool, ahead: Rows, target: Target) -> Any:
    """Intrinsic (weights, v, step, n, out, corrections, k, k_step).

    out[r] = corrections[r] * out[r] + sum over j < n of weights[j][r] * V[j], V's rows `step` bytes
    apart. weights f32 [n][wide], or bf16 `pairs` of positions [n / 2][wide]; out f32
    [queries][rows.float_bytes], in the order of V's slices.
    Meanwhile n rows at k (as `ahead` describes them, k_step apart) are asked for.
    """
    lanes = target.lanes
    together, stripes = _stripes(rows, queries, target)
    prefetch_bytes = -(-ahead.row_bytes // len(stripes))
    together_rows, sort = (2, I32) if pairs else (1, F32)

    def emit(
        em: Emitter,
        weights: Value,
        v: Value,
        step: Value,
        n: Value,
        out: Value,
        corrections: Value,
        k: Value,
        k_step: Value,
    ) -> None:
        floats = vector(F32, lanes)
        multiply = partial(add_pairs, em) if pairs else em.fma

        def place(r: int, number: int, half: int) -> int:
            return r * rows.float_bytes + (number * rows.slice_width + half * lanes) * 4

        def load(rows_at: list[Value], number: int) -> list[Value]:
            at = [em.add(row, number * rows.slice_bytes) for row in rows_at]
            if pairs:
                return rows.load_two(em, at[0], at[1] if len(at) > 1 else None, rows.count(number))
            return rows.load(em, at[0], rows.count(number))

        for number_of_stripe, stripe in enumerate(stripes):
            for first in range(0, queries, together):
                some = range(first, min(first + together, queries))
                kept = [(r, number, half) for r in some for number in stripe for half in (0, 1)]
                factors = {r: em.splat(em.load(F32, corrections, 4 * r), floats) for r in some}
                outputs = [em.b.fmul(em.load(floats, out, place(*at)), factors[at[0]]) for at in kept]

                def add_rows(
                    count: int,
                    stripe: range = stripe,
                    some: range = some,
                    asks: int | None = number_of_stripe if first == 0 else None,
                ) -> Any:
                    def add(j: Value, sums: list[Value]) -> list[Value]:
                        places = [em.add(j, t) for t in range(count)]
                        if asks is not None:
                            for place in places:
                                row = em.add(k, em.mul(place, k_step))
                                ahead.prefetch(em, row, asks * prefetch_bytes, (asks + 1) * prefetch_bytes)
                        rows_at = [em.add(v, em.mul(place, step)) for place in places]
                        weights_at = em.add(weights, em.mul(j, (2 if pairs else 4) * wide))
                        elements = [part for number in stripe for part in load(rows_at, number)]
                        after: list[Value] = []
                        for r in some:
                            weight = em.splat(em.load(sort, weights_at, 4 * r), vector(sort, lanes))
                            for element in elements:
                                after.append(multiply(weight, element, sums[len(after)]))
                        return after

                    return add

                whole = em.floor_to(n, together_rows)
                outputs = em.loop(0, whole, together_rows, outputs, add_rows(together_rows))
                if pairs:
                    outputs = em.loop(whole, n, 1, outputs, add_rows(1))
                for at, value in zip(kept, outputs, strict=True):
                    em.store(value, out, place(*at))

    name = f"attention_values_{rows.dtype}_{rows.width}_{queries}_{wide}_{pairs}_{ahead.row_bytes}"
    return micro_kernel(name, "iiiiiiii:v", emit)


def make_mix(rows: Rows, weight_bytes: int) -> Any:
    """Intrinsic (parts, step, chunks, weights, out): one query's output out of those of its chunks.

    out[i] = sum over c of weights[c] * part c[i]; parts f32 in the order of V's slices, `step` bytes
    apart; weights f32, weight_bytes apart; out f32 [rows.width] in natural order.
    """

    def emit(em: Emitter, parts: Value, step: Value, chunks: Value, weights: Value, out: Value) -> None:
        floats = vector(F32, rows.lanes)
        for number in range(rows.slices):
            at = number * rows.slice_width * 4

            def add_chunk(c: Value, sums: list[Value], at: int = at) -> list[Value]:
                weight = em.splat(em.load(F32, weights, em.mul(c, weight_bytes)), floats)
                part = em.add(parts, em.mul(c, step))
                return [
                    em.fma(weight, em.load(floats, part, at + half * 4 * rows.lanes), value)
                    for half, value in enumerate(sums)
                ]

            sums = em.loop(0, chunks, 1, [em.const(floats, 0.0)] * 2, add_chunk)
            store_floats(em, rows.to_natural(em, sums), em.add(out, at), rows.count(number))

    return micro_kernel(f"attention_mix_{rows.dtype}_{rows.width}_{weight_bytes}", "iiiii:v", emit)
