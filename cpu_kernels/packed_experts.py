"""The experts of one layer in the packed layout: out += weight * expert(hidden)."""

import struct
import threading
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import packed_block as word
from moe_offload.cpu_kernels.activation_rows import arithmetic_for, row_bytes
from moe_offload.cpu_kernels.amx import tile_mode
from moe_offload.cpu_kernels.grouping import Groups
from moe_offload.cpu_kernels.kernel_cache import compile_job, compiled
from moe_offload.cpu_kernels.layout import Activation, ActivationKind
from moe_offload.cpu_kernels.memory import load_i64, store_i64
from moe_offload.cpu_kernels.packed_job import LARGEST_TILE, make_packed_job
from moe_offload.cpu_kernels.packed_layout import WIDTH, ExpertRecord, PackedMatrix
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team, aligned_bytes
from moe_offload.cpu_kernels.tile_product import MOST_BY_VECTORS, panels_bytes
from moe_offload.cpu_kernels.tiles import TileMode

Activations = Literal["auto", "int16", "int8", "f32"]

LINE = 64
CHUNK = 64  # rows of an expert taken at once: their integers, 4 KB each for H = 2048, stay in the core's cache
RUN = 8  # blocks of a matrix computed before its partner's with CHUNK rows; a multiple of every group
LONGEST_RUN = 64  # ... with a row or two: memory is read best in one stream (Zen 4: 4 % faster than in runs of 8)
# With more rows than this an expert is bound by arithmetic, and the second plane would double it.
AUTO_ROWS = 4
BOTH_PLANES = {"auto": AUTO_ROWS, "int16": 1 << 62, "int8": 0, "f32": 0}
# ... but weights that were rounded to 4 bits err by 8e-2 themselves, against 1e-2 of int8 activations: there the second
# plane is worth what is free, and it is free for one row (two rows take 20 % longer with it, four 50 %).
AUTO_ROWS_INT4 = 1
_compiling = threading.Lock()


def both_planes(dtype: str, activations: Activations) -> int:
    """Up to how many rows activations go in in both planes."""
    return AUTO_ROWS_INT4 if (dtype, activations) == ("int4", "auto") else BOTH_PLANES[activations]


class _Shares(NamedTuple):
    """How the work is cut. It changes who computes a number, never the number."""

    first: NDArray[np.int64]  # cuts between the jobs of phase 2
    second: NDArray[np.int64]  # ... and of phase 3


