"""The experts of one layer: out += weight * expert(hidden), read in place from the checkpoint."""

import struct
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.column_job import make_column_job
from moe_offload.cpu_kernels.grouping import Groups
from moe_offload.cpu_kernels.kernel_cache import compile_job, compiled
from moe_offload.cpu_kernels.layout import (
    ELEMENT_BYTES,
    Activation,
    ActivationKind,
    ExpertLayout,
    WeightType,
)
from moe_offload.cpu_kernels.memory import TYPE_CODES, store_i64
from moe_offload.cpu_kernels.row_job import make_row_job
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import ThreadTeam, aligned_bytes

_CHUNK = 32  # rows of an expert taken at once
_FIRST_ROWS, _SECOND_ROWS = (8, 32), (16, 128)  # outputs of a job, at least and at most
_FIRST_COLUMNS, _SECOND_COLUMNS = (64, 512), (32, 512)
_JOBS_PER_THREAD = 8
_compiling = threading.Lock()


@compiled(
    "void(int64, Array(int64,2,'C',readonly=True), int32[::1], int64[::1], int32[::1],"
    " float32[::1], float32[:,::1], float32[:,::1], int64, int64, int64, int64)"
)
def _fill(  # type: ignore[no-untyped-def]
    args, table, experts, offsets, tokens, weights, hidden, out, lists, middle, middle_size, active
):
    store_i64(0, args + word.NEXT_FIRST)
    store_i64(0, args + word.DONE_FIRST)
    store_i64(0, args + word.NEXT_SECOND)
    store_i64(table.ctypes.data, args + word.TABLE)
    store_i64(experts.ctypes.data, args + word.EXPERTS)
    store_i64(offsets.ctypes.data, args + word.OFFSETS)
    store_i64(tokens.ctypes.data, args + word.TOKENS)
    store_i64(weights.ctypes.data, args + word.WEIGHTS)
    store_i64(out.ctypes.data, args + word.OUT)
    store_i64(active, args + word.ACTIVE)
    rows = tokens.size
    store_i64(lists, args + word.INPUTS)
    store_i64(lists + 8 * rows, args + word.MIDDLES)
    inputs = hidden.ctypes.data
    width = hidden.shape[1] * 4
    for row in range(rows):
        store_i64(inputs + tokens[row] * width, lists + 8 * row)
        store_i64(middle + row * middle_size, lists + 8 * (rows + row))


@cache
def _job(dtype: WeightType, gated: bool, transposed: bool, step: int, kind: ActivationKind) -> Any:
    lanes = current_target().lanes
    if transposed:
        function = make_column_job(dtype, gated, kind, step, lanes)
    else:
        function = make_row_job(dtype, gated, kind, lanes)
    shape = f"columns{step}" if transposed else "rows"
    key = f"{shape}-{dtype}-{'gated' if gated else 'plain'}-{kind}"
    return compile_job(function, "void(int64,int64)", key)


