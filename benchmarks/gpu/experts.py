"""Random experts in device memory, and routings that lead calls through all of them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.bench import Bench, Shape
from moe_offload.bench_cpu import random_expert
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, StoredType
from moe_offload.gpu_kernels.torch_experts import DeviceActivation, DeviceRecord


@dataclass(frozen=True, slots=True)
class Experts:
    """Slots of one layer, all with the content of one expert: the device reads each from its own memory."""

    shape: Shape
    record: ExpertRecord
    content: NDArray[np.uint8]
    slots: list[torch.Tensor]  # uint8 [nbytes] each

    @classmethod
    def make(cls, bench: Bench, shape: Shape, dtype: StoredType, seed: int = 0) -> "Experts":
        """As many as the model has, more where the cache would hold much of them, fewer where memory is short."""
        record, rng = shape.record(dtype), np.random.default_rng(seed)
        content = random_expert(record, rng)
        if record.bias:
            sizes = (record.intermediate_size, record.intermediate_size, record.hidden_size)
            for offset, size in zip(record.offsets[3:], sizes, strict=True):
                content[offset : offset + 4 * size].view(np.float32)[:] = rng.standard_normal(size) * 0.02
        count = bench.copies(record.nbytes, shape.experts)
        if count < shape.top_k:
            raise MemoryError(f"{shape.name}: {shape.top_k} {dtype} experts do not fit into half of the free memory")
        memory = torch.empty((count, record.nbytes), dtype=torch.uint8, device=bench.device)
        memory[:] = torch.from_numpy(content).to(bench.device)
        return cls(shape, record, content, list(memory))

    @property
    def described(self) -> DeviceRecord:
        record = self.record
        return DeviceRecord(
            record.hidden_size, record.intermediate_size, record.dtype, record.gated, record.bias, record.group,
            record.offsets, record.nbytes,
        )  # fmt: skip

    @property
    def activation(self) -> DeviceActivation:
        activation = self.shape.activation
        return DeviceActivation(activation.kind, activation.alpha, activation.limit)


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens of one call: hidden [T, H], index int64 [T, K], weights f32 [T, K], the experts they need, and the most
    tokens of one of these.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    experts: list[int]
    most_rows: int

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]


def route(experts: Experts, tokens: int, calls: int, dtype: torch.dtype, top_k: int, seed: int = 1) -> list[Routed]:
    """Random routings. Single tokens are dealt experts like cards, so that a call finds none of the last calls'."""
    rng, count, device = np.random.default_rng(seed), len(experts.slots), experts.slots[0].device
    routed, deck = [], np.empty(0, np.int64)
    for _ in range(calls):
        if tokens == 1:
            if len(deck) < top_k:
                deck = rng.permutation(count)
            index, deck = deck[None, :top_k], deck[top_k:]
        else:
            index = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)])
        hidden = torch.from_numpy(rng.standard_normal((tokens, experts.record.hidden_size), np.float32))
        needed, rows = np.unique(index, return_counts=True)
        routed.append(
            Routed(
                hidden.to(device, dtype),
                torch.from_numpy(index.astype(np.int64)).to(device),
                torch.full(index.shape, 1 / top_k, device=device),
                needed.tolist(),
                int(rows.max()),
            )
        )
    return routed
