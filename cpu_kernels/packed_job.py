"""The job of one layer of packed experts: every thread runs it, and they share the work by counters.

    phase 1   every token's hidden vector becomes integers (activation_rows)
    phase 2   an expert's blocks of intermediate outputs: gate and up, activation, and the result becomes integers too
    phase 3   stripes of output columns: the owner of a stripe adds every expert's rows in ascending order

Between phases all threads wait until the jobs are done (jobs are counted, not threads: a late thread holds nobody up).
Nothing is added atomically, so the bits do not depend on who computed what, nor on how many threads there were.

A tile takes up to 8 rows; the last tile of an expert may reach beyond its rows, to those of the next expert or to the
slack behind all: what it computes there is never used.
"""

from collections.abc import Callable
from typing import Any

from moe_offload.cpu_kernels import packed_block as word
from moe_offload.cpu_kernels.activation_rows import Arithmetic, make_quantise
from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.jit import native, specialised
from moe_offload.cpu_kernels.layout import ActivationKind
from moe_offload.cpu_kernels.memory import load_f32, load_i32, load_i64, prefetch_run
from moe_offload.cpu_kernels.packed_layout import WIDTH, ZERO_POINT, PackedMatrix
from moe_offload.cpu_kernels.panel import make_panel
from moe_offload.cpu_kernels.target import Target
from moe_offload.cpu_kernels.tile_product import make_products
from moe_offload.cpu_kernels.tiles import TileMode
from moe_offload.cpu_kernels.vector_ops import add_scaled, add_vector

LARGEST_TILE = 8
HEAD = 2048  # bytes of the next run of memory that are asked for before it is begun


