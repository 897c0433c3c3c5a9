"""Activations as integers: what a quantised product multiplies its weights with.

Per token and group of G inputs, x is rounded to 16 bits, x = scale * v with |v| <= 32512, and v is kept as two planes
of signed bytes, v = 256 * high + low. With both planes the products below are exact integers, whatever instruction
computes them: x is known to 15 bits (relative error 3e-5 of a group's largest, against 1e-2 for plain int8
activations), and with one token at hand the second plane costs no time, because the weights are still on their
way. With many tokens `high` alone is used: it is x rounded to int8, with scale 256 * scale.

Weights are stored unsigned, as q + zero point; the sum of products is corrected by -zero_point * sum(v), which is kept
beside the scale.

A row of P inputs (K filled up with zeros) in n = P / G groups, in memory:

    high  s8 [P]  |  low  s8 [P]  |  scale  f32 [n]  |  fix of both planes  i32 [n]  |  fix of high alone  i32 [n]

Where no byte dot product is used ("pairs"), v itself lies in the place of the planes, as i16 in the order
0, 2, 1, 3 of each four inputs; and in exact mode x itself, f32 [P].

A group with a NaN or an infinity gets the scale NaN, so that its outputs are NaN. One whose largest magnitude is below
1e-30 counts as zero.
"""

from typing import Any, Literal

from moe_offload.cpu_kernels.emit import F32, I8, I16, I32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.target import Target

Arithmetic = Literal["planes", "pairs", "exact"]

LINE = 64
LARGEST = 32512  # 127 * 256: its upper byte is within a signed byte after rounding
_SMALLEST = 1e-30


def arithmetic_for(dtype: str, exact: bool, target: Target) -> Arithmetic:
    """How products of these weights are computed on this CPU.

    Bytes times bytes where the instruction sums them into 32 bits, or where the weights are so small that sums of
    pairs fit 16 bits; otherwise 16 bits times 16 bits.
    """
    if exact:
        return "exact"
    small = dtype != "int8"
    return "planes" if target.byte_dot or (small and target.int_lanes >= 8) else "pairs"