class ExpertKernel:
    """Computes experts of one layout and activation. Compiled (or loaded) with the first call."""

    def __init__(self, layout: ExpertLayout, activation: Activation) -> None:
        if activation.needs_gate and not layout.gated:
            raise ValueError(f"{activation.kind!r} takes a gate, but the layout has none")
        self.layout, self.activation = layout, activation
        # interleaved gate and up are read as one run of columns; any other step is not built
        if layout.transposed and layout.gate_up_step not in (1, 2):
            raise ValueError(f"gate_up_step must be 1 or 2, got {layout.gate_up_step}")
        if layout.gate_up_step == 2 and not layout.gated:
            raise ValueError("gate_up_step 2 means interleaved gates; this layout has no gate")
        self._block = aligned_bytes(word.BYTES)
        self._args: int = self._block.ctypes.data
        constants = {
            word.HIDDEN: layout.hidden_size,
            word.INTERMEDIATE: layout.intermediate_size,
            word.MIDDLE_BYTES: (layout.intermediate_size * 4 + 63) // 64 * 64,
            word.ROW_STRIDE: layout.row_stride * ELEMENT_BYTES[layout.dtype],
            word.BIAS_STEP: layout.bias_step,
            word.BIAS_CODE: TYPE_CODES[layout.bias_type],
            word.ALPHA: _float_bits(activation.alpha),
            word.LIMIT: _float_bits(activation.limit),
            word.CHUNK: _CHUNK,
        }
        for offset, value in constants.items():
            self._set(offset, value)
        self._tuned_for = 0

    def load(self) -> None:
        """Compile the kernel or load it from the cache."""
        layout = self.layout
        with _compiling:
            job = _job(
                layout.dtype,
                layout.gated,
                layout.transposed,
                layout.gate_up_step,
                self.activation.kind,
            )
        self._job = job  # keeps the machine code alive
        self._address: int = job.address

    def __call__(
        self,
        table: NDArray[np.int64],  # [E, 6] gate, up, down, gate bias, up bias, down bias
        groups: Groups,
        hidden: NDArray[np.float32],  # [T, H]
        out: NDArray[np.float32],  # [T, H]
        team: ThreadTeam,
    ) -> None:
        """out[token] += weight * expert(hidden[token]) for every row of `groups`.

        Each token's experts are added in the order of `groups`. The caller keeps the memory
        behind the table's addresses mapped; rows beyond `out` or experts beyond the table are
        the caller's bug and are not looked for.
        """
        active, rows = groups.experts.size, groups.tokens.size
        if active == 0:
            return
        layout = self.layout
        if hidden.shape != out.shape or hidden.shape[1] != layout.hidden_size:
            raise ValueError(
                f"hidden {hidden.shape} and out {out.shape} must be [T, {layout.hidden_size}]"
            )
        if not hasattr(self, "_address"):
            self.load()
        with team.lock:
            if self._tuned_for != team.threads:
                self._tune(team.threads)
            middle_size = (layout.intermediate_size * 4 + 63) // 64 * 64
            lists_size = (2 * rows * 8 + 63) // 64 * 64
            local_size = self._local_size
            scratch = team.scratch(lists_size + rows * middle_size + team.threads * local_size)
            middle = scratch + lists_size
            self._set(word.LOCAL, middle + rows * middle_size)
            _fill(
                self._args, table, groups.experts, groups.offsets, groups.tokens, groups.weights,
                hidden, out, scratch, middle, middle_size, active,
            )  # fmt: skip
            team.launch(self._address, self._args)

    def _tune(self, threads: int) -> None:
        """Sizes of the jobs: several for each thread, but not smaller than a useful stream."""
        layout = self.layout
        if layout.transposed:
            first, second = _FIRST_COLUMNS, _SECOND_COLUMNS
        else:
            first, second = _FIRST_ROWS, _SECOND_ROWS
        self._first = _share(layout.intermediate_size, threads * _JOBS_PER_THREAD // 4, *first)
        self._second = _share(layout.hidden_size, threads * _JOBS_PER_THREAD, *second)
        matrices = 2 if layout.gated else 1
        widest = max(matrices * self._first, self._second)
        self._local_size = (widest * _CHUNK * 4 + 127) // 64 * 64
        self._set(word.FIRST_BLOCK, self._first)
        self._set(word.SECOND_BLOCK, self._second)
        self._set(word.LOCAL_BYTES, self._local_size)
        self._tuned_for = threads

    def _set(self, offset: int, value: int) -> None:
        self._block[offset : offset + 8].view(np.int64)[0] = value


def _share(size: int, parts: int, least: int, most: int) -> int:
    """Outputs of one job: size / parts, in multiples of a cache line of f32."""
    wanted = (size // max(1, parts) + 15) // 16 * 16
    return max(least, min(most, wanted))


def _float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def warm_up(
    kernels: Iterable[ExpertKernel], progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Compile, or load from the cache, what these kernels need: progress(name, done, total)."""
    from moe_offload.cpu_kernels import grouping, team  # noqa: PLC0415

    wanted: list[tuple[str, Callable[[], Any]]] = [
        ("thread team", team._launch.load),
        ("thread team", team._work.load),
        ("grouping", grouping._count_and_place.load),
        ("arguments", _fill.load),
    ]
    for kernel in kernels:
        name = f"{kernel.layout.dtype} {kernel.activation.kind}"
        wanted.append((name, kernel.load))
    for done, (name, load) in enumerate(wanted):
        if progress is not None:
            progress(name, done, len(wanted))
        load()
    if progress is not None:
        progress("", len(wanted), len(wanted))
