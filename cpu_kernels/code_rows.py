"""Reading a packed matrix's rows of codes as unsigned bytes, and its scales as f32.

A row holds four inputs of 32 outputs. As vectors of one register each it comes in parts: a part is what one load gives
without touching the rest of the row. Part p of int8 is the outputs from L * p on; of the nibble formats it is two
vectors, the outputs from L * p and from 16 + L * p on (L = i32 lanes of a register). CPUs with few registers
take a block part by part.
"""

from moe_offload.cpu_kernels.emit import F32, I8, I32, Emitter, Value, ir, vector
from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.target import Target
from moe_offload.cpu_kernels.weights import load_weights

# Twice the FP4 (E2M1) value of each code, plus 12: unsigned bytes from 0 to 24.
_FP4_BYTES = (12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)


def parts_of(layout: PackedMatrix, target: Target) -> int:
    """Loads of one row."""
    return layout.row_bytes // (4 * target.int_lanes)


def outputs_of(layout: PackedMatrix, part: int, target: Target) -> list[int]:
    """First output of each vector of a part."""
    first = part * target.int_lanes
    return [first] if layout.dtype == "int8" else [first, 16 + first]


def load_codes(em: Emitter, layout: PackedMatrix, row: Value, offset: int, part: int) -> list[Value]:
    """The vectors <4L x i8> of a part: stored weight plus zero point."""
    b, lanes = em.b, em.target.int_lanes
    kind = vector(I8, 4 * lanes)
    raw = em.load(kind, row, offset + part * 4 * lanes)
    if layout.dtype == "int8":
        return [raw]
    codes = [b.and_(raw, em.const(kind, 15)), b.lshr(raw, em.const(kind, 4))]
    return [_fp4_bytes(em, code) for code in codes] if layout.dtype == "mxfp4" else codes


def _fp4_bytes(em: Emitter, code: Value) -> Value:
    b, kind = em.b, code.type
    if em.target.byte_shuffle and kind.count in (16, 32, 64):
        name = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}
        table = ir.Constant(kind, [ir.Constant(I8, v) for v in _FP4_BYTES * (kind.count // 16)])
        return em.call(name[kind.count], kind, [table, code])
    # magnitudes 0 1 2 3 4 5 6 7 -> 0 1 2 3 4 6 8 12
    size = b.and_(code, em.const(kind, 7))
    above = b.sub(size, em.const(kind, 4))
    extra = b.select(b.icmp_signed(">", above, em.const(kind, 0)), above, em.const(kind, 0))
    last = b.select(b.icmp_unsigned("==", size, em.const(kind, 7)), em.const(kind, 2), em.const(kind, 0))
    value = b.add(b.add(size, extra), last)
    negative = b.icmp_unsigned(">", code, em.const(kind, 7))
    return b.add(em.const(kind, 12), b.select(negative, b.sub(em.const(kind, 0), value), value))


def load_scales(em: Emitter, layout: PackedMatrix, record: Value, group: int, output: int) -> Value:
    """<L x f32>: the scales of L outputs in a group of the record."""
    b, lanes = em.b, em.target.int_lanes
    if layout.dtype != "mxfp4":
        return load_weights(em, "f16", lanes, record, layout.scales_at + 2 * output)
    stored = em.load(vector(I8, lanes), record, layout.scales_at + 32 * group + output)
    exponent = b.zext(stored, vector(I32, lanes))
    power = b.bitcast(b.shl(exponent, em.const(exponent.type, 23)), vector(F32, lanes))
    broken = b.icmp_unsigned("==", exponent, em.const(exponent.type, 255))
    scale = b.fmul(power, em.const(power.type, 0.5))  # the bytes are twice the values
    return b.select(broken, em.const(power.type, float("nan")), scale)
