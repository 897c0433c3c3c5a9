"""Loops over f32 vectors at addresses: sums, norms, rounding to the model's own type, rotary embedding.

Numba compiles a loop over addresses one element at a time, because it cannot tell that they do not overlap; these are
written as vector code. Every reduction has one fixed order, so that bits do not depend on the thread.
"""

from collections.abc import Callable
from typing import Any

from moe_offload.cpu_kernels.emit import F16, F32, I16, I32, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.memory import TYPE_CODES
from moe_offload.cpu_kernels.weights import load_weights

_BF16, _F16 = TYPE_CODES["bf16"], TYPE_CODES["f16"]


def _over(em: Emitter, count: Value, body: Callable[[Any, int, Value], None]) -> None:
    """body(vector type, lanes, element index) for whole vectors, then for the rest one by one."""
    lanes = em.target.lanes

    def run(width: int, start: Value, stop: Value) -> None:
        def step(i: Value, _: list[Value]) -> list[Value]:
            body(vector(F32, width), width, i)
            return []

        em.loop(start, stop, width, [], step)

    whole = em.floor_to(count, lanes)
    run(lanes, 0, whole)
    run(1, whole, count)


def _at(em: Emitter, address: Value, index: Value, size: int = 4) -> Value:
    return em.add(address, em.mul(index, size))


def _add_scaled(em: Emitter, target: Value, count: Value, source: Value, scale: Value) -> None:
    def body(kind: Any, _: int, i: Value) -> None:
        y, x = em.load(kind, _at(em, target, i)), em.load(kind, _at(em, source, i))
        em.store(em.b.fadd(y, em.b.fmul(em.splat(scale, kind), x)), _at(em, target, i))

    _over(em, count, body)


def _add(em: Emitter, target: Value, count: Value, source: Value) -> None:
    def body(kind: Any, _: int, i: Value) -> None:
        y, x = em.load(kind, _at(em, target, i)), em.load(kind, _at(em, source, i))
        em.store(em.b.fadd(y, x), _at(em, target, i))

    _over(em, count, body)


def _copy(em: Emitter, target: Value, count: Value, source: Value) -> None:
    _over(em, count, lambda kind, _, i: em.store(em.load(kind, _at(em, source, i)), _at(em, target, i)))


def _sum(em: Emitter, x: Value, count: Value, term: Callable[[Value], Value]) -> Value:
    """Lane by lane, then the lanes by halving, then what is left."""
    lanes = em.target.lanes
    kind, whole = vector(F32, lanes), em.floor_to(count, lanes)

    def step(i: Value, sums: list[Value]) -> list[Value]:
        return [em.b.fadd(sums[0], term(em.load(sums[0].type, _at(em, x, i))))]

    sums = em.loop(0, whole, lanes, [em.const(kind, 0.0)], step)
    return em.loop(whole, count, 1, [em.sum_lanes(sums[0])], step)[0]


def _sum_squares(em: Emitter, x: Value, count: Value) -> Value:
    return _sum(em, x, count, lambda value: em.b.fmul(value, value))


def _sum_square_distances(em: Emitter, x: Value, count: Value, centre: Value) -> Value:
    def term(value: Value) -> Value:
        distance = em.b.fsub(value, em.splat(centre, value.type))
        return em.b.fmul(distance, distance)

    return _sum(em, x, count, term)


def round_to_type(em: Emitter, value: Value, width: int, code: Value) -> Value:
    """f32 values rounded to the stored type with this code (to nearest, ties to even), still as f32."""
    b, ints = em.b, vector(I32, width)
    bits = b.bitcast(value, ints)
    odd = b.and_(b.lshr(bits, em.const(ints, 16)), em.const(ints, 1))
    up = b.add(b.add(bits, em.const(ints, 0x7FFF)), odd)
    short = b.bitcast(b.and_(up, em.const(ints, -65536)), value.type)
    short = b.select(b.fcmp_unordered("uno", value, value), value, short)
    is_bf16 = b.icmp_signed("==", code, em.i64(_BF16))
    rounded = b.select(is_bf16, short, value)
    if em.target.half:
        half = b.fpext(b.fptrunc(value, vector(F16, width)), value.type)
        rounded = b.select(b.icmp_signed("==", code, em.i64(_F16)), half, rounded)
    return rounded


def _round_all(em: Emitter, target: Value, count: Value, code: Value) -> None:
    def body(kind: Any, width: int, i: Value) -> None:
        em.store(round_to_type(em, em.load(kind, _at(em, target, i)), width, code), _at(em, target, i))

    _over(em, count, body)