def make_product(key: str, layout: PackedMatrix, arithmetic: Arithmetic, target: Target) -> Any:
    """(block, records, rows, tokens, planes, padded, to, step): a block times any number of tokens.

    Computes whole tiles: up to LARGEST_TILE - 1 rows more than asked for.
    """
    # sums of more tokens do not fit 16 registers: measured no faster, and twice the code to compile
    most, most_twice = (LARGEST_TILE, 4) if target.registers >= 32 else (4, 2)
    one, two, some = (make_panel(layout, arithmetic, n, 1, target) for n in (1, 2, 4))
    # batches of a few dozen sequences give experts two or three tokens each: no lane to waste there
    three, thrice = (make_panel(layout, arithmetic, 3, 1, target), 3) if most > 4 else (some, 4)
    many = make_panel(layout, arithmetic, most, 1, target) if most > 4 else some
    if arithmetic == "planes":
        one_twice, two_twice = (make_panel(layout, arithmetic, n, 2, target) for n in (1, 2))
        some_twice = make_panel(layout, arithmetic, most_twice, 2, target) if most_twice > 2 else two_twice
    else:  # 16-bit and exact activations come in one piece
        one_twice, two_twice, some_twice, most_twice = one, two, some, 4

    @specialised(key)
    def product(block: int, records: int, rows: int, tokens: int, planes: int, padded: int, to: int, step: int) -> None:
        t = 0
        if planes == 2:
            while t < tokens:
                left = tokens - t
                if left > 2:
                    some_twice(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += most_twice
                elif left == 2:
                    two_twice(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += 2
                else:
                    one_twice(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += 1
        else:
            while t < tokens:
                left = tokens - t
                if left > 6:
                    many(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += most
                elif left == 4:
                    some(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += 4
                elif left > 2:
                    three(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += thrice
                elif left == 2:
                    two(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += 2
                else:
                    one(block, records, rows + 8 * t, padded, to + t * step, step)
                    t += 1

    return product


@native
def _record(args: int, entry: int) -> int:
    """Address of the table's row for the expert at this position of the groups."""
    expert = load_i32(load_i64(args + word.EXPERTS) + 4 * entry)
    return load_i64(args + word.TABLE) + 48 * expert  # type: ignore[no-any-return]


def make_packed_job(
    key: str, layout: PackedMatrix, arithmetic: Arithmetic, gated: bool, kind: ActivationKind, target: Target,
    tiles: TileMode | None = None,
) -> Callable[[int, int], None]:  # fmt: skip
    """The job `(thread, args)`; of `layout` only dtype and group matter. tiles: those that many rows go through."""
    begin_rows, multiply, end_rows = make_products(key, layout, make_product(key, layout, arithmetic, target), tiles)
    quantise = make_quantise(arithmetic, layout.group, ZERO_POINT[layout.dtype], target)
    activate = make_activate(kind, gated, 1, target.lanes)
    record_bytes = layout.record_bytes

    @specialised(key)
    def first(args: int, local: int, entry: int, start: int, count: int) -> None:
        """Blocks start to start + count of an expert's intermediate outputs, for all of its rows."""
        panels, local = local, local + load_i64(args + word.PANELS_BYTES)
        record, alpha, limit = _record(args, entry), load_f32(args + word.ALPHA), load_f32(args + word.LIMIT)
        records, padded = load_i64(args + word.UP_RECORDS), load_i64(args + word.HIDDEN_PADDED)
        middle_padded = load_i64(args + word.MIDDLE_PADDED)
        block_bytes = records * record_bytes
        offsets = load_i64(args + word.OFFSETS) + 8 * entry
        begin, end = load_i64(offsets), load_i64(offsets + 8)
        planes = 2 if end - begin <= load_i64(args + word.BOTH_PLANES) else 1
        chunk, step = load_i64(args + word.CHUNK), 4 * WIDTH * count
        outputs = min(WIDTH * count, load_i64(args + word.INTERMEDIATE) - WIDTH * start)
        last = WIDTH * (start + count) >= load_i64(args + word.INTERMEDIATE)
        filled = middle_padded - WIDTH * start if last else WIDTH * count
        ups = local + (chunk + LARGEST_TILE) * step if gated else local
        while begin < end:
            tokens = min(chunk, end - begin)
            rows = load_i64(args + word.INPUTS) + 8 * begin
            at = load_i64(record + 8) + start * block_bytes
            begin_rows(rows, tokens, planes, padded, panels)
            if gated:
                gates = load_i64(record) + start * block_bytes
                prefetch_run(at, HEAD)
                for b in range(count):
                    to = local + 4 * WIDTH * b
                    multiply(gates + b * block_bytes, records, rows, tokens, planes, padded, to, step, panels)
                prefetch_run(gates + count * block_bytes, HEAD)
            for b in range(count):
                to = ups + 4 * WIDTH * b
                multiply(at + b * block_bytes, records, rows, tokens, planes, padded, to, step, panels)
            end_rows(tokens)
            for t in range(tokens):
                gate, up = local + t * step, ups + t * step
                bias = 4 * WIDTH * start
                if gated and load_i64(record + 24) != 0:
                    add_vector(gate, outputs, load_i64(record + 24) + bias)
                if load_i64(record + 32) != 0:
                    add_vector(up, outputs, load_i64(record + 32) + bias)
                activate(gate, up, gate, outputs, alpha, limit)
                row = load_i64(load_i64(args + word.MIDDLES) + 8 * (begin + t))
                quantise(gate, outputs, row, middle_padded, WIDTH * start, filled)
            begin += tokens

    @specialised(key)
    def second(args: int, local: int, start: int, count: int) -> None:
        """Blocks start to start + count of the output columns, for every token: all experts, ascending."""
        panels, local = local, local + load_i64(args + word.PANELS_BYTES)
        records, padded = load_i64(args + word.DOWN_RECORDS), load_i64(args + word.MIDDLE_PADDED)
        hidden, chunk = load_i64(args + word.HIDDEN), load_i64(args + word.CHUNK)
        tokens_at, weights_at = load_i64(args + word.TOKENS), load_i64(args + word.WEIGHTS)
        out = load_i64(args + word.OUT) + 4 * WIDTH * start
        block_bytes, step = records * record_bytes, 4 * WIDTH * count
        columns = min(WIDTH * count, hidden - WIDTH * start)
        active = load_i64(args + word.ACTIVE)
        for entry in range(active):
            record = _record(args, entry)
            down, down_bias = load_i64(record + 16) + start * block_bytes, load_i64(record + 40)
            offsets = load_i64(args + word.OFFSETS) + 8 * entry
            begin, end = load_i64(offsets), load_i64(offsets + 8)
            planes = 2 if end - begin <= load_i64(args + word.BOTH_PLANES) else 1
            if entry + 1 < active:
                prefetch_run(load_i64(_record(args, entry + 1) + 16) + start * block_bytes, HEAD)
            while begin < end:
                tokens = min(chunk, end - begin)
                rows = load_i64(args + word.MIDDLES) + 8 * begin
                begin_rows(rows, tokens, planes, padded, panels)
                for b in range(count):
                    to = local + 4 * WIDTH * b
                    multiply(down + b * block_bytes, records, rows, tokens, planes, padded, to, step, panels)
                end_rows(tokens)
                for t in range(tokens):
                    y = local + t * step
                    if down_bias != 0:
                        add_vector(y, columns, down_bias + 4 * WIDTH * start)
                    token = load_i32(tokens_at + 4 * (begin + t))
                    weight = load_f32(weights_at + 4 * (begin + t))
                    add_scaled(out + 4 * token * hidden, columns, y, weight)
                begin += tokens

    def run(thread: int, args: int) -> None:
        local = load_i64(args + word.LOCAL) + thread * load_i64(args + word.LOCAL_BYTES)
        tokens, hidden = load_i64(args + word.TOKEN_COUNT), load_i64(args + word.HIDDEN)
        while True:
            token = fetch_add(args + word.NEXT_ROWS, 1)
            if token >= tokens:
                break
            row = load_i64(args + word.INPUT_BASE) + token * load_i64(args + word.INPUT_BYTES)
            x = load_i64(args + word.HIDDEN_AT) + 4 * hidden * token
            padded = load_i64(args + word.HIDDEN_PADDED)
            quantise(x, hidden, row, padded, 0, padded)
            fetch_add(args + word.DONE_ROWS, 1)
        wait_for_count(args + word.DONE_ROWS, tokens)
        blocks = (load_i64(args + word.INTERMEDIATE) + WIDTH - 1) // WIDTH
        most = load_i64(args + word.RUN)
        jobs, cuts = load_i64(args + word.FIRST_JOBS), load_i64(args + word.FIRST_CUTS)
        while True:
            job = fetch_add(args + word.NEXT_FIRST, 1)
            if job >= jobs:
                break
            at, end = load_i64(cuts + 8 * job), load_i64(cuts + 8 * job + 8)
            while at < end:
                entry = at // blocks
                start = at - entry * blocks
                count = min(most, end - at, blocks - start)
                first(args, local, entry, start, count)
                at += count
            fetch_add(args + word.DONE_FIRST, 1)
        wait_for_count(args + word.DONE_FIRST, jobs)
        jobs, cuts = load_i64(args + word.SECOND_JOBS), load_i64(args + word.SECOND_CUTS)
        while True:
            job = fetch_add(args + word.NEXT_SECOND, 1)
            if job >= jobs:
                break
            at, end = load_i64(cuts + 8 * job), load_i64(cuts + 8 * job + 8)
            while at < end:
                count = min(most, end - at)
                second(args, local, at, count)
                at += count
            fetch_add(args + word.DONE_SECOND, 1)
        wait_for_count(args + word.DONE_SECOND, jobs)

    return run
