"""Scalars at addresses, for use in Numba functions."""

from moe_offload.cpu_kernels.emit import F32, I32, I64, Emitter, Value, micro_kernel
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.weights import load_weights

TYPE_CODES: dict[WeightType, int] = {"bf16": 0, "f16": 1, "f32": 2}
_BF16, _F16 = TYPE_CODES["bf16"], TYPE_CODES["f16"]
_BYTES = tuple(ELEMENT_BYTES[name] for name in TYPE_CODES)


def _store(em: Emitter, value: Value, address: Value) -> None:
    em.store(value, address)


load_i64 = micro_kernel("load_i64", "i:i", lambda em, address: em.load(I64, address))
load_i32 = micro_kernel("load_i32", "i:h", lambda em, address: em.load(I32, address))
load_f32 = micro_kernel("load_f32", "i:f", lambda em, address: em.load(F32, address))
store_i64 = micro_kernel("store_i64", "ii:v", _store)
store_i32 = micro_kernel("store_i32", "hi:v", _store)
store_f32 = micro_kernel("store_f32", "fi:v", _store)
_load_bf16 = micro_kernel("load_bf16", "i:f", lambda em, a: load_weights(em, "bf16", 1, a))
_load_f16 = micro_kernel("load_f16", "i:f", lambda em, a: load_weights(em, "f16", 1, a))

_prefetch = micro_kernel("prefetch", "i:v", lambda em, address: em.prefetch(address))


@native
def prefetch_run(address: int, count: int) -> None:
    """Ask for the bytes from `address` on; harmless where nothing is mapped."""
    for line in range(0, count, 64):
        _prefetch(address + line)


@native
def load_element(address: int, code: int) -> float:
    """An element of the stored type with this code, as f32."""
    if code == _BF16:
        return _load_bf16(address)  # type: ignore[no-any-return]
    if code == _F16:
        return _load_f16(address)  # type: ignore[no-any-return]
    return load_f32(address)  # type: ignore[no-any-return]


@native
def element_bytes(code: int) -> int:
    return _BYTES[code]


@native
def add_elements(target: int, target_step: int, count: int, source: int, step: int, code: int) -> None:
    """target[i * target_step] += source[i * step]; source is of the stored type with this code."""
    size = _BYTES[code] * step
    for i in range(count):
        at = target + 4 * target_step * i
        store_f32(load_f32(at) + load_element(source + size * i, code), at)


@native
def add_scaled(target: int, count: int, source: int, scale: float) -> None:
    """target[i] += scale * source[i], f32."""
    for i in range(count):
        store_f32(load_f32(target + 4 * i) + scale * load_f32(source + 4 * i), target + 4 * i)


@native
def clear(target: int, count: int) -> None:
    for i in range(count):
        store_f32(0.0, target + 4 * i)