def guided_cuts(count: int, threads: int, unit: int = 1) -> NDArray[np.int64]:
    """0 = cuts[0] < ... < cuts[-1] = count, multiples of `unit`: shares of a run of `count` blocks.

    Each job is a share of what is left: long ones first, because memory is read best in long runs, and short ones
    last, so that threads finish together (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """
    cuts = [0]
    while cuts[-1] < count:
        left = count - cuts[-1]
        size = max(1, 3 * left // (4 * threads * unit)) * unit
        cuts.append(min(count, cuts[-1] + size))
    return np.array(cuts, np.int64)


@compiled(
    "int64(int64, int64[::1], Array(int64,2,'C',readonly=True), int32[::1], int64[::1],"
    " int32[::1], float32[::1], Array(float32,2,'C',readonly=True), float32[:,::1], int64, int64, int64, int64[::1],"
    " int64[::1])"
)
def _fill(
    args: int,
    constants: NDArray[np.int64],
    table: NDArray[np.int64],
    experts: NDArray[np.int32],
    offsets: NDArray[np.int64],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
    hidden: NDArray[np.float32],
    out: NDArray[np.float32],
    chunk: int,
    run: int,
    local: int,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> int:
    """Write the argument block and the lists behind it; not 0 says what is wrong."""
    for counter in range(0, word.COUNTERS, LINE):
        store_i64(0, args + counter)
    for i in range(constants.size):
        store_i64(constants[i], args + word.CONSTANTS + 8 * i)
    store_i64(table.ctypes.data, args + word.TABLE)
    store_i64(experts.ctypes.data, args + word.EXPERTS)
    store_i64(offsets.ctypes.data, args + word.OFFSETS)
    store_i64(tokens.ctypes.data, args + word.TOKENS)
    store_i64(weights.ctypes.data, args + word.WEIGHTS)
    store_i64(hidden.ctypes.data, args + word.HIDDEN_AT)
    store_i64(out.ctypes.data, args + word.OUT)
    store_i64(experts.size, args + word.ACTIVE)
    store_i64(hidden.shape[0], args + word.TOKEN_COUNT)
    store_i64(chunk, args + word.CHUNK)
    store_i64(run, args + word.RUN)
    store_i64(local, args + word.LOCAL_BYTES)
    store_i64(first.size - 1, args + word.FIRST_JOBS)
    store_i64(first.ctypes.data, args + word.FIRST_CUTS)
    store_i64(second.size - 1, args + word.SECOND_JOBS)
    store_i64(second.ctypes.data, args + word.SECOND_CUTS)
    for a in range(experts.size):
        expert = experts[a]
        if expert < 0 or expert >= table.shape[0]:
            return 1
        if table[expert, 1] == 0 or table[expert, 2] == 0:
            return 2
    rows = tokens.size
    listed = rows + LARGEST_TILE
    inputs = args + word.BYTES
    middles = inputs + 8 * listed
    row_at = (middles + 8 * listed + LINE - 1) // LINE * LINE
    row_size, middle_size = load_i64(args + word.ROW_BYTES), load_i64(args + word.MIDDLE_BYTES)
    middle_at = row_at + hidden.shape[0] * row_size
    store_i64(inputs, args + word.INPUTS)
    store_i64(middles, args + word.MIDDLES)
    store_i64(row_at, args + word.INPUT_BASE)
    store_i64(row_size, args + word.INPUT_BYTES)
    store_i64(middle_at + rows * middle_size, args + word.LOCAL)
    for row in range(rows):
        token = tokens[row]
        if token < 0 or token >= hidden.shape[0]:
            return 3
        store_i64(row_at + token * row_size, inputs + 8 * row)
        store_i64(middle_at + row * middle_size, middles + 8 * row)
    for row in range(rows, listed):  # for tiles that reach behind the last row
        store_i64(row_at, inputs + 8 * row)
        store_i64(middle_at, middles + 8 * row)
    return 0


COMPILED = (_fill,)
_GROUP_ARRAYS = ((0, np.int32), (1, np.int64), (0, np.int32), (0, np.float32))
_MISTAKES = {
    1: "a group names an expert that the table has no row for",
    2: "the table has no address (0) for a matrix of an active expert",
    3: "a group names a token that `hidden` has no row for",
}


@cache
def _job(dtype: str, group: int, exact: bool, gated: bool, kind: ActivationKind, tiles: TileMode | None) -> Any:
    target = current_target()
    layout = PackedMatrix(WIDTH, group, dtype, group)  # type: ignore[arg-type]  # only its kind matters
    arithmetic = arithmetic_for(dtype, exact, target)
    key = f"packed-{dtype}-{group}-{arithmetic}-{'gated' if gated else 'plain'}-{kind}"
    if tiles is not None:
        key += f"-tiles-{tiles}"
    function = make_packed_job(key, layout, arithmetic, gated, kind, target, tiles)
    return compile_job(function, "void(int64,int64)", key)


class PackedExpertKernel:
    """Computes packed experts of one record layout and activation. Compiled (or loaded) with the first call.

    activations: precision of the activations inside the products.
        "int16"  15 bits and a sign, in groups as the weights' (relative error of a layer about 5e-5)
        "int8"   7 bits and a sign (about 1e-2), half the arithmetic
        "auto"   int16 for experts with up to AUTO_ROWS tokens (int4: one), which wait for memory anyway; else int8
        "f32"    no rounding, at about a third of the speed
    Weights of 8 bits on CPUs without a byte dot product take 16 bits in each of the first three.
    """

    def __init__(self, record: ExpertRecord, activation: Activation, activations: Activations = "auto") -> None:
        if activation.needs_gate and not record.gated:
            raise ValueError(f"{activation.kind!r} takes a gate, but the experts have none")
        if activations not in get_args(Activations):
            raise ValueError(f"activations={activations!r} is not one of {', '.join(get_args(Activations))}")
        self.record, self.activation, self.activations = record, activation, activations
        up, down = record.up_matrix, record.down_matrix
        arithmetic = arithmetic_for(record.dtype, activations == "f32", current_target())
        self._row_bytes = row_bytes(up.padded_cols, record.group, arithmetic)
        self._middle_bytes = row_bytes(down.padded_cols, record.group, arithmetic)
        self._tiles = tile_mode(record.dtype, record.group, arithmetic)
        planes = 2 if both_planes(record.dtype, activations) > MOST_BY_VECTORS else 1
        longest = max(up.padded_cols, down.padded_cols)
        self._panels_bytes = panels_bytes(CHUNK, longest, record.group, planes) if self._tiles is not None else 0
        constants = {
            word.HIDDEN: record.hidden_size,
            word.INTERMEDIATE: record.intermediate_size,
            word.HIDDEN_PADDED: up.padded_cols,
            word.MIDDLE_PADDED: down.padded_cols,
            word.ROW_BYTES: self._row_bytes,
            word.MIDDLE_BYTES: self._middle_bytes,
            word.UP_RECORDS: up.records,
            word.DOWN_RECORDS: down.records,
            word.ALPHA: float_bits(activation.alpha),
            word.LIMIT: float_bits(activation.limit),
            word.BOTH_PLANES: both_planes(record.dtype, activations),
            word.PANELS_BYTES: self._panels_bytes,
        }
        self._constants = np.array([constants[key] for key in sorted(constants)], np.int64)
        self._shares: dict[tuple[int, int], _Shares] = {}
        self._compiled: Any = None

    def load(self) -> None:
        """Compile the kernel or load it from the cache."""
        record = self.record
        with _compiling:
            self._compiled = _job(
                record.dtype, record.group, self.activations == "f32", record.gated, self.activation.kind, self._tiles
            )

    def __call__(
        self,
        table: NDArray[np.int64],
        groups: Groups,
        hidden: NDArray[np.float32],
        out: NDArray[np.float32],
        team: Team,
    ) -> None:
        """out[token] += weight * expert(hidden[token]) for every row of `groups`.

        table [E, 6]: addresses of gate, up, down and their f32 biases; 0 where absent. hidden, out [T, H]. The caller
        keeps the memory behind the addresses mapped. Raises ValueError for arguments that do not fit together.
        """
        active, rows = groups.experts.size, groups.tokens.size
        if active == 0:
            return
        if hidden.shape != out.shape or hidden.shape[1] != self.record.hidden_size:
            width = self.record.hidden_size
            raise ValueError(f"hidden {hidden.shape} and out {out.shape} must be [T, {width}]")
        if self._compiled is None:
            self.load()
        first, second = self._shares_for(team.threads, active)
        chunk, run, local = self._own(len(hidden))
        size = word.BYTES + 3 * LINE + (rows + LARGEST_TILE) * 16 + rows * self._middle_bytes
        size += len(hidden) * self._row_bytes + team.threads * local
        with team.lock:
            args = team.scratch(size)
            mistake = _fill(
                args, self._constants, table, groups.experts, groups.offsets, groups.tokens,
                groups.weights, hidden, out, chunk, run, local, first, second,
            )  # fmt: skip
            if mistake:
                raise ValueError(_MISTAKES[mistake])
            team.launch(self._compiled.address, args)

    @property
    def job(self) -> int:
        """Address of the compiled job, for a chain of stages."""
        if self._compiled is None:
            self.load()
        address: int = self._compiled.address
        return address

    @property
    def cut_blocks(self) -> tuple[int, int]:
        """Blocks of an expert's first matrices, and how many of them a job takes at least: for `route.CutsTable`."""
        return self.record.up_matrix.blocks, max(1, self.record.group // WIDTH)

    def prepare(
        self,
        table: NDArray[np.int64],
        tokens: int,
        choices: int,
        hidden: NDArray[np.float32],
        out: NDArray[np.float32],
        threads: int,
    ) -> tuple[NDArray[np.uint8], Groups, object]:
        """The argument block of a stage whose groups are not known yet: a stage before it writes them (route.py).

        Returns the block's memory, the groups, and what has to live as long. hidden, out [T, H] stay where they are.
        """
        rows = tokens * choices
        first, second = self._shares_for(threads, min(rows, len(table)))
        chunk, run, local = self._own(tokens)
        size = word.BYTES + 3 * LINE + (rows + LARGEST_TILE) * 16 + rows * self._middle_bytes
        memory = aligned_bytes(size + tokens * self._row_bytes + threads * local)
        groups = empty_groups(rows)
        args = int(memory.ctypes.data)
        mistake = _fill(
            args, self._constants, table, groups.experts, groups.offsets, groups.tokens, groups.weights, hidden, out,
            chunk, run, local, first, second,
        )  # fmt: skip
        if mistake:
            raise ValueError(_MISTAKES[mistake])
        return memory, groups, (table, first, second)

    def _shares_for(self, threads: int, active: int) -> _Shares:
        shares = self._shares.get((threads, active))
        if shares is None:
            unit = self.record.group // WIDTH  # a job makes integers of what it computed: whole groups
            blocks = self.record.up_matrix.blocks
            # experts lie behind each other in units, so that no job begins in the middle of one
            first = guided_cuts(blocks * active, threads, unit if blocks % unit == 0 else blocks)
            second = guided_cuts(self.record.down_matrix.blocks, threads)
            shares = self._shares[threads, active] = _Shares(first, second)
        return shares

    def _own(self, tokens: int) -> tuple[int, int, int]:
        """Rows that a thread takes at once, blocks that it computes one after the other, bytes of memory this takes.

        The fewer rows, the more blocks, in the same memory. Tiles of the last few rows reach behind.
        """
        chunk = min(CHUNK, tokens)
        rows = chunk + LARGEST_TILE
        run = min(LONGEST_RUN, RUN * (CHUNK + LARGEST_TILE) // rows // RUN * RUN)
        results = rows * 4 * WIDTH * run * (2 if self.record.gated else 1)
        return chunk, run, self._panels_bytes + results + 2 * LINE


def empty_groups(rows: int) -> Groups:
    """Room for the groups of so many rows."""
    return Groups(*(np.zeros(rows + extra, kind) for extra, kind in _GROUP_ARRAYS))  # type: ignore[arg-type]


def float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")
