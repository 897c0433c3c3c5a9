"""Experts of one layer on the device for few tokens, in as few launches as can be.

    begin   one launch: hidden states and routing to host memory, if wanted; activations and routing to the workspace
    add     two launches (gate and up with the activation; down) for up to 64 experts, wherever their slots are
    join    one launch: each token's shares, weighed and summed in a fixed order, with the CPU's

No sum depends on the order in which threads run, so equal inputs give equal bits. Weights are read as they lie in a
slot; products with quantised ones are exact integers (`planes.cuh`), of stored ones f32. `add` finds the rows of an
expert in the routing that `begin` left on the device: it is told experts and slots only, or a table of slot addresses
that is read when the kernel runs, for graphs that outlive a change of residency.

The workspace is a device buffer of `Workspace.nbytes` that the caller owns. Everything goes to the current stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.gpu_kernels.activation import activation_arguments
from moe_offload.gpu_kernels.launch import Kernels, Macros
from moe_offload.gpu_kernels.torch_experts import GATED_ONLY, DeviceActivation, DeviceRecord
from moe_offload.gpu_kernels.unpack import ELEMENT_TYPES, PACKED_TYPES, matrix_bytes

MAX_JOBS = 64  # experts of one launch, as of routed.cuh
MAX_PAIRS = 1024  # (token, choice) pairs
WARPS = 8
TILES = (1, 4)  # rows that share what was read
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as of common.cuh
_JOBS = np.dtype([("slots", np.uint64, MAX_JOBS), ("experts", np.int32, MAX_JOBS)])
_THREADS = 256

VARIANTS: dict[str, list[Macros]] = {
    "packed_experts.cu": [
        (("FORMAT", number), ("TILE", tile)) for number in range(len(PACKED_TYPES)) for tile in TILES
    ],
    "stored_experts.cu": [(("ELEMENT", number), ("TILE", tile)) for number in TYPES.values() for tile in TILES],
    "routing.cu": [()],
}


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the parts of a workspace lie, for T tokens with K choices each: bytes from its begin.

    expert int32, weight f32, done int32 [T * K]; x and h: rows of activations, x_stride and h_stride bytes apart;
    partial f32 [T * K, H].
    """

    tokens: int
    top_k: int
    x_stride: int
    h_stride: int
    expert: int
    weight: int
    done: int
    x: int
    h: int
    partial: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class HostSide:
    """Where `begin` exports to: hidden f32 [T, H], index int64 and weights f32 [T, K], reachable for the device."""

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def fits(tokens: int, top_k: int) -> bool:
    """Whether so many tokens can be given to `FusedExperts`."""
    return 0 < tokens * top_k <= MAX_PAIRS


