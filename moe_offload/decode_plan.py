"""A decoder layer's step as a chain of stages, prepared once for a number of tokens and run for every step.

    qkv        norm, then the three projections
    heads      norm and rotary embedding of queries and keys; new keys and values into the cache
    attention  over the cache in host memory
    output     projection, residual
    router     norm, then the router's logits       \\
    route      the experts of each token             |  where the block is a router and packed experts alone; other
    experts    added to the residual                /   blocks run as their own module

Memory: buffers of vectors are shared by all layers of a model (`StepBuffers`), blocks belong to a layer. Whoever runs a
plan holds the buffers' lock.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_offload.cpu_kernels import attention_block, experts_block, heads, matrix_block, route
from moe_offload.cpu_kernels.attention import AttentionShape, DecodeAttention, Strides
from moe_offload.cpu_kernels.heads import HeadsStage, heads_job
from moe_offload.cpu_kernels.layout import WeightType
from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel
from moe_offload.cpu_kernels.packed_experts import Activations
from moe_offload.cpu_kernels.packed_layout import StoredType
from moe_offload.cpu_kernels.route import CutsTable, RouteStage, route_job
from moe_offload.cpu_kernels.stages import Chain, Stage
from moe_offload.cpu_kernels.team import Team, aligned_bytes
from moe_offload.cpu_layer import CpuLayer, PackedLayer
from moe_offload.decode_modules import WEIGHT_TYPES, AttentionModules, RouterModule, Snapshot
from moe_offload.kv_room import Room
from moe_offload.models.packed_linear import PackedLinear

Experts = CpuLayer | PackedLayer  # with a kernel


class Source(NamedTuple):
    """Where a linear layer's matrix lies, and in which format."""

    dtype: StoredType
    group: int
    address: int
    outputs: int
    bias: int  # address of f32


