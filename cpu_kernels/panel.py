"""One block of 32 outputs of a packed matrix times several tokens: the inner loop of quantised products.

Each group of G inputs is a sum of integers, exact in 32 bits, which then goes into the f32 sum of its output and
token as fma(sum, weight scale * activation scale, total), group after group. So a number depends neither on the
instruction set (save for the fused rounding, where a CPU has no FMA) nor on the number of tokens beside it.

How the integers are summed:

    VNNI     vpdpbusd: four products of u8 weights and s8 activations into each i32 lane
    AVX2     vpmaddubsw: pairs into i16; weights of 4 bits leave room for 8 rows (FP4: 5, 4 are taken) before
             vpmaddwd widens the sum
    others   pmaddwd of weights widened to i16 and 16-bit activations (int8 weights on AVX2, everything on SSE2), or
             what the compiler makes of the same in plain multiplications (ARM)
    exact    weights widened to f32, activations f32: for comparison, at a third of the speed
"""

from collections.abc import Callable, Sequence
from typing import Any

from moe_offload.cpu_kernels.activation_rows import Arithmetic
from moe_offload.cpu_kernels.code_rows import load_codes, load_scales, outputs_of, parts_of
from moe_offload.cpu_kernels.emit import F32, I8, I16, I32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.packed_layout import WIDTH, ZERO_POINT, PackedMatrix
from moe_offload.cpu_kernels.target import Target

LINE = 64
_ROWS_IN_16_BITS = {"int4": 8, "mxfp4": 4}
_AHEAD = 2048  # bytes prefetched ahead
# Tokens times planes from which on arithmetic holds up the reading on any CPU.
_BUSY = {"int8": 16, "int4": 8, "mxfp4": 8}
# Rows of a group that are written out one after the other; more of them are a loop. Straight code of 8 is as fast as of
# 32 and compiles in a fraction of the time; with registers of 4 lanes a row is many instructions.
_STRAIGHT = 8
_STRAIGHT_NARROW = 2