class FusedExperts:
    """Runs experts whose records have one layout; E = num_experts of a layer."""

    def __init__(self, record: DeviceRecord, activation: DeviceActivation, kernels: Kernels, num_experts: int) -> None:
        if activation.kind in GATED_ONLY and not record.gated:
            raise ValueError(f"{activation.kind} needs a gate, and these experts have none")
        if record.dtype not in (*PACKED_TYPES, *ELEMENT_TYPES):
            raise ValueError(f"experts of {record.dtype} have no kernel; use int8, int4, mxfp4, bf16, f16 or f32")
        self.record, self.num_experts = record, num_experts
        self._packed = record.dtype in PACKED_TYPES
        self._activation = activation_arguments(activation)
        self._kernels = kernels
        hidden, inner = record.hidden_size, record.intermediate_size
        gate, up, down, *biases = record.offsets
        gate_bias, up_bias, down_bias = (np.int64(at if record.bias else -1) for at in biases)
        gate_at = np.int64(gate if record.gated else -1)
        sizes = np.int32(hidden), np.int32(inner)
        middle: tuple[np.generic, ...] = (gate_at, np.uint64(up), gate_bias, up_bias, *self._activation)
        last: tuple[np.generic, ...] = (np.uint64(down), down_bias)
        if self._packed:
            group = np.int32(record.group)
            middle = (group, self._block_bytes(hidden), *middle)
            last = (group, self._block_bytes(inner), *last)
        self._gate_up_sizes, self._down_sizes = (*sizes, *middle), (*sizes, *last)
        self._last: _Parts | None = None

    def _block_bytes(self, cols: int) -> np.uint64:
        return np.uint64(matrix_bytes(self.record.dtype, 32, cols, self.record.group))

    def compile(self) -> None:
        """Compile all kernels now, rather than when the first token needs them. KernelError where that fails."""
        for name in ("export_layer", "join"):
            self._kernels.get("routing.cu", name)
        for tile in TILES:
            for name in ("gate_up", "down"):
                self._kernels.get(*self._named(name, tile))

    def workspace(self, tokens: int, top_k: int) -> Workspace:
        """The workspace for T tokens with K choices each. Raises ValueError for more than `MAX_PAIRS` pairs."""
        pairs = tokens * top_k
        if not fits(tokens, top_k):
            raise ValueError(
                f"{tokens} tokens with {top_k} experts each are {pairs} pairs: 1 to {MAX_PAIRS} can be run"
            )
        hidden, inner = _up(self.record.hidden_size, 32), _up(self.record.intermediate_size, 32)
        x_stride, h_stride = (_up(2 * size + size // 8 if self._packed else 4 * size, 64) for size in (hidden, inner))
        offsets, end = [], 0
        for size in (*[4 * pairs] * 3, tokens * x_stride, pairs * h_stride, 4 * pairs * self.record.hidden_size):
            offsets.append(end)
            end += _up(size, 256)
        expert, weight, done, x, h, partial = offsets
        return Workspace(tokens, top_k, x_stride, h_stride, expert, weight, done, x, h, partial, end)

    def begin(
        self,
        space: Workspace,
        memory: torch.Tensor,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        host: HostSide | None = None,
    ) -> None:
        """Keep hidden [T, H] (dense rows) and the routing, index int64 and weights [T, K], in the workspace `memory`,
        and write them to `host`.
        """
        work = self._parts(space, memory)
        export = (None, None, None) if host is None else (host.hidden, host.index, host.weights)
        activations = work.x, work.x_stride, np.int32(self._packed)
        pairs = work.expert, work.weight, work.done
        export_layer(self._kernels, hidden, index, weights, self.num_experts, export, (*activations, *pairs))

    def add(
        self,
        space: Workspace,
        memory: torch.Tensor,
        experts: Sequence[int],
        slots: Sequence[torch.Tensor],
        *,
        most_rows: int | None = None,
    ) -> None:
        """Run these experts, whose records are in `slots`, uint8, for the rows that are routed to them.

        most_rows: no expert has more of them (None: not known).
        """
        for slot in slots:
            if slot.dtype != torch.uint8 or slot.numel() < self.record.nbytes:
                raise ValueError(f"a slot of {slot.numel()} {slot.dtype} holds no record of {self.record.nbytes} bytes")
        tile = TILES[0] if (space.tokens if most_rows is None else most_rows) == 1 else TILES[-1]
        for first in range(0, len(experts), MAX_JOBS):
            jobs = np.zeros(1, _JOBS)
            some = slice(first, first + MAX_JOBS)
            count = len(experts[some])
            jobs["experts"][0, :count] = experts[some]
            jobs["slots"][0, :count] = [slot.data_ptr() for slot in slots[some]]
            self._run(space, memory, jobs, None, count, tile)

    def add_by_table(self, space: Workspace, memory: torch.Tensor, table: torch.Tensor) -> None:
        """Run all experts that are routed to and that have a slot. table: int64 [E] on the device, the address of each
        expert's slot, 0 without one; it and the routing are read when the kernels run.
        """
        if table.dtype != torch.int64 or table.numel() != self.num_experts:
            raise ValueError(f"the table is int64 of {self.num_experts}, got {table.dtype} of {table.numel()}")
        tile = TILES[0] if space.tokens == 1 else TILES[-1]
        self._run(space, memory, np.zeros(1, _JOBS), table, space.tokens * space.top_k, tile)

    def join(
        self,
        space: Workspace,
        memory: torch.Tensor,
        out: torch.Tensor,
        cpu: torch.Tensor | None = None,
        tiled: torch.Tensor | None = None,
    ) -> None:
        """out [T, H] = cpu + tiled + what ran here; cpu and tiled f32 [T, H], of which cpu may lie in host memory."""
        work = self._parts(space, memory)
        join(self._kernels, out, cpu, tiled, (work.partial, work.weight, work.done), space.top_k)

    def _run(
        self,
        space: Workspace,
        memory: torch.Tensor,
        jobs: NDArray[Any],
        table: torch.Tensor | None,
        count: int,
        tile: int,
    ) -> None:
        record, work = self.record, self._parts(space, memory)
        self._kernels.get(*self._named("gate_up", tile))(
            (_up(record.intermediate_size, 32) // 32, count), (32 * self._warps(record.hidden_size),),
            (jobs, table, work.expert, work.pairs, work.top_k, work.x, work.x_stride, work.h, work.h_stride, work.done,
             *self._gate_up_sizes),
        )  # fmt: skip
        self._kernels.get(*self._named("down", tile))(
            (_up(record.hidden_size, 32) // 32, count), (32 * self._warps(record.intermediate_size),),
            (jobs, table, work.expert, work.pairs, work.h, work.h_stride, work.partial, *self._down_sizes),
        )  # fmt: skip

    def _named(self, name: str, tile: int) -> tuple[str, str, Macros]:
        """The kernel of this format, as `Kernels.get` wants it."""
        dtype = self.record.dtype
        if self._packed:
            return "packed_experts.cu", name, (("FORMAT", PACKED_TYPES.index(dtype)), ("TILE", tile))
        return "stored_experts.cu", name, (("ELEMENT", TYPES[ELEMENT_TYPES[dtype]]), ("TILE", tile))

    def _parts(self, space: Workspace, memory: torch.Tensor) -> "_Parts":
        """Views are kept: making them takes the host longer than starting a kernel."""
        last = self._last
        if last is None or last.space is not space or last.memory is not memory:
            last = self._last = _Parts(space, memory)
        return last

    def _warps(self, cols: int) -> int:
        """Of a block of threads: packed matrices are divided among them by steps of 32 inputs, three at least each."""
        return min(WARPS, max(1, cols // 96)) if self._packed else WARPS


def export_layer(
    kernels: Kernels,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    host: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    work: tuple[Any, ...] = (None, np.int32(0), np.int32(0), None, None, None),
) -> None:
    """Launch `export_layer` of routing.cu; without `work` to host memory only."""
    tokens, size = hidden.shape
    if hidden.stride(1) != 1 or index.dtype != torch.int64 or not index.is_contiguous() or not weights.is_contiguous():
        raise ValueError(
            f"hidden states need dense rows (stride {hidden.stride()}), routing int64 ({index.dtype}) and dense tensors"
        )
    kernels.get("routing.cu", "export_layer")(
        (tokens,), (_THREADS,),
        (hidden, np.int64(hidden.stride(0)), np.int32(TYPES[hidden.dtype]), np.int32(size), index, weights,
         np.int32(TYPES[weights.dtype]), np.int32(index.shape[1]), np.int32(num_experts), *host, *work),
    )  # fmt: skip


def join(
    kernels: Kernels,
    out: torch.Tensor,
    cpu: torch.Tensor | None,
    tiled: torch.Tensor | None,
    shares: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
    top_k: int = 0,
) -> None:
    """Launch `join` of routing.cu; `shares`: partial, weight and done of a workspace."""
    if not out.is_contiguous():
        raise ValueError(f"the output must be dense, its strides are {out.stride()}")
    tokens, size = out.shape
    kernels.get("routing.cu", "join")(
        (tokens, -(-size // _THREADS)), (_THREADS,),
        (out, np.int32(TYPES[out.dtype]), np.int32(size), cpu, tiled, *shares, np.int32(top_k)),
    )  # fmt: skip


class _Parts:
    """A workspace as launches take it."""

    __slots__ = (
        "space", "memory", "expert", "weight", "done", "x", "h", "partial", "x_stride", "h_stride", "pairs", "top_k",
    )  # fmt: skip

    def __init__(self, space: Workspace, memory: torch.Tensor) -> None:
        if memory.dtype != torch.uint8 or memory.numel() < space.nbytes:
            raise ValueError(f"the workspace needs {space.nbytes} bytes, {memory.numel()} {memory.dtype} were given")
        self.space, self.memory = space, memory
        self.expert, self.weight, self.done = memory[space.expert :], memory[space.weight :], memory[space.done :]
        self.x, self.h, self.partial = memory[space.x :], memory[space.h :], memory[space.partial :]
        self.x_stride, self.h_stride = np.int32(space.x_stride), np.int32(space.h_stride)
        self.pairs, self.top_k = np.int32(space.tokens * space.top_k), np.int32(space.top_k)
