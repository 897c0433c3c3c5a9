"""The online softmax of a block of positions, for all queries of a KV head at once.

Scores lie as [position][query], so a vector holds several positions of all queries (or some
queries of one position), and nothing is done query by query. State of a group of queries, each
of `state_lanes` f32: the greatest score so far, one copy for each position of a vector, and the
sum of weights, still to be added up over those positions.

Everything is in base 2 (log2(e) is part of the factor that scores come with). The greatest score
begins at LEAST instead of -inf: -inf scores then have the weight 0 without inf - inf, and a
sequence without any position gives zeros. NaN scores do not count for the maximum, but their
weight is NaN, which reaches the sum and every output of the query.
"""

from typing import Any

from numpy.polynomial import Chebyshev, Polynomial

from moe_offload.cpu_kernels.attention_rows import pair
from moe_offload.cpu_kernels.emit import F32, I32, Emitter, Value, micro_kernel, vector

LOG2E = 1.4426950408889634
LEAST = -3e38
# 2^r on |r| <= 1/2: Chebyshev's interpolation of degree 6, relative error 2e-9
_EXP2 = Chebyshev.interpolate(lambda r: 2.0**r, 6, (-0.5, 0.5)).convert(kind=Polynomial).coef.tolist()[::-1]


def exp2(em: Emitter, x: Value) -> Value:
    """2^x for x <= 0 or NaN; 0 from about 2^-127 on."""
    b, kind = em.b, x.type
    ints = vector(I32, kind.count)
    low, magic = em.const(kind, -127.0), em.const(kind, 12582912.0)  # 1.5 * 2^23: no bits for a fraction
    x = b.select(b.fcmp_ordered("<", x, low), low, x)  # NaN stays NaN
    shifted = b.fadd(x, magic)
    rest = b.fsub(x, b.fsub(shifted, magic))
    value = em.const(kind, _EXP2[0])
    for coefficient in _EXP2[1:]:
        value = em.fma(value, rest, em.const(kind, coefficient))
    # the integer stands in the low bits of `shifted`; the exponent field of 2^-127 is that of 0
    power = b.add(b.shl(b.bitcast(shifted, ints), em.const(ints, 23)), em.const(ints, 127 << 23))
    return b.fmul(value, b.bitcast(power, kind))


def round_to_bf16(em: Emitter, x: Value) -> Value:
    """The nearest f32 of 8 significant bits (|x| < 2^111), by Veltkamp's splitting: NaN stays NaN."""
    large = em.b.fmul(x, em.const(x.type, 65537.0))
    return em.b.fsub(large, em.b.fsub(large, x))


def state_lanes(wide: int, lanes: int) -> int:
    """f32 lanes of a greatest score (or sum of weights) of `wide` queries."""
    return max(wide, lanes)


def _fold(em: Emitter, values: list[Value], wide: int, add: bool) -> list[Value]:
    """Combine the positions of a vector: lane i becomes the total of the lanes equal to i mod `wide`."""
    if len(values) > 1:
        return values
    value, lanes = values[0], values[0].type.count
    distance = lanes // 2
    while distance >= wide:
        turned = em.shuffle(value, value, [i ^ distance for i in range(lanes)])
        value = em.b.fadd(value, turned) if add else _greater(em, turned, value)
        distance //= 2
    return [value]


def _greater(em: Emitter, candidate: Value, value: Value) -> Value:
    """The greater of two; `value` where the candidate is NaN."""
    return em.b.select(em.b.fcmp_ordered(">", candidate, value), candidate, value)