class StepBuffers:
    """Vectors of T tokens that all layers of a model take turns in, f32."""

    def __init__(self, tokens: int, hidden: int, q_width: int, kv_width: int, experts: int) -> None:
        self.tokens = tokens
        self.lock = threading.Lock()
        self.x, self.after, self.normed, self.out = (np.zeros((tokens, hidden), np.float32) for _ in range(4))
        self.queries, self.mixed = (np.zeros((tokens, q_width), np.float32) for _ in range(2))
        self.keys, self.values = (np.zeros((tokens, kv_width), np.float32) for _ in range(2))
        self.logits = np.zeros((tokens, max(experts, 1)), np.float32)
        self.lengths, self.starts = (np.zeros(tokens, np.int64) for _ in range(2))
        with torch.inference_mode(False):  # tensors made in inference mode cannot be written to outside of it
            self.x_tensor, self.after_tensor, self.out_tensor, self.normed_tensor = (
                torch.from_numpy(array) for array in (self.x, self.after, self.out, self.normed)
            )


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class LayerPlan:
    """The stages of one layer for T tokens."""

    def __init__(
        self,
        buffers: StepBuffers,
        snapshot: Snapshot,
        modules: AttentionModules,
        sources: Sequence[Source],  # q, k, v, output
        router: RouterModule | None,
        experts: Experts | None,
        after_norm: Any,
        half: int,
        model_type: WeightType,
        cache_type: WeightType,
        activations: Activations,
        team: Team,
    ) -> None:
        self.buffers, self.team = buffers, team
        self._keep = snapshot, modules  # what the addresses are of
        self._kernels: list[Any] = []
        self._memory: list[Any] = []
        self._activations, self.model_type = activations, model_type
        self._sinks = modules.sinks
        shape = modules.heads._replace(half=half)
        qkv, output = sources[:3], sources[3]
        b, tokens = buffers, buffers.tokens
        self.heads = HeadsStage(
            shape, tokens, address(b.queries), address(b.keys), address(b.values), model_type, cache_type
        )
        bf16 = model_type == "bf16"
        self._attention = DecodeAttention(
            AttentionShape(
                shape.q_heads, shape.kv_heads, shape.head_size, shape.head_size, cache_type,
                scale=modules.scale, q_is_bf16=bf16, bf16_weights=bf16,
            )
        )  # fmt: skip
        self._attention.load()
        self._capacity = 0
        hidden = b.x.shape[1]
        self._before = [
            self._matrices(hidden, qkv, b.x, [b.queries, b.keys, b.values], norm=modules.norm),
            Stage(heads_job().address, self.heads.block, heads.COUNTERS),
        ]
        self._after = [self._matrices(b.mixed.shape[1], [output], b.mixed, [b.after], residual=b.x)]
        if router is not None and experts is not None:
            self._after += self._experts(router, experts, after_norm)
            self._experts_layer: Experts | None = experts
        else:
            self._experts_layer = None
        self.stages: tuple[Stage, ...] = ()  # others when the cache has outgrown them
        self._where, self._strides = (0, 0, 0), Strides(0, 0, 0)
        self._chain: Chain | None = None

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """B, Hkv and D of the keys and values that the step reads and extends."""
        shape = self._attention.shape
        return self.buffers.tokens, shape.kv_heads, shape.head_size

    def takes(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> bool:
        """Whether the step can read and extend this cache [B, Hkv, position, D]."""
        batch, heads, size = self.cache_shape
        return keys.shape == values.shape == (batch, heads, position, size)

    @property
    def whole(self) -> bool:
        """Whether the experts are part of the chain: the result is in buffers.out, else in buffers.after."""
        return self._experts_layer is not None

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of one expert's weights; 0 where the experts are not part of the chain."""
        return 0 if self._experts_layer is None else self._experts_layer.bytes_per_expert

    @property
    def active_experts(self) -> int:
        """How many experts the last step ran."""
        return int(self._experts_words[experts_block.ACTIVE // 8])

    @property
    def routed_rows(self) -> int:
        """(token, expert) pairs of the last step."""
        return int(self._groups.offsets[self.active_experts])

    def run(self, room: Room, position: int) -> None:
        """Run the step; the new keys and values go to `position` of the cache's buffers."""
        self.place(room, position)
        if self._chain is None:
            self._chain = Chain(self.stages)
        self._chain.run(self.team)

    def place(self, room: Room, position: int) -> None:
        """Prepare `stages` for a step with these cache buffers; see `run`."""
        if room.where != self._where:
            self._point(room)
            self._where = room.where
        self.heads.place(room.where[0], room.where[1], self._strides, position)

    def _point(self, room: Room) -> None:
        """Let the attention read other buffers than before."""
        size, (batch, head, place, _) = room.keys.element_size(), room.keys.stride()
        keys, values, capacity = room.where
        if capacity > self._capacity:
            self._room_for(capacity)
        self._strides = strides = Strides(batch * size, head * size, place * size)
        words = self._attention_words
        words[attention_block.KEYS // 8], words[attention_block.VALUES // 8] = keys, values
        for first in (attention_block.KEY_BATCH // 8, attention_block.VALUE_BATCH // 8):
            words[first : first + 3] = strides

    def _room_for(self, capacity: int) -> None:
        """The attention's block has slots for the chunks of a longest context."""
        b = self.buffers
        memory = aligned_bytes(self._attention.block_bytes(b.tokens, capacity, self.team.threads))
        at = address(memory)
        self._attention.fill(
            at, queries=address(b.queries), keys=0, values=0, out=address(b.mixed), lengths=address(b.lengths),
            batch=b.tokens, threads=self.team.threads, key_strides=Strides(0, 0, 0), value_strides=Strides(0, 0, 0),
            starts=address(b.starts), sinks=self._sinks,
        )  # fmt: skip
        self._attention_memory, self._attention_words = memory, memory.view(np.int64)
        self._capacity = capacity
        attention = Stage(self._attention.job_address, at, 2)
        self.stages, self._chain = (*self._before, attention, *self._after), None

    def _matrices(
        self, cols: int, sources: Sequence[Source], x: NDArray[np.float32], outs: Sequence[NDArray[np.float32]],
        norm: Any = None, residual: NDArray[np.float32] | None = None, norm_out: NDArray[np.float32] | None = None,
    ) -> Stage:  # fmt: skip
        first, tokens, threads = sources[0], self.buffers.tokens, self.team.threads
        kernel = MatrixKernel(cols, first.dtype, first.group, self._activations)
        memory = aligned_bytes(kernel.block_bytes(len(sources), tokens, threads, norm is not None))
        add, add_step = (address(residual), residual.strides[0]) if residual is not None else (0, 0)
        matrices = [Matrix(s.address, s.outputs, s.bias, add, add_step) for s in sources]
        places = [(address(out), out.strides[0]) for out in outs]
        cuts = kernel.fill(
            address(memory), matrices, tokens, address(x), x.strides[0], places, threads, norm, self.model_type
        )
        if norm_out is not None:
            memory.view(np.int64)[matrix_block.NORM_OUT // 8] = address(norm_out)
        self._memory += [memory, cuts]
        self._kernels.append(kernel)
        return Stage(kernel.job, address(memory), matrix_block.COUNTERS // 64)

    def _experts(self, router: RouterModule, experts: Experts, after_norm: Any) -> list[Stage]:
        b, threads = self.buffers, self.team.threads
        count, hidden = router.weight.shape
        source = Source(WEIGHT_TYPES[router.weight.dtype], 32, router.weight.data_ptr(), count, router.bias)
        logits = self._matrices(hidden, [source], b.after, [b.logits], norm=after_norm, norm_out=b.normed)
        kernel = experts.kernel
        assert kernel is not None and experts.table is not None
        memory, self._groups, keep = kernel.prepare(experts.table, b.tokens, router.choices, b.normed, b.out, threads)
        at = address(memory)
        self._experts_words = memory.view(np.int64)
        most = min(count, b.tokens * router.choices)
        cuts = CutsTable(*kernel.cut_blocks, most, threads)
        rounding = self.model_type if router.rounded else "f32"
        stage = RouteStage(
            b.tokens, count, router.choices, router.routing, rounding, address(b.logits), address(b.after),
            address(b.out), hidden, at, cuts,
        )  # fmt: skip
        self._memory += [memory, keep, stage]
        return [
            logits,
            Stage(route_job().address, stage.block, route.COUNTERS),
            Stage(kernel.job, at, experts_block.COUNTERS // 64),
        ]


def source_of(module: nn.Module, snapshot: Snapshot) -> Source | None:
    """The matrix of a linear layer in host memory; None where the kernels cannot read it."""
    if type(module) is nn.Linear:
        weight = module.weight
        if weight.device.type != "cpu" or not weight.is_contiguous() or weight.dtype not in WEIGHT_TYPES:
            return None
        address, bias = snapshot.watch(module, "weight"), snapshot.take(module, "bias")
        return Source(WEIGHT_TYPES[weight.dtype], 32, address, module.out_features, bias)
    if type(module) is PackedLinear:
        layout = module.packed.layout
        bias = snapshot.take(module, "bias")
        return Source(layout.dtype, layout.group, module.packed.address, layout.rows, bias)
    return None
