"""What is compared: our layer for few tokens, our experts for many, cuBLAS, and transformers' `grouped_mm`."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Shape
from benchmarks.gpu.experts import Experts, Routed
from benchmarks.gpu.timer import Call
from moe_offload.gpu_kernels.fused_experts import FusedExperts
from moe_offload.gpu_kernels.tiled_experts import TiledExperts
from moe_offload.gpu_kernels.torch_experts import TorchExperts


class FusedLayer:
    """All of a layer's active experts in one go, from their slots; by a table of slots' addresses, or by name."""

    def __init__(self, bench: Bench, experts: Experts, tokens: int, top_k: int, by_table: bool = False) -> None:
        self._experts, self._by_table = experts, by_table
        self._fused = FusedExperts(experts.described, experts.activation, bench.kernels, len(experts.slots))
        self._space = self._fused.workspace(tokens, top_k)
        self._memory = torch.empty(self._space.nbytes, dtype=torch.uint8, device=bench.device)
        self._table = torch.tensor([slot.data_ptr() for slot in experts.slots], device=bench.device)

    def call(self, routed: Routed, out: torch.Tensor) -> Call:
        """Work that writes out [T, H]."""
        slots = [self._experts.slots[e] for e in routed.experts]
        return partial(self._run, routed, slots, out)

    def add_alone(self, routed: Routed) -> Call:
        """What reads weights, without what comes before and behind: these tokens stay in the workspace."""
        slots = [self._experts.slots[e] for e in routed.experts]
        self._begin(routed)
        return partial(self._fused.add, self._space, self._memory, routed.experts, slots, most_rows=routed.most_rows)

    def _begin(self, routed: Routed) -> None:
        self._fused.begin(self._space, self._memory, routed.hidden, routed.index, routed.weights)

    def _run(self, routed: Routed, slots: list[torch.Tensor], out: torch.Tensor) -> None:
        fused, space, memory = self._fused, self._space, self._memory
        self._begin(routed)
        if self._by_table:
            fused.add_by_table(space, memory, self._table)
        else:
            fused.add(space, memory, routed.experts, slots, most_rows=routed.most_rows)
        fused.join(space, memory, out)


class TiledExpert:
    """One expert with many tokens: tiles for cuBLAS."""

    def __init__(self, bench: Bench, experts: Experts, compute: torch.dtype) -> None:
        self._experts = experts
        self._tiled = TiledExperts(experts.described, experts.activation, compute, bench.kernels)

    def call(self, slot: int, x: torch.Tensor, out: torch.Tensor) -> Call:
        """Work that adds to out [T, H]: all rows of x [T, H] go through the expert."""
        tokens = torch.arange(len(x), device=x.device)
        weights = torch.ones(len(x), device=x.device)
        return partial(self._tiled.add_rows, out, x, tokens, weights, self._experts.slots[slot])


class Products:
    """The matrix products of one expert by cuBLAS on weights of that type, and nothing else: no activation."""

    def __init__(self, bench: Bench, shape: Shape, compute: torch.dtype, copies: int) -> None:
        generator = torch.Generator(bench.device).manual_seed(0)
        size = (copies, 3 * shape.hidden * shape.inner)
        memory = torch.empty(size, dtype=compute, device=bench.device)
        memory.normal_(std=0.02, generator=generator)
        both = 2 * shape.inner * shape.hidden
        self._up = [each[:both].view(2 * shape.inner, shape.hidden) for each in memory]
        self._down = [each[both:].view(shape.hidden, shape.inner) for each in memory]

    def call(self, number: int, x: torch.Tensor) -> Call:
        up, down = self._up[number % len(self._up)], self._down[number % len(self._down)]
        h = torch.empty(len(x), len(up), dtype=x.dtype, device=x.device)
        out = torch.empty_like(x)
        return partial(self._run, x, up, down, h, out)

    def _run(self, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, h: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, up.T, out=h)
        torch.mm(h[:, : down.shape[1]], down.T, out=out)


class GroupedExperts:
    """transformers' experts module with bf16 parameters that hold what `experts` holds."""

    def __init__(self, experts: Experts) -> None:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        record, count = experts.record, len(experts.slots)
        if record.dtype != "bf16" or record.bias or experts.shape.activation.kind != "silu":
            raise ValueError(f"grouped_mm is compared on bf16 experts with silu and no biases, got {record}")
        config = Qwen3MoeConfig(
            hidden_size=record.hidden_size, moe_intermediate_size=record.intermediate_size, num_experts=count,
            num_experts_per_tok=experts.shape.top_k, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module: Any = Qwen3MoeExperts(config)
        device = experts.slots[0].device
        self._module = module.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
        both, down = record.offsets[2], record.offsets[3]
        rows, hidden = record.intermediate_size, record.hidden_size
        stored = torch.from_numpy(experts.content).to(device)
        self._module.gate_up_proj.copy_(stored[:both].view(torch.bfloat16).view(2 * rows, hidden))
        self._module.down_proj.copy_(stored[both:down].view(torch.bfloat16).view(hidden, rows))

    def call(self, routed: Routed, out: torch.Tensor) -> Call:
        """Work that writes out [T, H]."""
        return partial(self._run, routed, routed.weights.to(routed.hidden.dtype), out)

    def _run(self, routed: Routed, weights: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self._module(routed.hidden, routed.index, weights))


def check(experts: Experts, routed: Routed, found: torch.Tensor, room: float, who: str) -> None:
    """Nothing is timed that does not compute what torch does in f32. All slots hold one expert.

    RuntimeError where an output is off by more than `room` of the largest.
    """
    torch_experts = TorchExperts(experts.described, experts.activation, torch.float32)
    expected = torch_experts.run(experts.slots[0], routed.hidden, routed.weights.sum(dim=1))
    off = (found.to(torch.float32) - expected).abs().max() / expected.abs().max()
    if not off <= room:
        name = f"{experts.shape.name}, {experts.record.dtype}, {routed.tokens} tokens"
        raise RuntimeError(f"{who} is off by {float(off):.1e} of the largest output, {room:.0e} is allowed: {name}")