def _scale_by_weights(
    em: Emitter, target: Value, count: Value, x: Value, shift: Value, factor: Value, weight: Value, bias: Value,
    code: Value,
) -> None:  # fmt: skip
    def body(kind: Any, width: int, i: Value) -> None:
        centred = em.b.fsub(em.load(kind, _at(em, x, i)), em.splat(shift, kind))
        normal = em.b.fmul(centred, em.splat(factor, kind))
        is_layer_norm = em.b.icmp_signed("!=", bias, em.i64(0))
        # transformers' RMSNorm rounds before it multiplies by the weight, torch's LayerNorm once at the end
        rounded = em.b.select(is_layer_norm, normal, round_to_type(em, normal, width, code))
        scaled = em.b.fmul(rounded, em.load(kind, _at(em, weight, i)))
        place = em.b.select(is_layer_norm, bias, weight)
        shifted = em.b.fadd(scaled, em.load(kind, _at(em, place, i)))
        value = em.b.select(is_layer_norm, shifted, scaled)
        em.store(round_to_type(em, value, width, code), _at(em, target, i))

    _over(em, count, body)


def _rotate(em: Emitter, x: Value, half: Value, cos: Value, sin: Value, code: Value) -> None:
    def body(kind: Any, width: int, i: Value) -> None:
        low, high = em.load(kind, _at(em, x, i)), em.load(kind, _at(em, x, em.add(i, half)))
        c, s = em.load(kind, _at(em, cos, i)), em.load(kind, _at(em, sin, i))

        def product(a: Value, d: Value) -> Value:
            return round_to_type(em, em.b.fmul(a, d), width, code)

        first = em.b.fsub(product(low, c), product(high, s))
        second = em.b.fadd(product(high, c), product(low, s))
        em.store(round_to_type(em, first, width, code), _at(em, x, i))
        em.store(round_to_type(em, second, width, code), _at(em, x, em.add(i, half)))

    _over(em, half, body)


def _store_as(em: Emitter, target: Value, count: Value, source: Value, code: Value) -> None:
    """Elements of the type with this code, from f32 values that the type holds exactly."""

    def body(kind: Any, width: int, i: Value) -> None:
        b = em.b
        value = em.load(kind, _at(em, source, i))
        ints, shorts = vector(I32, width), vector(I16, width)
        is_f32 = b.icmp_signed("==", code, em.i64(TYPE_CODES["f32"]))
        with b.if_else(is_f32) as (wide, narrow):
            with wide:
                em.store(value, _at(em, target, i))
            with narrow:
                upper = b.trunc(b.lshr(b.bitcast(value, ints), em.const(ints, 16)), shorts)
                if em.target.half:
                    half = b.bitcast(b.fptrunc(value, vector(F16, width)), shorts)
                    upper = b.select(b.icmp_signed("==", code, em.i64(_BF16)), upper, half)
                em.store(upper, _at(em, target, i, 2))

    _over(em, count, body)


def _load_as(dtype: Any) -> Callable[[Emitter, Value, Value, Value], None]:
    def emit(em: Emitter, target: Value, count: Value, source: Value) -> None:
        size = 4 if dtype == "f32" else 2

        def body(_: Any, width: int, i: Value) -> None:
            em.store(load_weights(em, dtype, width, _at(em, source, i, size)), _at(em, target, i))

        _over(em, count, body)

    return emit


# target[i] += scale * source[i]; target[i] += source[i]; target[i] = source[i]
add_scaled = micro_kernel("add_scaled", "iiif:v", _add_scaled)
add_vector = micro_kernel("add_vector", "iii:v", _add)
copy_vector = micro_kernel("copy_vector", "iii:v", _copy)
# (x, count), and of the distances from a centre (x, count, centre)
sum_values = micro_kernel("sum_values", "ii:f", lambda em, x, count: _sum(em, x, count, lambda value: value))
sum_squares = micro_kernel("sum_squares", "ii:f", _sum_squares)
sum_square_distances = micro_kernel("sum_square_distances", "iif:f", _sum_square_distances)
# (target, count, type code) in place
round_all = micro_kernel("round_all", "iii:v", _round_all)
# (target, count, x, shift, factor, weight, bias or 0, type code): ((x - shift) * factor) * weight + bias
scale_by_weights = micro_kernel("scale_by_weights", "iiiffiii:v", _scale_by_weights)
# (x, half, cos, sin, type code): the pairs (x[i], x[i + half]) turned by the angle with that cosine and sine
rotate = micro_kernel("rotate", "iiiii:v", _rotate)
# (target, count, source, type code): f32 to stored elements
store_as = micro_kernel("store_as", "iiii:v", _store_as)
# (target, count, source): stored elements to f32
load_bf16 = micro_kernel("load_bf16_vector", "iii:v", _load_as("bf16"))
load_f16 = micro_kernel("load_f16_vector", "iii:v", _load_as("f16"))
