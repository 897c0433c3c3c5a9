"""One block of 32 outputs of a packed matrix times up to 32 tokens through tiles: `panel` for many tokens.

Bitwise equal to `panel` on CPUs with FMA: a group's products are summed in exact integers here as there, and go into
the f32 total in the same way, group after group. Written from AMX's definition and tested with emulated tiles: never
timed by us. (An earlier prototype, which was measured on a CPU with AMX, took half to a quarter of VNNI's time from 16
tokens on with groups of 128. Stores bound it, so smaller groups gain less.)

Weights become signed bytes (stored code minus zero point), so that no correction is needed, in the row order of the
packed layout: its rows of four inputs of 32 outputs are two tile rows of 16 outputs. Activations are gathered once for
all blocks: a tile is loaded with one stride, and an expert's tokens lie anywhere. `collect` writes a token panel

    codes  s8 [planes][P / D][32 tokens][D]  |  factors  f32 [P / G][32 tokens]

of P inputs in groups of G; D = min(G, 64) is the depth of a tile. Rows of tokens that are missing keep whatever bytes
they had: these reach rows of the total alone that nobody reads.

    tiles 0 1    sums of tokens  0-15 with outputs 0-15, 16-31       4    activations of tokens  0-15
          2 3    sums of tokens 16-31 likewise                       5    activations of tokens 16-31
                                                                     6 7  weights of outputs 0-15, 16-31

Each record is unpacked while the one before is multiplied: a tile loaded right behind the stores of its bytes stalls.
"""

from typing import Any

from moe_offload.cpu_kernels.code_rows import load_codes, load_scales, outputs_of, parts_of
from moe_offload.cpu_kernels.emit import F32, I8, I32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.packed_layout import WIDTH, ZERO_POINT, PackedMatrix
from moe_offload.cpu_kernels.tiles import (
    TILE_ROW_BYTES,
    TILE_ROWS,
    Shapes,
    TileMode,
    Tiles,
    TileShape,
    open_tiles,
    reserve,
)

PANEL_TOKENS = 2 * TILE_ROWS
_TOKEN_BYTES = 4 * WIDTH  # sums (i32) or totals (f32) of one token
_SUM_BYTES = PANEL_TOKENS * _TOKEN_BYTES
_LINE = 64
_AHEAD = 2048  # bytes prefetched ahead, as in `panel`


def _depth(group: int) -> int:
    """Inputs of one tile."""
    return min(group, TILE_ROW_BYTES)


