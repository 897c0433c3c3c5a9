"""Rows of a KV cache in registers.

A row of D stored elements is walked in slices of two vectors. bf16 is widened where it lies: the
even elements of a slice become one vector, the odd ones the other (two instructions for 32
elements instead of four); every other type gives its low and its high half. What is multiplied
with a slice is brought into the same order once, and results are put back into order at the end.
A row's last slice may be partial: it is loaded piece by piece, never past the row's end, and
filled up with zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from moe_offload.cpu_kernels.emit import F32, I8, I16, I32, Emitter, Value, vector
from moe_offload.cpu_kernels.target import Target
from moe_offload.cpu_kernels.weights import load_weights

LINE = 64
CacheType = Literal["bf16", "f16", "f32", "int8"]
CACHE_BYTES: dict[CacheType, int] = {"bf16": 2, "f16": 2, "f32": 4, "int8": 1}


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of `width` stored elements are taken apart."""

    dtype: CacheType
    width: int
    lanes: int  # of an f32 vector

    @property
    def slice_width(self) -> int:
        """Elements of a whole slice."""
        return 2 * self.lanes

    @property
    def slices(self) -> int:
        return -(-self.width // self.slice_width)

    @property
    def size(self) -> int:
        return CACHE_BYTES[self.dtype]

    @property
    def slice_bytes(self) -> int:
        """Stored bytes of a whole slice."""
        return self.slice_width * self.size

    @property
    def row_bytes(self) -> int:
        return self.width * self.size

    @property
    def float_bytes(self) -> int:
        """Bytes of a row as f32 vectors, filled up to whole slices."""
        return self.slices * self.slice_width * 4

    def count(self, number: int) -> int:
        """Elements of this slice that exist."""
        return min(self.slice_width, self.width - number * self.slice_width)

    def load(self, em: Emitter, address: Value, count: int) -> list[Value]:
        """The slice of `count` elements at `address` as two f32 vectors in this type's order."""
        if self.dtype == "bf16":
            pairs = self.load_pairs(em, address, count)
            even = em.b.shl(pairs, em.const(pairs.type, 16))
            odd = em.b.and_(pairs, em.const(pairs.type, -65536))
            return [em.b.bitcast(part, vector(F32, self.lanes)) for part in (even, odd)]
        return load_floats(em, self.dtype, address, count, self.lanes)

    def load_pairs(self, em: Emitter, address: Value, count: int) -> Value:
        """A slice as <lanes x i32> of bf16 pairs, the element of the first vector in the low half.

        For types whose elements bf16 holds exactly.
        """
        if self.dtype == "bf16":
            bits = assemble(em, I16, self.slice_width, count, lambda n, at: em.load(vector(I16, n), address, 2 * at))
            return em.b.bitcast(bits, vector(I32, self.lanes))
        return pair(em, *self.load(em, address, count))

    def load_two(self, em: Emitter, first: Value, second: Value | None, count: int) -> list[Value]:
        """The same slice of two rows, in bf16 pairs (first, second) of equal elements: two <lanes x i32>.

        Without a second row zeros stand for it.
        """
        if self.dtype != "bf16":
            a = self.load(em, first, count)
            b = [em.const(half.type, 0.0) for half in a] if second is None else self.load(em, second, count)
            return [pair(em, *halves) for halves in zip(a, b, strict=True)]
        a = self.load_pairs(em, first, count)
        b = em.const(a.type, 0) if second is None else self.load_pairs(em, second, count)
        half, high = em.const(a.type, 16), em.const(a.type, -65536)
        even = em.b.or_(em.b.and_(a, em.const(a.type, 65535)), em.b.shl(b, half))
        return [even, em.b.or_(em.b.lshr(a, half), em.b.and_(b, high))]

    def from_natural(self, em: Emitter, halves: list[Value]) -> list[Value]:
        """Two vectors in natural order, brought into this type's."""
        if self.dtype != "bf16":
            return halves
        return [em.shuffle(halves[0], halves[1], range(odd, 2 * self.lanes, 2)) for odd in (0, 1)]

    def to_natural(self, em: Emitter, halves: list[Value]) -> list[Value]:
        if self.dtype != "bf16":
            return halves
        n = self.lanes
        mixed = [lane for i in range(n) for lane in (i, n + i)]
        return [em.shuffle(halves[0], halves[1], part) for part in (mixed[:n], mixed[n:])]

    def prefetch(self, em: Emitter, row: Value, start: int, stop: int) -> None:
        """Ask for a row's cache lines that begin in [start, stop), in bytes, into L2."""
        for offset in range(-(-start // LINE) * LINE, min(stop, self.row_bytes), LINE):
            em.prefetch(row, offset, locality=2)


def has_pair_dots(target: Target) -> bool:
    """vdpbf16ps: products of bf16 pairs, added up in f32."""
    return target.lanes == 16 and "+avx512bf16" in target.features.split(",")


def pair(em: Emitter, low: Value, high: Value) -> Value:
    """f32 vectors as bf16 pairs; low 16 bits are cut off."""
    ints = vector(I32, low.type.count)
    upper = em.b.and_(em.b.bitcast(high, ints), em.const(ints, -65536))
    return em.b.or_(em.b.lshr(em.b.bitcast(low, ints), em.const(ints, 16)), upper)


def add_pairs(em: Emitter, a: Value, b: Value, c: Value) -> Value:
    """c[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: bf16 pairs as <16 x i32>, sums <16 x f32>."""
    return em.call("llvm.x86.avx512bf16.dpbf16ps.512", c.type, [c, a, b])


def load_floats(em: Emitter, dtype: CacheType, address: Value, count: int, lanes: int) -> list[Value]:
    """`count` <= 2 * lanes elements as two f32 vectors in natural order, filled up with zeros."""
    size = CACHE_BYTES[dtype]

    def piece(width: int, at: int) -> Value:
        if dtype == "int8":
            stored = em.load(vector(I8, width), address, at)
            return em.b.sitofp(em.b.sext(stored, vector(I32, width)), vector(F32, width))
        return load_weights(em, dtype, width, address, at * size)

    def half(first: int) -> Value:
        there = max(0, min(lanes, count - first))
        return assemble(em, F32, lanes, there, lambda n, at: piece(n, first + at))

    return [half(0), half(lanes)]


def store_floats(em: Emitter, halves: list[Value], address: Value, count: int) -> None:
    """The first `count` elements of two f32 vectors in natural order."""
    lanes = halves[0].type.count
    for number, value in enumerate(halves):
        first = number * lanes
        for width, at in pieces(max(0, min(lanes, count - first)), lanes):
            part = value
            if width == 1:
                part = em.b.extract_element(value, em.const(I32, at))
            elif width < lanes:
                part = em.shuffle(value, value, range(at, at + width))
            em.store(part, address, 4 * (first + at))


def pieces(count: int, most: int) -> list[tuple[int, int]]:
    """`count` as falling powers of two up to `most`, each with its start."""
    found, at = [], 0
    while most:
        while count - at >= most:
            found.append((most, at))
            at += most
        most //= 2
    return found


def assemble(em: Emitter, element: Any, total: int, count: int, load: Callable[[int, int], Value]) -> Value:
    """<total x element> out of load(width, start) pieces that cover [0, count), zeros behind."""
    if count == total:
        return load(total, 0)
    value = em.const(vector(element, total), 0)
    for width, at in pieces(count, total):
        piece = load(width, at)
        if width == 1:
            value = em.b.insert_element(value, piece, em.const(I32, at))
            continue
        wide = em.shuffle(piece, piece, [i % width for i in range(total)])
        value = em.shuffle(value, wide, [total + i if at <= i < at + width else i for i in range(total)])
    return value