def row_bytes(padded: int, group: int, arithmetic: Arithmetic) -> int:
    """Bytes of one row of `padded` inputs."""
    size = 4 * padded if arithmetic == "exact" else 2 * padded + 12 * (padded // group)
    return (size + LINE - 1) // LINE * LINE


def make_quantise(arithmetic: Arithmetic, group: int, zero_point: int, target: Target) -> Any:
    """Intrinsic (x, count, row, padded, start, filled): inputs start to start + count of a row, from f32 at x.

    `start` is a multiple of the group; up to start + filled, likewise one, the row is filled up with zeros.
    """
    lanes = target.int_lanes
    floats, ints = vector(F32, lanes), vector(I32, lanes)
    vectors = group // lanes

    def emit(em: Emitter, x: Value, count: Value, row: Value, padded: Value, start: Value, filled: Value) -> None:
        b = em.b
        whole = b.udiv(count, em.i64(group))

        def quantise(g: Value, values: list[Value]) -> None:
            bits = [b.and_(b.bitcast(v, ints), em.const(ints, 0x7FFFFFFF)) for v in values]
            top = bits[0]
            for other in bits[1:]:
                top = b.select(b.icmp_signed(">", other, top), other, top)  # as integers NaN is above infinity
            largest_bits = _max_lanes(em, top)
            largest = b.bitcast(largest_bits, F32)
            finite = b.icmp_signed("<", largest_bits, em.const(I32, 0x7F800000))
            sound = b.and_(finite, b.fcmp_ordered(">", largest, em.const(F32, _SMALLEST)))
            inverse = b.select(sound, b.fdiv(em.const(F32, float(LARGEST)), largest), em.const(F32, 0.0))
            scale = b.select(sound, b.fmul(largest, em.const(F32, 1 / LARGEST)), em.const(F32, 0.0))
            scale = b.select(finite, scale, em.const(F32, float("nan")))
            spread = em.splat(inverse, floats)
            usable = em.splat(b.zext(sound, I32), ints)
            is_usable = b.icmp_signed("!=", usable, em.const(ints, 0))
            position = em.add(start, em.mul(g, group))
            both: Value = None
            highs: Value = None
            for n, value in enumerate(values):
                clean = b.select(is_usable, value, em.const(floats, 0.0))
                v = b.fptosi(_round(em, b.fmul(clean, spread), floats), ints)
                high = b.ashr(b.add(v, em.const(ints, 128)), em.const(ints, 8))
                low = b.sub(v, b.shl(high, em.const(ints, 8)))
                both = v if both is None else b.add(both, v)
                highs = high if highs is None else b.add(highs, high)
                offset = em.add(position, n * lanes)
                if arithmetic == "planes":
                    em.store(b.trunc(high, vector(I8, lanes)), em.add(row, offset))
                    em.store(b.trunc(low, vector(I8, lanes)), em.add(em.add(row, padded), offset))
                else:
                    order = [4 * quad + k for quad in range(lanes // 4) for k in (0, 2, 1, 3)]
                    words = b.trunc(v, vector(I16, lanes))
                    em.store(em.shuffle(words, words, order), em.add(row, em.mul(offset, 2)))
            index = b.udiv(position, em.i64(group))
            groups = b.udiv(padded, em.i64(group))
            at = em.add(em.add(row, em.mul(padded, 2)), em.mul(index, 4))
            em.store(scale, at)
            minus = em.const(I32, -zero_point)
            em.store(b.mul(_sum_lanes(em, both), minus), em.add(at, em.mul(groups, 4)))
            em.store(b.mul(_sum_lanes(em, highs), minus), em.add(at, em.mul(groups, 8)))

        def keep(g: Value, values: list[Value]) -> None:
            position = em.add(start, em.mul(g, group))
            for n, value in enumerate(values):
                em.store(value, em.add(row, em.mul(em.add(position, n * lanes), 4)))

        write = keep if arithmetic == "exact" else quantise

        def full(g: Value, _: list[Value]) -> list[Value]:
            at = em.add(x, em.mul(g, 4 * group))
            write(g, [em.load(floats, at, 4 * lanes * n) for n in range(vectors)])
            return []

        em.loop(0, whole, 1, [], full)

        def short(g: Value, _: list[Value]) -> list[Value]:
            """A cut or empty group, gathered one by one: nothing behind x may be touched."""
            rest = b.sub(count, em.mul(g, group))
            at = em.add(x, em.mul(g, 4 * group))
            with b.goto_entry_block():  # in the loop it would take new stack at every call that is inlined
                buffer = b.alloca(floats, size=vectors)
            place = b.ptrtoint(buffer, I64)
            for n in range(vectors):
                em.store(em.const(floats, 0.0), place, 4 * lanes * n)

            def copy(k: Value, _: list[Value]) -> list[Value]:
                em.store(em.load(F32, em.add(at, em.mul(k, 4))), em.add(place, em.mul(k, 4)))
                return []

            em.loop(0, rest, 1, [], copy)
            write(g, [em.load(floats, place, 4 * lanes * n) for n in range(vectors)])
            return []

        em.loop(whole, b.udiv(filled, em.i64(group)), 1, [], short)

    return micro_kernel(f"quantise_{arithmetic}_{group}_{zero_point}", "iiiiii:v", emit)


def _round(em: Emitter, x: Value, kind: Any) -> Value:
    """Nearest integer of |x| < 2^22, ties to even, by two additions."""
    magic = em.const(kind, 12582912.0)
    return em.b.fsub(em.b.fadd(x, magic), magic)


def _halve(em: Emitter, value: Value, combine: Any) -> Value:
    count = value.type.count
    while count > 1:
        count //= 2
        value = combine(em.shuffle(value, value, range(count)), em.shuffle(value, value, range(count, 2 * count)))
    return em.b.extract_element(value, em.const(I32, 0))


def _max_lanes(em: Emitter, value: Value) -> Value:
    return _halve(em, value, lambda a, c: em.b.select(em.b.icmp_signed(">", a, c), a, c))


def _sum_lanes(em: Emitter, value: Value) -> Value:
    return _halve(em, value, em.b.add)