def tile_shapes(group: int) -> Shapes:
    """What the thread's tiles have to be configured for."""
    depth = _depth(group)
    totals = TileShape(TILE_ROWS, TILE_ROW_BYTES)
    inputs, weights = TileShape(TILE_ROWS, depth), TileShape(depth // 4, TILE_ROW_BYTES)
    return (totals,) * 4 + (inputs,) * 2 + (weights,) * 2


def panel_bytes(padded: int, group: int, planes: int) -> int:
    """Bytes of a token panel of `padded` inputs, a multiple of 64."""
    return PANEL_TOKENS * (planes * padded + 4 * (padded // group))


def make_collect(group: int, planes: int) -> Any:
    """Intrinsic (rows, tokens, padded, panel): a token panel of tokens <= 32 rows.

    rows: address of int64 addresses of rows as of activation_rows, in planes, of `padded` inputs each.
    """
    depth = _depth(group)
    kind = vector(I8, depth)

    def emit(em: Emitter, rows: Value, tokens: Value, padded: Value, panel: Value) -> None:
        factors = em.add(panel, em.mul(padded, planes * PANEL_TOKENS))

        def token(t: Value, _: list[Value]) -> list[Value]:
            row = em.load(I64, em.add(rows, em.mul(t, 8)))

            def codes(at: Value, _: list[Value]) -> list[Value]:
                to = em.add(em.add(panel, em.mul(at, PANEL_TOKENS)), em.mul(t, depth))
                em.store(em.load(kind, em.add(row, at)), to)
                return []

            def factor(g: Value, _: list[Value]) -> list[Value]:
                value = em.load(F32, em.add(em.add(row, em.mul(padded, 2)), em.mul(g, 4)))
                if planes == 1:
                    value = em.b.fmul(value, em.const(F32, 256.0))
                em.store(value, em.add(em.add(factors, em.mul(g, 4 * PANEL_TOKENS)), em.mul(t, 4)))
                return []

            em.loop(0, em.mul(padded, planes), depth, [], codes)  # the planes follow each other, here as there
            em.loop(0, em.b.udiv(padded, em.i64(group)), 1, [], factor)
            return []

        em.loop(0, tokens, 1, [], token)

    return micro_kernel(f"collect_{group}x{planes}", "iiii:v", emit)


def make_tile_panel(layout: PackedMatrix, planes: int, mode: TileMode) -> Any:
    """Intrinsic (weights, records, panel, tokens, padded, to, to_step): one block times tokens <= 32 tokens.

    weights: address of the block; records: how many it has. panel: what `collect` wrote. The f32 results go to `to`,
    32 for each token, to_step bytes apart. Of `layout` only dtype and group matter. With hardware tiles, the thread
    must have configured them to `tile_shapes`.
    """

    def emit(
        em: Emitter, weights: Value, records: Value, panel: Value, tokens: Value, padded: Value, to: Value, step: Value
    ) -> None:
        _Block(em, layout, planes, mode, weights, records, panel, tokens, padded).emit(to, step)

    return micro_kernel(f"tile_panel_{mode}_{layout.dtype}_{layout.group}x{planes}", "iiiiiii:v", emit)


class _Block:
    """One block times one token panel: what its code is specialised by, and the addresses it works on."""

    def __init__(
        self, em: Emitter, layout: PackedMatrix, planes: int, mode: TileMode,
        weights: Value, records: Value, panel: Value, tokens: Value, padded: Value,
    ) -> None:  # fmt: skip
        self.em, self.layout, self.planes = em, layout, planes
        self.depth = _depth(layout.group)
        self.floats, self.ints = vector(F32, em.target.int_lanes), vector(I32, em.target.int_lanes)
        self.weights, self.records, self.panel, self.tokens, self.padded = weights, records, panel, tokens, padded
        self.factors = em.add(panel, em.mul(padded, planes * PANEL_TOKENS))
        self.tiles: Tiles = open_tiles(mode, em, tile_shapes(layout.group))
        self.record_codes = WIDTH * layout.span  # bytes of a record's codes when unpacked
        self.codes = reserve(em, 2 * self.record_codes)  # [2 records][2 halves][span / 4][16 outputs][4]
        self.sums = reserve(em, planes * _SUM_BYTES)
        self.totals = reserve(em, _SUM_BYTES)

    def emit(self, to: Value, step: Value) -> None:
        em, layout = self.em, self.layout
        zero = em.const(self.floats, 0.0)
        self._each_token(lambda t, output: em.store(zero, self._at(self.totals, t, output)))
        self._unpack(self.weights, self.codes)
        last = em.add(self.records, -1)

        def record(i: Value, _: list[Value]) -> list[Value]:
            following = em.add(i, 1)
            here, there = (
                em.add(self.codes, em.mul(em.b.and_(n, em.i64(1)), self.record_codes)) for n in (i, following)
            )
            # nothing behind the block may be read: the last record is unpacked twice
            following = em.b.select(em.b.icmp_signed("<", i, last), following, last)
            self._unpack(em.add(self.weights, em.mul(following, layout.record_bytes)), there)
            stored = em.add(self.weights, em.mul(i, layout.record_bytes))
            for group in range(layout.groups_per_record):
                self._multiply(here, i, group)
                self._add(stored, group, em.add(em.mul(i, layout.groups_per_record), group))
            return []

        em.loop(0, self.records, 1, [], record)
        self._each_token(
            lambda t, output: em.store(
                em.load(self.floats, self._at(self.totals, t, output)),
                em.add(em.add(to, em.mul(t, step)), 4 * output),
            )
        )

    def _unpack(self, record: Value, codes: Value) -> None:
        """A record's weights as signed bytes."""
        em, layout = self.em, self.layout
        zero_point = em.const(vector(I8, 4 * em.target.int_lanes), -ZERO_POINT[layout.dtype])
        half_bytes = self.record_codes // 2
        for quad in range(layout.span // 4):
            offset = quad * layout.row_bytes
            for line in range(0, layout.row_bytes, _LINE):
                em.prefetch(record, offset + line + _AHEAD, locality=2)
            for part in range(parts_of(layout, em.target)):
                outputs = outputs_of(layout, part, em.target)
                stored = load_codes(em, layout, record, offset, part)
                for output, code in zip(outputs, stored, strict=True):
                    half, column = divmod(output, TILE_ROWS)
                    place = half * half_bytes + quad * TILE_ROW_BYTES + 4 * column
                    em.store(em.b.add(code, zero_point), codes, place)

    def _multiply(self, codes: Value, i: Value, group: int) -> None:
        """The sums of a group, for each plane."""
        em = self.em
        for plane in range(self.planes):
            first = em.add(em.mul(i, self.layout.span), group * self.layout.group)
            inputs = em.add(self.panel, em.mul(em.add(first, em.mul(self.padded, plane)), PANEL_TOKENS))
            with em.b.if_else(em.b.icmp_signed(">", self.tokens, em.i64(TILE_ROWS))) as (two, one):
                with two:
                    self._multiply_plane(codes, inputs, group, plane, 2)
                with one:
                    self._multiply_plane(codes, inputs, group, plane, 1)

    def _multiply_plane(self, codes: Value, inputs: Value, group: int, plane: int, halves: int) -> None:
        em, tiles = self.em, self.tiles
        for total in range(2 * halves):
            tiles.zero(total)
        for start in range(0, self.layout.group, self.depth):
            row = (group * self.layout.group + start) // 4
            for side in range(2):
                place = side * self.record_codes // 2 + row * TILE_ROW_BYTES
                tiles.load(6 + side, em.add(codes, place), TILE_ROW_BYTES)
            for half in range(halves):
                tiles.load(4 + half, em.add(inputs, start * PANEL_TOKENS + half * TILE_ROWS * self.depth), self.depth)
                for side in range(2):
                    tiles.dot(2 * half + side, 4 + half, 6 + side)
        for total in range(2 * halves):
            half, side = divmod(total, 2)
            place = plane * _SUM_BYTES + half * TILE_ROWS * _TOKEN_BYTES + side * TILE_ROW_BYTES
            tiles.store(total, em.add(self.sums, place), _TOKEN_BYTES)

    def _add(self, record: Value, group: int, index: Value) -> None:
        """A group's sums, scaled, into the totals."""
        em, b = self.em, self.em.b
        outputs = range(0, WIDTH, em.target.int_lanes)
        scales = {output: load_scales(em, self.layout, record, group, output) for output in outputs}
        factors = em.add(self.factors, em.mul(index, 4 * PANEL_TOKENS))

        def add(t: Value, output: int) -> None:
            value = em.load(self.ints, self._at(self.sums, t, output))
            if self.planes == 2:
                low = em.load(self.ints, em.add(self._at(self.sums, t, output), _SUM_BYTES))
                value = b.add(b.shl(value, em.const(self.ints, 8)), low)
            factor = em.splat(em.load(F32, em.add(factors, em.mul(t, 4))), self.floats)
            place = self._at(self.totals, t, output)
            both = b.fmul(scales[output], factor)
            em.store(em.fma(b.sitofp(value, self.floats), both, em.load(self.floats, place)), place)

        self._each_token(add)

    def _at(self, base: Value, t: Value, output: int) -> Value:
        return self.em.add(self.em.add(base, self.em.mul(t, _TOKEN_BYTES)), 4 * output)

    def _each_token(self, work: Any) -> None:
        """work(token, first output of a vector) for all tokens and outputs."""

        def body(t: Value, _: list[Value]) -> list[Value]:
            for output in range(0, WIDTH, self.em.target.int_lanes):
                work(t, output)
            return []

        self.em.loop(0, self.tokens, 1, [], body)
