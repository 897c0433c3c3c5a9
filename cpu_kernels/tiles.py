"""Tile registers of AMX, and the same in plain memory for CPUs that have none.

A CPU with AMX has eight tiles of 16 rows of 64 bytes. A configuration, which belongs to the thread, says how much of
each is in use; what it leaves out reads as zero. One instruction multiplies two tiles:

    total [m][n] i32  +=  sum over i < 4, all k of  a [m][4k + i] s8  *  b [k][4n + i] s8

`HardwareTiles` emits the instructions, through intrinsics with tile numbers as constants: to LLVM each is a call with
unknown side effects, so none moves across another, nor across a load or store. `EmulatedTiles` does what they are
defined to do on 1 KB of memory each. Code for tiles takes either, so it can be tested anywhere.

Using tiles needs the CPU, the kernel's permission (amx.py) and a configuration: without one of them the process dies.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_offload.cpu_kernels.emit import I8, I32, I64, VOID, Emitter, Value, ir, micro_kernel, vector

TileMode = Literal["hardware", "emulated"]

TILES = 8
TILE_ROWS = 16
TILE_ROW_BYTES = 64
_TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES
_CONFIG_BYTES = 64
_PALETTE = 1
_ROW_BYTES_AT, _ROWS_AT = 16, 48  # in the configuration: u16 [8] and u8 [8]


@dataclass(frozen=True, slots=True)
class TileShape:
    """The part of a tile that is in use."""

    rows: int
    row_bytes: int

    def __post_init__(self) -> None:
        assert 1 <= self.rows <= TILE_ROWS and 4 <= self.row_bytes <= TILE_ROW_BYTES and self.row_bytes % 4 == 0


Shapes = tuple[TileShape, ...]  # of the tiles from 0 on; the others are not in use


def configuration(shapes: Shapes) -> bytes:
    """The operand of ldtilecfg."""
    assert len(shapes) <= TILES
    found = bytearray(_CONFIG_BYTES)
    found[0] = _PALETTE
    for tile, shape in enumerate(shapes):
        found[_ROW_BYTES_AT + 2 * tile] = shape.row_bytes
        found[_ROWS_AT + tile] = shape.rows
    return bytes(found)


def reserve(em: Emitter, size: int) -> Value:
    """Address of `size` bytes of the function's stack, on a cache line."""
    with em.b.goto_entry_block():  # in a loop it would take new stack every time
        memory = em.b.alloca(I8, size=size)
        memory.align = 64
        return em.b.ptrtoint(memory, I64)


class Tiles(ABC):
    """Emits work on tiles. Addresses are int64; strides, from a row to its next in memory, are in bytes."""

    def __init__(self, em: Emitter, shapes: Shapes) -> None:
        self.em, self.shapes = em, shapes

    @abstractmethod
    def zero(self, tile: int) -> None: ...

    @abstractmethod
    def load(self, tile: int, address: Value, stride: int) -> None: ...

    @abstractmethod
    def store(self, tile: int, address: Value, stride: int) -> None: ...

    def dot(self, total: int, a: int, b: int) -> None:
        """total += a * b as above. Shapes that do not fit together are an invalid instruction."""
        shapes = self.shapes
        assert shapes[total].rows == shapes[a].rows and shapes[total].row_bytes == shapes[b].row_bytes
        assert shapes[a].row_bytes == 4 * shapes[b].rows and len({total, a, b}) == 3
        self._dot(total, a, b)

    @abstractmethod
    def _dot(self, total: int, a: int, b: int) -> None: ...


class HardwareTiles(Tiles):
    def zero(self, tile: int) -> None:
        self._call("tilezero", [tile])

    def load(self, tile: int, address: Value, stride: int) -> None:
        self._call("tileloadd64", [tile], self.em.pointer(address), self.em.i64(stride))

    def store(self, tile: int, address: Value, stride: int) -> None:
        self._call("tilestored64", [tile], self.em.pointer(address), self.em.i64(stride))

    def _dot(self, total: int, a: int, b: int) -> None:
        self._call("tdpbssd", [total, a, b])

    def _call(self, name: str, tiles: Sequence[int], *others: Value) -> None:
        self.em.call(f"llvm.x86.{name}", VOID, [*(self.em.const(I8, tile) for tile in tiles), *others])


