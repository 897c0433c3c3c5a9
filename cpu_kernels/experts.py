"""The experts of one layer: out += weight * expert(hidden), read in place from the checkpoint."""

import struct
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.column_job import make_column_job
from moe_offload.cpu_kernels.grouping import COMPILED as GROUPING
from moe_offload.cpu_kernels.grouping import Groups
from moe_offload.cpu_kernels.kernel_cache import compile_job, compiled
from moe_offload.cpu_kernels.layout import (
    ELEMENT_BYTES,
    Activation,
    ActivationKind,
    ExpertLayout,
    WeightType,
)
from moe_offload.cpu_kernels.memory import TYPE_CODES, load_i64, store_i64
from moe_offload.cpu_kernels.packed_experts import COMPILED as PACKED
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel, empty_groups
from moe_offload.cpu_kernels.row_job import make_row_job
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import COMPILED as TEAM
from moe_offload.cpu_kernels.team import Team, aligned_bytes

LINE = 64
CHUNK = 32  # rows of an expert taken at once: 32 inputs of H = 2048 are 256 KiB
JOBS_PER_THREAD = 8
_compiling = threading.Lock()


class _Blocks(NamedTuple):
    """Sizes of the jobs. They change who computes a number, never the number."""

    first: int  # intermediate outputs
    second: int  # output columns
    local: int  # bytes of each thread's own memory


@compiled(
    "int64(int64, int64[::1], Array(int64,2,'C',readonly=True), int32[::1], int64[::1],"
    " int32[::1], float32[::1], Array(float32,2,'C',readonly=True), float32[:,::1],"
    " int64, int64, int64)"
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
    first: int,
    second: int,
    local: int,
) -> int:
    """Write the argument block and the lists behind it; not 0 says what is wrong."""
    for i in range(constants.size):
        store_i64(constants[i], args + word.CONSTANTS + 8 * i)
    for counter in range(0, word.COUNTERS, LINE):
        store_i64(0, args + counter)
    store_i64(table.ctypes.data, args + word.TABLE)
    store_i64(experts.ctypes.data, args + word.EXPERTS)
    store_i64(offsets.ctypes.data, args + word.OFFSETS)
    store_i64(tokens.ctypes.data, args + word.TOKENS)
    store_i64(weights.ctypes.data, args + word.WEIGHTS)
    store_i64(out.ctypes.data, args + word.OUT)
    store_i64(experts.size, args + word.ACTIVE)
    store_i64(first, args + word.FIRST_BLOCK)
    store_i64(second, args + word.SECOND_BLOCK)
    store_i64(local, args + word.LOCAL_BYTES)
    for a in range(experts.size):
        expert = experts[a]
        if expert < 0 or expert >= table.shape[0]:
            return 1
        if table[expert, 1] == 0 or table[expert, 2] == 0:
            return 2
    rows = tokens.size
    inputs = args + word.BYTES
    middles = inputs + 8 * rows
    middle = (middles + 8 * rows + LINE - 1) // LINE * LINE
    middle_bytes = load_i64(args + word.MIDDLE_BYTES)
    store_i64(inputs, args + word.INPUTS)
    store_i64(middles, args + word.MIDDLES)
    store_i64(middle + rows * middle_bytes, args + word.LOCAL)
    width = hidden.shape[1] * 4
    store_i64(hidden.ctypes.data, args + word.INPUT_BASE)
    store_i64(width, args + word.INPUT_BYTES)
    for row in range(rows):
        token = tokens[row]
        if token < 0 or token >= hidden.shape[0]:
            return 3
        store_i64(hidden.ctypes.data + token * width, inputs + 8 * row)
        store_i64(middle + row * middle_bytes, middles + 8 * row)
    return 0


_MISTAKES = {
    1: "a group names an expert that the table has no row for",
    2: "the table has no address (0) for a matrix of an active expert",
    3: "a group names a token that `hidden` has no row for",
}


@cache
def _job(dtype: WeightType, gated: bool, transposed: bool, step: int, kind: ActivationKind) -> Any:
    target = current_target()
    shape = f"columns{step}" if transposed else "rows"
    key = f"{shape}-{dtype}-{'gated' if gated else 'plain'}-{kind}"
    if transposed:
        function = make_column_job(key, dtype, gated, kind, step, target)
    else:
        function = make_row_job(key, dtype, gated, kind, target)
    return compile_job(function, "void(int64,int64)", key)