class _Tile:
    """What one tile's code is specialised by, and the addresses it works on."""

    def __init__(
        self, em: Emitter, layout: PackedMatrix, arithmetic: Arithmetic, planes: int, rows: list[Value], padded: Value
    ) -> None:
        self.em, self.layout, self.arithmetic, self.planes = em, layout, arithmetic, planes
        self.lanes = em.target.int_lanes
        self.ints, self.floats = vector(I32, self.lanes), vector(F32, self.lanes)
        self.rows, self.padded = rows, padded  # quantised rows of the tokens

    def group(self, record: Value, group: int, index: Value, parts: Sequence[int], totals: dict[Any, Value]) -> None:
        """Add one group's products to totals[token, output] for the outputs of some parts."""
        em, layout = self.em, self.layout
        quads = layout.group // 4
        codes = em.add(record, group * quads * layout.row_bytes)
        position = em.mul(index, layout.group)
        outputs = [output for part in parts for output in outputs_of(layout, part, em.target)]
        factors: Sequence[Value] = ()
        if self.arithmetic == "exact":
            sums = self._exact(codes, position, parts, outputs)
        else:
            factors, fixes = zip(*(self._factor(t, index) for t in range(len(self.rows))), strict=True)
            # the sums begin with the correction, which so costs nothing
            multiply = self._planes if self.arithmetic == "planes" else self._pairs
            sums = multiply(codes, position, parts, outputs, fixes)
        if parts[0] == 0 and group == 0:  # a record's scales are one line, which no row asks for
            self._prefetch(record, layout.scales_at)
        for output in outputs:
            scale = load_scales(em, layout, record, group, output)
            for t in range(len(self.rows)):
                value, both = sums[t, output], scale
                if factors:
                    value, both = em.b.sitofp(value, self.floats), em.b.fmul(scale, factors[t])
                totals[t, output] = em.fma(value, both, totals[t, output])

    def _factor(self, t: int, index: Value) -> tuple[Value, Value]:
        """A group's activation scale and correction, in all lanes."""
        em = self.em
        groups = em.b.udiv(self.padded, em.i64(self.layout.group))
        at = em.add(em.add(self.rows[t], em.mul(self.padded, 2)), em.mul(index, 4))
        factor = em.splat(em.load(F32, at), self.floats)
        high_alone = self.arithmetic == "planes" and self.planes == 1
        if high_alone:
            factor = em.b.fmul(factor, em.const(self.floats, 256.0))
        fix = em.load(I32, em.add(at, em.mul(groups, 8 if high_alone else 4)))
        return factor, em.splat(fix, self.ints)

    def _stretches(
        self, length: int, sums: dict[Any, Value], body: Callable[[Value, dict[Any, Value]], None]
    ) -> dict[Any, Value]:
        """The sums after body(first row, sums) for every `length` rows of a group."""
        quads = self.layout.group // 4
        keys = list(sums)

        def stretch(quad: Value, carried: list[Value]) -> list[Value]:
            inner = dict(zip(keys, carried, strict=True))
            body(quad, inner)
            return [inner[key] for key in keys]

        values = list(sums.values())
        if length < quads:
            values = self.em.loop(0, quads, length, values, stretch)
        else:
            values = stretch(self.em.i64(0), values)
        return dict(zip(keys, values, strict=True))

    def _planes(
        self, rows: Value, position: Value, parts: Sequence[int], outputs: list[int], fixes: Sequence[Value]
    ) -> dict[Any, Value]:
        em, b = self.em, self.em.b
        tokens = range(len(self.rows))
        wide = vector(I8, 4 * self.lanes)
        last = self.planes - 1
        sums = {
            (t, plane, output): fixes[t] if plane == last else em.const(self.ints, 0)
            for t in tokens for plane in range(self.planes) for output in outputs
        }  # fmt: skip
        run = _STRAIGHT if em.target.byte_dot else _ROWS_IN_16_BITS[self.layout.dtype]

        def add(quad: Value, sums: dict[Any, Value]) -> None:
            row, at = em.add(rows, em.mul(quad, self.layout.row_bytes)), em.add(position, em.mul(quad, 4))
            places = [
                [em.add(em.add(x, at), em.mul(self.padded, plane)) for plane in range(self.planes)] for x in self.rows
            ]
            for start in range(0, _STRAIGHT, run):
                short: dict[Any, Value] = {}
                for n in range(start, start + run):
                    codes = self._codes(row, n * self.layout.row_bytes, parts)
                    for t in tokens:
                        for plane in range(self.planes):
                            four = em.splat(em.load(I32, places[t][plane], 4 * n), self.ints)
                            inputs = b.bitcast(four, wide)
                            for output, code in zip(outputs, codes, strict=True):
                                key = t, plane, output
                                if em.target.byte_dot:
                                    sums[key] = self._byte_dot(sums[key], code, inputs)
                                else:
                                    product = self._byte_pairs(code, inputs)
                                    short[key] = product if key not in short else b.add(short[key], product)
                for key, value in short.items():
                    ones = em.const(value.type, 1)
                    sums[key] = b.add(sums[key], self._word_pairs(value, ones))

        sums = self._stretches(_STRAIGHT, sums, add)
        if self.planes == 1:
            return {(t, output): sums[t, 0, output] for t in tokens for output in outputs}
        eight = em.const(self.ints, 8)
        return {
            (t, output): b.add(b.shl(sums[t, 0, output], eight), sums[t, 1, output])
            for t in tokens for output in outputs
        }  # fmt: skip

    def _pairs(
        self, rows: Value, position: Value, parts: Sequence[int], outputs: list[int], fixes: Sequence[Value]
    ) -> dict[Any, Value]:
        em, b = self.em, self.em.b
        words = vector(I16, 2 * self.lanes)
        length = _STRAIGHT if self.lanes > 4 else _STRAIGHT_NARROW

        def add(quad: Value, sums: dict[Any, Value]) -> None:
            row, at = em.add(rows, em.mul(quad, self.layout.row_bytes)), em.mul(em.add(position, em.mul(quad, 4)), 2)
            places = [em.add(x, at) for x in self.rows]
            for n in range(length):
                codes = [b.bitcast(code, words) for code in self._codes(row, n * self.layout.row_bytes, parts)]
                even = [b.and_(code, em.const(words, 255)) for code in codes]
                odd = [b.lshr(code, em.const(words, 8)) for code in codes]
                for t, place in enumerate(places):
                    pair = [b.bitcast(em.splat(em.load(I32, place, 8 * n + m), self.ints), words) for m in (0, 4)]
                    for output, e, o in zip(outputs, even, odd, strict=True):
                        product = b.add(self._word_pairs(e, pair[0]), self._word_pairs(o, pair[1]))
                        sums[t, output] = b.add(sums[t, output], product)

        return self._stretches(
            length, {(t, output): fixes[t] for t in range(len(self.rows)) for output in outputs}, add
        )

    def _exact(self, rows: Value, position: Value, parts: Sequence[int], outputs: list[int]) -> dict[Any, Value]:
        em, b = self.em, self.em.b
        zero_point = em.const(self.ints, ZERO_POINT[self.layout.dtype])

        def add(quad: Value, sums: dict[Any, Value]) -> None:
            row, at = em.add(rows, em.mul(quad, self.layout.row_bytes)), em.mul(em.add(position, em.mul(quad, 4)), 4)
            places = [em.add(x, at) for x in self.rows]
            for n in range(_STRAIGHT_NARROW):
                codes = [b.bitcast(c, self.ints) for c in self._codes(row, n * self.layout.row_bytes, parts)]
                for k in range(4):
                    byte = [
                        b.and_(b.lshr(code, em.const(self.ints, 8 * k)), em.const(self.ints, 255)) for code in codes
                    ]
                    weights = [b.sitofp(b.sub(value, zero_point), self.floats) for value in byte]
                    for t, place in enumerate(places):
                        x = em.splat(em.load(F32, place, 16 * n + 4 * k), self.floats)
                        for output, weight in zip(outputs, weights, strict=True):
                            sums[t, output] = em.fma(weight, x, sums[t, output])

        zero = em.const(self.floats, 0.0)
        return self._stretches(
            _STRAIGHT_NARROW, {(t, output): zero for t in range(len(self.rows)) for output in outputs}, add
        )

    def _codes(self, record: Value, offset: int, parts: Sequence[int]) -> list[Value]:
        # beside the row it belongs to: a burst of prefetches at the head of a record loses 10 %
        for line in range(0, self.layout.row_bytes, LINE):
            if parts[0] == 0:
                self._prefetch(record, offset + line)
        return [code for part in parts for code in load_codes(self.em, self.layout, record, offset, part)]

    def _prefetch(self, address: Value, offset: int) -> None:
        if self.em.target.follows_streams and len(self.rows) * self.planes < _BUSY[self.layout.dtype]:
            return
        self.em.prefetch(address, offset + _AHEAD, locality=3 if len(self.rows) == 1 else 2)

    def _byte_dot(self, total: Value, codes: Value, inputs: Value) -> Value:
        b, ints = self.em.b, self.ints
        # the signature that every LLVM since 8 knows: operands as i32 lanes
        operands = [total, b.bitcast(codes, ints), b.bitcast(inputs, ints)]
        return self.em.call("llvm.x86.avx512.vpdpbusd.512", ints, operands)

    def _byte_pairs(self, codes: Value, inputs: Value) -> Value:
        name = "llvm.x86.avx512.pmaddubs.w.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"
        return self.em.call(name, vector(I16, 2 * self.lanes), [codes, inputs])

    def _word_pairs(self, a: Value, c: Value) -> Value:
        """i16 x i16, neighbours summed into i32."""
        em, b = self.em, self.em.b
        if em.target.is_x86:
            name = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
            return em.call(name[self.lanes], self.ints, [a, c])
        sixteen = em.const(self.ints, 16)
        pair = [b.bitcast(value, self.ints) for value in (a, c)]
        low = [b.ashr(b.shl(value, sixteen), sixteen) for value in pair]
        high = [b.ashr(value, sixteen) for value in pair]
        return b.add(b.mul(*low), b.mul(*high))