class EmulatedTiles(Tiles):
    """Tiles on the stack of the function that is emitted; each operation is a call, as an instruction would be one."""

    def __init__(self, em: Emitter, shapes: Shapes) -> None:
        super().__init__(em, shapes)
        self._memory = reserve(em, TILES * _TILE_BYTES)

    def zero(self, tile: int) -> None:
        self._call("tile_zero", _zero, self._tile(tile))

    def load(self, tile: int, address: Value, stride: int) -> None:
        shape = self.shapes[tile]
        self.zero(tile)
        self._call(
            f"tile_copy_{shape.rows}x{shape.row_bytes}", lambda em, *ends: _copy(em, shape, *ends),
            address, stride, self._tile(tile), TILE_ROW_BYTES,
        )  # fmt: skip

    def store(self, tile: int, address: Value, stride: int) -> None:
        shape = self.shapes[tile]
        self._call(
            f"tile_copy_{shape.rows}x{shape.row_bytes}", lambda em, *ends: _copy(em, shape, *ends),
            self._tile(tile), TILE_ROW_BYTES, address, stride,
        )  # fmt: skip

    def _dot(self, total: int, a: int, b: int) -> None:
        rows, quads = self.shapes[total].rows, self.shapes[b].rows
        self._call(
            f"tile_dot_{rows}x{quads}", lambda em, *tiles: _dot(em, rows, quads, *tiles),
            *(self._tile(tile) for tile in (total, a, b)),
        )  # fmt: skip

    def _tile(self, tile: int) -> Value:
        return self.em.add(self._memory, tile * _TILE_BYTES)

    def _call(self, name: str, emit: Callable[..., None], *arguments: Value) -> None:
        """A call of the module's function `name`, whose body emit(em, *arguments) writes the first time."""
        module = self.em.b.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(VOID, [I64] * len(arguments)), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            builder = ir.IRBuilder(function.append_basic_block("entry"))
            emit(Emitter(builder, self.em.target), *function.args)
            builder.ret_void()
        self.em.b.call(function, [self.em.i64(value) for value in arguments])


def _each(em: Emitter, count: int, work: Callable[[Value], None]) -> None:
    def body(i: Value, _: list[Value]) -> list[Value]:
        work(i)
        return []

    em.loop(0, count, 1, [], body)


def _zero(em: Emitter, tile: Value) -> None:
    empty = em.const(vector(I8, TILE_ROW_BYTES), 0)
    _each(em, TILE_ROWS, lambda row: em.store(empty, em.add(tile, em.mul(row, TILE_ROW_BYTES))))


def _copy(em: Emitter, shape: TileShape, source: Value, source_step: Value, to: Value, to_step: Value) -> None:
    def copy(row: Value) -> None:
        value = em.load(vector(I8, shape.row_bytes), em.add(source, em.mul(row, source_step)))
        em.store(value, em.add(to, em.mul(row, to_step)))

    _each(em, shape.rows, copy)


def _dot(em: Emitter, rows: int, quads: int, total: Value, a: Value, b: Value) -> None:
    ints = vector(I32, TILE_ROW_BYTES // 4)

    def bytes_of(lanes: Value) -> list[Value]:
        return [em.b.ashr(em.b.shl(lanes, em.const(ints, 24 - 8 * i)), em.const(ints, 24)) for i in range(4)]

    def row(m: Value) -> None:
        start = em.mul(m, TILE_ROW_BYTES)

        def four_inputs(k: Value, carried: list[Value]) -> list[Value]:
            inputs = em.splat(em.load(I32, em.add(em.add(a, start), em.mul(k, 4))), ints)
            weights = em.load(ints, em.add(b, em.mul(k, TILE_ROW_BYTES)))
            value = carried[0]
            for x, w in zip(bytes_of(inputs), bytes_of(weights), strict=True):
                value = em.b.add(value, em.b.mul(x, w))
            return [value]

        (new,) = em.loop(0, quads, 1, [em.load(ints, em.add(total, start))], four_inputs)
        em.store(new, em.add(total, start))

    _each(em, rows, row)


def open_tiles(mode: TileMode, em: Emitter, shapes: Shapes) -> Tiles:
    return HardwareTiles(em, shapes) if mode == "hardware" else EmulatedTiles(em, shapes)


def make_configure(mode: TileMode, shapes: Shapes) -> Any:
    """Intrinsic (): give the calling thread's tiles these shapes. Emulated tiles have theirs from their emission."""
    operand = configuration(shapes)

    def emit(em: Emitter) -> None:
        if mode == "hardware":
            memory = reserve(em, _CONFIG_BYTES)
            kind = vector(I8, _CONFIG_BYTES)
            em.store(ir.Constant(kind, [em.const(I8, value) for value in operand]), memory)
            em.call("llvm.x86.ldtilecfg", VOID, [em.pointer(memory)])

    name = "_".join(f"{shape.rows}x{shape.row_bytes}" for shape in shapes)
    return micro_kernel(f"configure_tiles_{mode}_{name}", ":v", emit)


def make_release(mode: TileMode) -> Any:
    """Intrinsic (): the calling thread needs its tiles no more, and the system need not keep them for it."""

    def emit(em: Emitter) -> None:
        if mode == "hardware":
            em.call("llvm.x86.tilerelease", VOID, [])

    return micro_kernel(f"release_tiles_{mode}", ":v", emit)
