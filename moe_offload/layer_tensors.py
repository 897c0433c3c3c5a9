"""One MoE layer's tensors on two devices: what the dispatcher's decisions do to them.

    export      hidden states and routing go to host memory, by a launch that writes page-locked memory
    on_device   launches that add experts' rows to the output on the device; which rows, they read from host memory
    on_cpu      the CPU kernels add theirs to an output in host memory
    join        a launch that adds both

Where there are kernels of ours (`device_experts.py`), export and join are one of them each, and few tokens keep their
activations and routing in a workspace on the device.

All four small tensors lie in one host arena for life, and are rewritten layer after layer. That is in order because the
host waits for the compute stream once a layer, in `export`: by then every launch of the layer before has read them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_offload.cpu_kernels.grouping import Groups, group_tokens
from moe_offload.cpu_layer import CpuLayer, PackedLayer
from moe_offload.device_experts import DeviceExperts
from moe_offload.gpu_kernels.fused_experts import FusedExperts, HostSide, export_layer, join
from moe_offload.gpu_kernels.graph import GraphedLayer
from moe_offload.transfer.accelerator import NOTHING as NO_WORK
from moe_offload.transfer.accelerator import Accelerator, Buffer, HostArena, Work, as_tensor

LEAST_TOKENS = 64
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # that kernels read


class LayerParts(NamedTuple):
    """What one layer's experts are computed with."""

    cpu: CpuLayer | PackedLayer
    device: DeviceExperts
    record_bytes: int
    flops_per_row: int
    num_experts: int


class _Staging(NamedTuple):
    """Room for up to `tokens` tokens: in the arena, but `out`."""

    tokens: int
    arena: HostArena
    hidden: Buffer  # f32 [T, H]
    choices: Buffer  # int64 [T, K]
    weights: Buffer  # f32 [T, K]
    row_tokens: Buffer  # int64 [R]
    row_weights: Buffer  # f32 [R]
    cpu_out: Buffer  # f32 [T, H]
    out: Buffer  # f32 [T, H] on the device
    work: Buffer | None  # the fused kernels' workspace, on the device