class ExpertKernel:
    """Computes experts of one layout and activation. Compiled (or loaded) with the first call."""

    def __init__(self, layout: ExpertLayout, activation: Activation) -> None:
        if activation.needs_gate and not layout.gated:
            raise ValueError(f"{activation.kind!r} takes a gate, but the layout has none")
        self.layout, self.activation = layout, activation
        self._middle_bytes = (layout.intermediate_size * 4 + LINE - 1) // LINE * LINE
        constants = {
            word.HIDDEN: layout.hidden_size,
            word.INTERMEDIATE: layout.intermediate_size,
            word.MIDDLE_BYTES: self._middle_bytes,
            word.ROW_STRIDE: layout.row_stride * ELEMENT_BYTES[layout.dtype],
            word.BIAS_STEP: layout.bias_step,
            word.BIAS_CODE: TYPE_CODES[layout.bias_type],
            word.ALPHA: _float_bits(activation.alpha),
            word.LIMIT: _float_bits(activation.limit),
            word.CHUNK: CHUNK,
        }
        self._constants = np.array([constants[key] for key in sorted(constants)], np.int64)
        self._blocks: dict[tuple[int, int], _Blocks] = {}
        self._compiled: Any = None

    def load(self) -> None:
        """Compile the kernel or load it from the cache."""
        layout = self.layout
        with _compiling:
            self._compiled = _job(
                layout.dtype,
                layout.gated,
                layout.transposed,
                layout.gate_up_step,
                self.activation.kind,
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

        table [E, 6]: addresses of gate, up, down, gate bias, up bias, down bias; 0 where absent.
        hidden, out [T, H]. Each token's experts are added in the order of `groups`. The caller
        keeps the memory behind the addresses mapped.
        """
        active, rows = groups.experts.size, groups.tokens.size
        if active == 0:
            return
        if hidden.shape != out.shape or hidden.shape[1] != self.layout.hidden_size:
            width = self.layout.hidden_size
            raise ValueError(f"hidden {hidden.shape} and out {out.shape} must be [T, {width}]")
        if self._compiled is None:
            self.load()
        first, second, local = self._blocks_for(team.threads, active)
        size = word.BYTES + 2 * LINE + rows * (16 + self._middle_bytes) + team.threads * local
        with team.lock:
            args = team.scratch(size)
            mistake = _fill(
                args, self._constants, table, groups.experts, groups.offsets, groups.tokens,
                groups.weights, hidden, out, first, second, local,
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
        """As of `PackedExpertKernel`; this kernel's threads find their shares themselves."""
        return 1, 1

    def prepare(
        self,
        table: NDArray[np.int64],
        tokens: int,
        choices: int,
        hidden: NDArray[np.float32],
        out: NDArray[np.float32],
        threads: int,
    ) -> tuple[NDArray[np.uint8], Groups, object]:
        """As `PackedExpertKernel.prepare`."""
        rows = tokens * choices
        first, second, local = self._blocks_for(threads, min(rows, len(table)))
        memory = aligned_bytes(word.BYTES + 2 * LINE + rows * (16 + self._middle_bytes) + threads * local)
        groups = empty_groups(rows)
        mistake = _fill(
            int(memory.ctypes.data), self._constants, table, groups.experts, groups.offsets, groups.tokens,
            groups.weights, hidden, out, first, second, local,
        )  # fmt: skip
        if mistake:
            raise ValueError(_MISTAKES[mistake])
        return memory, groups, table

    def _blocks_for(self, threads: int, active: int) -> _Blocks:
        blocks = self._blocks.get((threads, active))
        if blocks is None:
            blocks = self._blocks[threads, active] = self._choose_blocks(threads, active)
        return blocks

    def _choose_blocks(self, threads: int, active: int) -> _Blocks:
        """Several jobs for each thread, but none shorter than a useful stream through memory."""
        layout = self.layout
        height, width = layout.intermediate_size, layout.hidden_size
        if layout.transposed:
            # a long run in each row counts for more than an even share
            first = _share(height * active, threads * JOBS_PER_THREAD // 2, 128, height)
            second = _share(width, threads * 2, 64, width)
        else:
            first = _share(height * active, threads * JOBS_PER_THREAD, 8, 32)
            second = _share(width, threads * JOBS_PER_THREAD, 16, 128)
        widest = max(2 * first, second) if layout.gated else max(first, second)
        return _Blocks(first, second, (widest * CHUNK * 4 // LINE + 2) * LINE)


def _share(size: int, parts: int, least: int, most: int) -> int:
    """size / parts, in multiples of a cache line of f32, so that no two threads write one line."""
    per_line = LINE // 4
    wanted = (size // max(1, parts) + per_line - 1) // per_line * per_line
    return max(least, min(most, wanted))


def _float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def warm_up(
    kernels: Iterable[ExpertKernel | PackedExpertKernel], progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Compile, or load from the cache, all that these kernels need: progress(name, done, total).

    After this no call compiles. From the cache a kernel takes some 20 ms, else 2 to 5 s.
    """
    wanted: dict[str, list[Callable[[], object]]] = {
        "thread team": [part.load for part in TEAM],
        "routing": [part.load for part in GROUPING],
    }
    for kernel in kernels:
        if isinstance(kernel, PackedExpertKernel):
            wanted["packed arguments"] = [part.load for part in PACKED]
            name = f"{kernel.record.dtype} groups of {kernel.record.group} {kernel.activation.kind}"
        else:
            wanted["arguments"] = [_fill.load]
            shape = "transposed" if kernel.layout.transposed else "row-major"
            name = f"{kernel.layout.dtype} {shape} {kernel.activation.kind}"
        wanted.setdefault(name, []).append(kernel.load)
    for done, (name, loads) in enumerate(wanted.items()):
        if progress is not None:
            progress(name, done, len(wanted))
        for load in loads:
            load()
    if progress is not None:
        progress("", len(wanted), len(wanted))