def make_softmax(wide: int, lanes: int, scaled: bool, pairs: bool) -> Any:
    """Intrinsic (scores, n, state, corrections, scales): scores to weights, in place.

    scores f32 [n][wide], up to whole vectors; corrections f32 [state_lanes]: what sums and outputs
    so far have been multiplied with (sums here, outputs by the caller). `scaled`: weights are
    multiplied with scales f32 [n] after they are summed. `pairs`: weights are rounded to bf16 (before
    they are summed, unless scaled), and stored as [n / 2][wide] pairs of neighbouring positions.
    """
    assert not pairs or lanes > wide
    parts = state_lanes(wide, lanes) // lanes
    per_vector = max(1, lanes // wide)
    floats = vector(F32, lanes)

    def emit(em: Emitter, scores: Value, n: Value, state: Value, corrections: Value, scales: Value) -> None:
        def places(j: Value) -> list[Value]:
            at = em.add(scores, em.mul(j, 4 * wide))
            return [em.add(at, 4 * lanes * part) for part in range(parts)]

        def load(address: Value) -> list[Value]:
            return [em.load(floats, address, 4 * lanes * part) for part in range(parts)]

        def greatest(j: Value, so_far: list[Value]) -> list[Value]:
            return [_greater(em, em.load(floats, at), m) for at, m in zip(places(j), so_far, strict=True)]

        before = load(state)
        sums_at = em.add(state, 4 * lanes * parts)
        now = _fold(em, em.loop(0, n, per_vector, before, greatest), wide, add=False)
        factors = [exp2(em, em.b.fsub(old, new)) for old, new in zip(before, now, strict=True)]
        sums = [em.b.fmul(s, f) for s, f in zip(load(sums_at), factors, strict=True)]

        def weigh(j: Value, so_far: list[Value]) -> list[Value]:
            after = []
            for part, at in enumerate(places(j)):
                weight = exp2(em, em.b.fsub(em.load(floats, at), now[part]))
                if pairs and not scaled:
                    weight = round_to_bf16(em, weight)
                after.append(em.b.fadd(so_far[part], weight))
                if scaled:
                    weight = em.b.fmul(weight, spread(j))
                    weight = round_to_bf16(em, weight) if pairs else weight
                if pairs:
                    em.store(in_pairs(weight), em.add(scores, em.mul(j, 2 * wide)))  # behind what is still to be read
                else:
                    em.store(weight, at)
            return after

        def in_pairs(weight: Value) -> Value:
            even, odd = (
                em.shuffle(weight, weight, [i for i in range(lanes) if i // wide % 2 == half]) for half in (0, 1)
            )
            return pair(em, even, odd)

        def spread(j: Value) -> Value:
            few = em.load(vector(F32, per_vector), scales, em.mul(j, 4))
            if per_vector == 1:
                return em.splat(few, floats)
            return em.shuffle(few, few, [i // wide for i in range(lanes)])

        sums = em.loop(0, n, per_vector, sums, weigh)
        for part in range(parts):
            em.store(now[part], state, 4 * lanes * part)
            em.store(sums[part], sums_at, 4 * lanes * part)
            em.store(factors[part], corrections, 4 * lanes * part)

    return micro_kernel(f"attention_softmax_{wide}_{lanes}_{scaled}_{pairs}", "iiiii:v", emit)


def make_weigh(wide: int, lanes: int) -> Any:
    """Intrinsic (state, step, chunks, sinks, weights): what each chunk counts for in the whole.

    Chunk c's state lies at state + c * step. sinks f32 [state_lanes]: a logit (base 2) for each
    lane that enters the sum and nothing else. weights f32 [chunks][state_lanes]: the factor of each
    chunk's outputs, divided by the sum of all. Chunks are added in ascending order.
    """
    parts = state_lanes(wide, lanes) // lanes
    floats = vector(F32, lanes)

    def emit(em: Emitter, state: Value, step: Value, chunks: Value, sinks: Value, weights: Value) -> None:
        for part in range(parts):
            at = em.add(state, 4 * lanes * part)
            to = em.add(weights, 4 * lanes * part)
            sink = em.load(floats, sinks, 4 * lanes * part)

            def greatest(c: Value, so_far: list[Value], at: Value = at) -> list[Value]:
                return [_greater(em, em.load(floats, em.add(at, em.mul(c, step))), so_far[0])]

            (peak,) = em.loop(0, chunks, 1, [sink], greatest)

            def weigh(c: Value, so_far: list[Value], at: Value = at, to: Value = to, peak: Value = peak) -> list[Value]:
                chunk = em.add(at, em.mul(c, step))
                factor = exp2(em, em.b.fsub(em.load(floats, chunk), peak))
                em.store(factor, em.add(to, em.mul(c, 4 * lanes * parts)))
                return [em.fma(factor, em.load(floats, chunk, 4 * lanes * parts), so_far[0])]

            sums = em.loop(0, chunks, 1, [em.const(floats, 0.0)], weigh)
            (total,) = _fold(em, sums, wide, add=True) if parts == 1 else sums
            total = em.b.fadd(total, exp2(em, em.b.fsub(sink, peak)))

            def divide(c: Value, _: list[Value], to: Value = to, total: Value = total) -> list[Value]:
                place = em.add(to, em.mul(c, 4 * lanes * parts))
                em.store(em.b.fdiv(em.load(floats, place), total), place)
                return []

            em.loop(0, chunks, 1, [], divide)

    return micro_kernel(f"attention_weigh_{wide}_{lanes}", "iiiii:v", emit)