class LayerTensors:
    """Implements `dispatcher.LayerWork` for one layer after the other: `begin`, then the dispatcher, then `result`.

    slot: the first so many bytes of a slot. scratch: device memory that torch takes for experts with so many rows.
    workspace: that the fused kernels want for so many tokens with so many choices. Takes its memory for a few tokens at
    once, more when more come.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        slot: Callable[[int, int], Buffer],
        scratch: Callable[[int], int],
        workspace: Callable[[int, int], int],
        hidden_size: int,
        top_k: int,
    ) -> None:
        self._accelerator, self._slot, self._scratch, self._workspace = accelerator, slot, scratch, workspace
        self._reserved = 0
        self._hidden_size, self._top_k = hidden_size, top_k
        self._staging: _Staging | None = None
        self._room(LEAST_TOKENS, top_k)

    @staticmethod
    def device_bytes(tokens: int, hidden_size: int) -> int:
        """Device memory that so many tokens take."""
        return max(tokens, LEAST_TOKENS) * hidden_size * 4

    def begin(
        self,
        parts: LayerParts,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> Groups:
        """Export hidden_states [T, H] and the router's answer [T, K]; waits for the device. Returns the groups.

        Raises OutOfDeviceMemoryError when there is no room for the output of so many tokens.
        """
        tokens, top_k = top_k_index.shape
        room = self._room(tokens, top_k)
        accelerator = self._accelerator
        hidden_states, top_k_weights = hidden_states.detach(), top_k_weights.detach()

        self._few = few = parts.device.few(tokens, top_k)
        kernels, space = parts.device.kernels, None
        work_room: tuple[Buffer, ...] = ()
        if few is not None:
            assert room.work is not None
            space, work_room = parts.device.space(tokens, top_k), (room.work,)
        if kernels is not None:
            hidden_states, top_k_index, top_k_weights = _for_kernels(hidden_states, top_k_index, top_k_weights)

        def export(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *work: torch.Tensor) -> None:
            host = HostSide(
                as_tensor(hidden, torch.float32, *hidden_states.shape),
                as_tensor(index, torch.int64, tokens, top_k),
                as_tensor(weights, torch.float32, tokens, top_k),
            )
            if space is not None and few is not None:
                few.begin(space, work[0], hidden_states, top_k_index, top_k_weights, host)
            elif kernels is not None:
                to = host.hidden, host.index, host.weights
                export_layer(kernels, hidden_states, top_k_index, top_k_weights, parts.num_experts, to)
            else:
                _write(host.hidden, hidden_states)
                _write(host.index, top_k_index)
                _write(host.weights, top_k_weights)

        sent = hidden_states.numel() * 4 + 12 * tokens * top_k
        accelerator.launch(
            accelerator.compute, export, (), (room.hidden, room.choices, room.weights, *work_room),
            Work(link_bytes=sent, rows=(), launches=1), "export",
        )  # fmt: skip
        accelerator.compute.synchronize()
        self._parts, self._module, self._hidden_states = parts, module, hidden_states
        self._shape = tokens, top_k
        self._groups = groups = group_tokens(
            _host(room.choices, np.int64, tokens, top_k), _host(room.weights, np.float32, tokens, top_k),
            parts.num_experts,
        )  # fmt: skip
        if few is None:  # few tokens' kernels find their rows in the routing on the device
            rows = len(groups.tokens)
            _host(room.row_tokens, np.int64, rows, write=True)[:] = groups.tokens
            _host(room.row_weights, np.float32, rows, write=True)[:] = groups.weights
        self._started = False
        return groups

    def host_inputs(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Hidden states [T, H] and choices [T, K] of the layer that began last, until the next one begins."""
        room = self._staging
        assert room is not None
        tokens, top_k = self._shape
        return (
            _host(room.hidden, np.float32, *self._hidden_states.shape),
            _host(room.choices, np.int64, tokens, top_k),
        )

    def on_device(self, positions: NDArray[np.int64], slots: Sequence[int]) -> None:
        """As of `LayerWork`."""
        room, groups, parts, x = self._staging, self._groups, self._parts, self._hidden_states
        assert room is not None
        ranges = [(int(groups.offsets[p]), int(groups.offsets[p + 1])) for p in positions]
        counts = [stop - start for start, stop in ranges]
        tokens, top_k = self._shape
        launches = parts.device.launches(len(counts), tokens, top_k)
        slots_read = [self._slot(slot, parts.record_bytes) for slot in slots]
        first, self._started = not self._started, True
        if self._few is not None:
            self._add_few(self._few, groups.experts[positions].tolist(), slots_read, counts, launches)
            return
        rows = len(groups.tokens)

        def add(tokens: torch.Tensor, weights: torch.Tensor, *more: torch.Tensor) -> None:
            *records, out = more
            y = as_tensor(out, torch.float32, *x.shape)
            if first:
                y.zero_()
            all_tokens, all_weights = as_tensor(tokens, torch.int64, rows), as_tensor(weights, torch.float32, rows)
            for (start, stop), record in zip(ranges, records, strict=True):
                parts.device.many.add_rows(y, x, all_tokens[start:stop], all_weights[start:stop], record)

        reads = [room.row_tokens.part(0, 8 * rows), room.row_weights.part(0, 4 * rows), *slots_read]
        work = Work(parts.record_bytes, parts.flops_per_row, counts, launches=launches)
        self._accelerator.launch(self._accelerator.compute, add, reads, (room.out,), work, "experts")

    def _add_few(
        self, few: FusedExperts, experts: list[int], slots: list[Buffer], counts: list[int], launches: int
    ) -> None:
        room, parts = self._staging, self._parts
        assert room is not None and room.work is not None
        space = parts.device.space(*self._shape)

        def add(*buffers: torch.Tensor) -> None:
            *records, memory = buffers
            few.add(space, memory, experts, records, most_rows=max(counts))

        work = Work(parts.record_bytes, parts.flops_per_row, counts, launches=launches)
        self._accelerator.launch(self._accelerator.compute, add, slots, (room.work,), work, "experts")

    def run_whole(
        self,
        parts: LayerParts,
        table: torch.Tensor,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        graphs: dict[tuple[int, int, int], GraphedLayer] | None = None,
    ) -> torch.Tensor:
        """The output [T, H] of a layer of few tokens whose experts' addresses are in `table`: see `whole_layers.py`.
        Waits for nothing. graphs: of this layer, by tokens, choices and workspace; None to launch one by one.
        """
        tokens, top_k = top_k_index.shape
        few, room, space = parts.device.few(tokens, top_k), self._room(tokens, top_k), parts.device.space(tokens, top_k)
        assert few is not None and room.work is not None
        given = _for_kernels(hidden_states.detach(), top_k_index, top_k_weights.detach())
        outs: list[torch.Tensor] = []

        def run(memory: torch.Tensor) -> None:
            def layer(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
                few.begin(space, memory, hidden, index, weights)
                few.add_by_table(space, memory, table)
                few.join(space, memory, out)

            if graphs is None:
                outs.append(torch.empty_like(given[0], memory_format=torch.contiguous_format))
                layer(*given, outs[0])
                return
            key = tokens, top_k, memory.data_ptr()
            if key not in graphs:
                graphs[key] = GraphedLayer(layer, *given)
            outs.append(graphs[key](*given))

        rows = np.bincount(given[1].flatten().numpy()) if self._accelerator.simulated else np.zeros(0, np.int64)
        work = Work(parts.record_bytes, parts.flops_per_row, rows[rows > 0], launches=4)
        self._accelerator.launch(self._accelerator.compute, run, (), (room.work,), work, "experts")
        return outs[0]

    def look_at(self, buffers: Sequence[Buffer], function: Callable[..., None]) -> None:
        """Call function with the buffers' tensors, of which it keeps none."""
        self._accelerator.launch(self._accelerator.compute, function, buffers, (), NO_WORK, "look")

    def on_cpu(self, positions: NDArray[np.int64]) -> None:
        """As of `LayerWork`."""
        room, parts = self._staging, self._parts
        assert room is not None
        chosen = self._groups if len(positions) == len(self._groups.experts) else self._groups.select(positions)
        shape = tuple(self._hidden_states.shape)
        out = torch.from_numpy(_host(room.cpu_out, np.float32, *shape, write=True))
        hidden = torch.from_numpy(_host(room.hidden, np.float32, *shape)).to(self._hidden_states.dtype)

        def run() -> None:
            out.zero_()
            parts.cpu(self._module, chosen, hidden, out)

        work = Work(parts.record_bytes, parts.flops_per_row, np.diff(chosen.offsets))
        self._accelerator.run_host(run, work, "experts")

    def join(self, *, cpu: bool) -> None:
        """As of `LayerWork`."""
        room, hidden_states = self._staging, self._hidden_states
        assert room is not None
        self.result = result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        share = room.cpu_out.part(0, 4 * result.numel())  # what lies behind may never have been written
        kernels, few, started = self._parts.device.kernels, self._few, self._started
        of_device = room.work if few is not None else room.out
        assert of_device is not None
        reads = [buffer for buffer, used in ((of_device, started), (share, cpu)) if used]

        def add(*outs: torch.Tensor) -> None:
            shares = list(outs)
            of_cpu = as_tensor(shares.pop(), torch.float32, *result.shape) if cpu else None
            if few is not None and started:
                few.join(self._parts.device.space(*self._shape), shares[0], result, of_cpu)
                return
            tiled = as_tensor(shares[0], torch.float32, *result.shape) if started else None
            if kernels is not None:
                join(kernels, result, of_cpu, tiled)
            elif tiled is None:
                result.zero_() if of_cpu is None else result.copy_(of_cpu)
            else:
                result.copy_(tiled if of_cpu is None else tiled + of_cpu)

        work = Work(link_bytes=4 * result.numel() if cpu else 0, rows=(), launches=1)
        self._accelerator.launch(self._accelerator.compute, add, reads, (), work, "join")

    def _room(self, tokens: int, top_k: int) -> _Staging:
        if self._staging is not None and self._staging.tokens >= tokens and top_k <= self._top_k:
            return self._staging
        self.close()
        self._top_k = max(self._top_k, top_k)
        size = max(tokens, LEAST_TOKENS)
        state, choices = size * self._hidden_size * 4, size * self._top_k
        scratch = self._scratch(size)
        self._accelerator.reserve(scratch, "scratch memory of the experts")
        self._reserved = scratch
        out, work = self._accelerator.allocate(state, "output of the experts"), None
        sizes = {
            "hidden states": state, "routing": 8 * choices, "routing weights": 4 * choices,
            "row tokens": 8 * choices, "row weights": 4 * choices, "output of the CPU's experts": state,
        }  # fmt: skip
        try:
            if workspace := self._workspace(size, self._top_k):
                work = self._accelerator.allocate(workspace, "workspace of the experts")
            arena = self._accelerator.host_arena(sum(nbytes + 4096 for nbytes in sizes.values()))
        except MemoryError:
            for buffer in (out, work):
                if buffer is not None:
                    self._accelerator.free(buffer)
            raise
        buffers = [arena.take(nbytes, name) for name, nbytes in sizes.items()]
        self._staging = staging = _Staging._make((size, arena, *buffers, out, work))
        return staging

    def forget(self) -> None:
        """The accelerator is closed, and all its memory with it: keep none of it alive."""
        self._staging, self._reserved = None, 0

    def close(self) -> None:
        """Give the memory back; what uses it must have passed."""
        if self._staging is not None:
            self._accelerator.compute.synchronize()
            self._accelerator.free(self._staging.out)
            if self._staging.work is not None:
                self._accelerator.free(self._staging.work)
            self._staging.arena.close()
            self._staging = None
        self._accelerator.reserve(-self._reserved, "scratch memory of the experts")
        self._reserved = 0


def _host(buffer: Buffer, dtype: Any, *shape: int, write: bool = False) -> NDArray[Any]:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not count:
        return np.empty(shape, dtype)
    found: NDArray[Any] = buffer.part(0, count).host(write=write).view(dtype).reshape(shape)
    return found


def _write(target: torch.Tensor, value: torch.Tensor) -> None:
    """By a kernel: between equal types `copy_` would be a copy, behind those of whole experts."""
    torch.add(value.to(target.dtype), 0, out=target)


def _for_kernels(
    hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As they nearly always are already: dense rows, int64 choices, types that kernels know."""
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    if weights.dtype not in _FLOATS:
        weights = weights.to(torch.float32)
    return hidden_states, index.to(torch.int64).contiguous(), weights.contiguous()
