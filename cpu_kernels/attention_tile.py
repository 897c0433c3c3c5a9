"""Scores of a block of positions: K times the queries that share a KV head.

K is row-major, so a score is a sum over lanes. A tile of several positions and queries keeps one
vector of partial sums for each (position, query), so that every element of K is widened once for
all queries; then as many vectors as there are lanes are added up together, in a butterfly of
shuffles: 15 additions for 16 scores instead of 64. All sums take the same order, wherever in a
tile they stand, so a score does not depend on its neighbours.

Scores lie as [position][query], queries filled up to a power of two.
"""

from collections.abc import Sequence
from typing import Any

from moe_offload.cpu_kernels.attention_rows import Rows, add_pairs, load_floats, pair
from moe_offload.cpu_kernels.emit import F32, I64, Emitter, Value, ir, micro_kernel, vector
from moe_offload.cpu_kernels.target import Target

MINUS_INFINITY = float("-inf")


def tile_shape(wide: int, target: Target) -> tuple[int, int]:
    """(queries, positions) whose sums a tile keeps: half of the registers."""
    sums = target.registers // 2
    across = min(wide, 8 if target.lanes == 16 else 4)
    return across, sums // across


def sum_each(em: Emitter, values: Sequence[Value]) -> Value:
    """The sums over lanes of as many vectors as they have lanes: result[i] = sum(values[i])."""
    values, lanes = list(values), len(values)
    distance = lanes // 2
    while distance:
        merged = []
        for a, b in zip(values[:distance], values[distance:], strict=True):
            high = [bool(i & distance) for i in range(lanes)]
            kept = em.shuffle(a, b, [i + lanes * up for i, up in enumerate(high)])
            crossed = em.shuffle(a, b, [i - distance + lanes if up else i + distance for i, up in enumerate(high)])
            merged.append(em.b.fadd(kept, crossed))
        values, distance = merged, distance // 2
    return values[0]


def make_prepare(rows: Rows, pairs: bool) -> Any:
    """Intrinsic (query, to): a query f32 [D] in the order of K's slices; `pairs`: as bf16."""

    def emit(em: Emitter, query: Value, to: Value) -> None:
        for number in range(rows.slices):
            at = number * rows.slice_width
            halves = load_floats(em, "f32", em.add(query, 4 * at), rows.count(number), rows.lanes)
            halves = rows.from_natural(em, halves)
            if pairs:
                em.store(pair(em, *halves), to, 2 * at)
                continue
            for half, value in enumerate(halves):
                em.store(value, to, 4 * (at + half * rows.lanes))

    return micro_kernel(f"attention_prepare_{rows.dtype}_{rows.width}_{pairs}", "ii:v", emit)


def make_scores(rows: Rows, wide: int, pairs: bool, ahead: Rows, target: Target) -> Any:
    """Intrinsic (prepared, k, step, n, factor, scales, scores, v, v_step).

    scores[j][r] = factor * (scales[j] if int8) * K[j] . query[r] for r < wide (a power of two) and n
    rows of K, `step` bytes apart; up to the next multiple of a tile -inf follows. Meanwhile n rows
    at v (as `ahead` describes them, v_step apart) are asked for. scales f32, up to whole tiles.
    """
    lanes = target.lanes
    across, positions = tile_shape(wide, target)
    query_bytes = rows.float_bytes // (2 if pairs else 1)
    slice_query_bytes = rows.slice_width * (2 if pairs else 4)
    per_vector = lanes // across  # positions of one vector of finished scores
    prefetch_bytes = -(-ahead.row_bytes // rows.slices)

    def emit(
        em: Emitter,
        prepared: Value,
        k: Value,
        step: Value,
        n: Value,
        factor: Value,
        scales: Value,
        scores: Value,
        v: Value,
        v_step: Value,
    ) -> None:
        floats = vector(F32, lanes)
        splat_factor = em.splat(factor, floats)

        def accumulate(sums: list[Value], at: list[Value], first: int, number: int) -> list[Value]:
            """Add slice `number` of the rows at `at` times queries first to first + across."""
            count = rows.count(number)
            offset, query_at = number * rows.slice_bytes, number * slice_query_bytes
            if pairs:
                ks = [[rows.load_pairs(em, em.add(a, offset), count)] for a in at]
            else:
                ks = [rows.load(em, em.add(a, offset), count) for a in at]
            for r in range(across):
                from_query = (first + r) * query_bytes + query_at
                for half in range(len(ks[0])):
                    if count <= half * lanes and rows.dtype != "bf16" and not pairs:
                        continue  # nothing but zeros
                    q = em.load(ks[0][half].type, prepared, from_query + half * lanes * 4)
                    for t in range(positions):
                        i = t * across + r
                        sums[i] = multiply(ks[t][half], q, sums[i])
            return sums

        def multiply(a: Value, b: Value, c: Value) -> Value:
            if pairs:
                return add_pairs(em, a, b, c)
            return em.fma(a, b, c)

        def tile(j: Value, last: bool) -> None:
            places = [em.add(j, t) for t in range(positions)]
            if last:
                end = em.b.sub(n, em.i64(1))
                places = [em.b.select(em.b.icmp_signed("<", p, end), p, end) for p in places]
            at = [em.add(k, em.mul(p, step)) for p in places]
            at_ahead = [em.add(v, em.mul(p, v_step)) for p in places]
            for first in range(0, wide, across):
                sums = [em.const(floats, 0.0)] * (across * positions)
                for number in range(rows.slices):
                    if first == 0:
                        for a in at_ahead:
                            ahead.prefetch(em, a, number * prefetch_bytes, (number + 1) * prefetch_bytes)
                    sums = accumulate(sums, at, first, number)
                for group in range(positions // per_vector):
                    value = sum_each(em, sums[group * lanes : (group + 1) * lanes])
                    finish(value, em.add(j, group * per_vector), first, last)

        def finish(value: Value, j: Value, first: int, last: bool) -> None:
            """Scale the scores of positions from j on, [per_vector][across], and store them."""
            value = em.b.fmul(value, splat_factor)
            if rows.dtype == "int8":
                value = em.b.fmul(value, repeat(em, em.load(vector(F32, per_vector), scales, em.mul(j, 4)), across))
            if last:
                numbers = ir.Constant(vector(I64, lanes), [ir.Constant(I64, i // across) for i in range(lanes)])
                inside = em.b.icmp_signed("<", numbers, em.splat(em.b.sub(n, j), numbers.type))
                value = em.b.select(inside, value, em.const(floats, MINUS_INFINITY))
            to = em.add(em.add(scores, 4 * first), em.mul(j, 4 * wide))
            if across == wide:
                em.store(value, to)
                return
            for t in range(per_vector):
                part = em.shuffle(value, value, range(t * across, (t + 1) * across)) if per_vector > 1 else value
                em.store(part, to, 4 * wide * t)

        def body(last: bool) -> Any:
            def step_of(j: Value, _: list[Value]) -> list[Value]:
                tile(j, last)
                return []

            return step_of

        whole = em.floor_to(n, positions)
        em.loop(0, whole, positions, [], body(last=False))
        em.loop(whole, n, positions, [], body(last=True))

    name = f"attention_scores_{rows.dtype}_{rows.width}_{wide}_{pairs}_{ahead.row_bytes}"
    return micro_kernel(name, "iiiifiiii:v", emit)


def repeat(em: Emitter, values: Value, times: int) -> Value:
    """Each lane `times` times in a row."""
    if not isinstance(values.type, ir.VectorType):
        return em.splat(values, vector(F32, times))
    return em.shuffle(values, values, [i // times for i in range(values.type.count * times)])