def make_panel(layout: PackedMatrix, arithmetic: Arithmetic, tokens: int, planes: int, target: Target) -> Any:
    """Intrinsic (weights, records, rows, padded, to, to_step): one block of outputs times `tokens` tokens.

    weights: address of the block; records: how many it has. rows: address of `tokens` int64 addresses of rows as of
    activation_rows, of `padded` inputs each. The f32 results go to `to`, 32 for each token, to_step bytes apart.
    Of `layout` only dtype and group matter.
    """
    lanes = target.int_lanes
    few_registers = target.registers < 32 and tokens * planes > 1
    # one token's totals stay in registers beside the sums of a part, and its record in L1
    together = not few_registers or tokens == 1

    def emit(
        em: Emitter, weights: Value, records: Value, rows: Value, padded: Value, to: Value, to_step: Value
    ) -> None:
        addresses = [em.load(I64, rows, 8 * t) for t in range(tokens)]
        tile = _Tile(em, layout, arithmetic, planes, addresses, padded)
        keys = [(t, output) for t in range(tokens) for output in range(0, WIDTH, lanes)]
        parts = range(parts_of(layout, target))

        def sweep(turns: Sequence[Sequence[int]], keys: list[tuple[int, int]]) -> None:
            def body(i: Value, carried: list[Value]) -> list[Value]:
                totals: dict[Any, Value] = dict(zip(keys, carried, strict=True))
                record = em.add(weights, em.mul(i, layout.record_bytes))
                for group in range(layout.groups_per_record):
                    index = em.add(em.mul(i, layout.groups_per_record), group)
                    for chosen in turns:
                        tile.group(record, group, index, chosen, totals)
                return [totals[key] for key in keys]

            zeros = [em.const(vector(F32, lanes), 0.0)] * len(keys)
            sums = em.loop(0, records, 1, zeros, body)
            for (t, output), value in zip(keys, sums, strict=True):
                em.store(value, em.add(em.add(to, em.mul(to_step, t)), 4 * output))

        if together:
            sweep([[part] for part in parts] if few_registers else [parts], keys)
        else:
            # sums of a part of the outputs alone; the block, read once more for each, stays in the core's cache
            for part in parts:
                chosen = outputs_of(layout, part, target)
                sweep([[part]], [(t, output) for t in range(tokens) for output in chosen])

    name = f"panel_{layout.dtype}_{layout.group}_{arithmetic}_{tokens}x{planes}"
    return micro_kernel(name, "iiiiii:v", emit)
