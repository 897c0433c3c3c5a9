"""Reading weights of any stored type as f32 vectors (or, for tails, scalars)."""

from moe_offload.cpu_kernels.emit import F16, F32, I16, I32, Emitter, Value, vector
from moe_offload.cpu_kernels.layout import WeightType


def load_weights(em: Emitter, dtype: WeightType, count: int, address: Value, offset: Value = 0) -> Value:
    """`count` consecutive elements at address + offset (bytes) as <count x float>."""
    floats = vector(F32, count)
    if dtype == "f32":
        return em.load(floats, address, offset)
    if dtype == "bf16":
        bits = em.b.zext(em.load(vector(I16, count), address, offset), vector(I32, count))
        return em.b.bitcast(em.b.shl(bits, em.const(bits.type, 16)), floats)
    if em.target.half:
        return em.b.fpext(em.load(vector(F16, count), address, offset), floats)
    return _widen_half(em, em.load(vector(I16, count), address, offset), count)


def _widen_half(em: Emitter, stored: Value, count: int) -> Value:
    """f16 -> f32 in integers, for targets where fpext is a call to a function nobody links.

    Subnormals go through a subtraction of normal numbers: as f32 subnormals they would cost
    an assist of ~150 cycles each.
    """
    b, ints, floats = em.b, vector(I32, count), vector(F32, count)
    bits = b.zext(stored, ints)
    sign = b.shl(b.and_(bits, em.const(ints, 0x8000)), em.const(ints, 16))
    magnitude = b.shl(b.and_(bits, em.const(ints, 0x7FFF)), em.const(ints, 13))
    normal = b.add(magnitude, em.const(ints, 112 << 23))
    special = b.add(normal, em.const(ints, 112 << 23))
    is_special = b.icmp_unsigned(">=", magnitude, em.const(ints, 0x7C00 << 13))
    tiny = b.bitcast(b.add(magnitude, em.const(ints, 113 << 23)), floats)
    subnormal = b.bitcast(b.fsub(tiny, em.const(floats, 2.0**-14)), ints)
    is_tiny = b.icmp_unsigned("<", magnitude, em.const(ints, 0x400 << 13))
    widened = b.select(is_tiny, subnormal, b.select(is_special, special, normal))
    return b.bitcast(b.or_(widened, sign), floats)
