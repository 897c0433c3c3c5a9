"""What the fused decode step needs of a decoder layer: its modules, and the numbers in them, read once.

Only classes that are known are taken: transformers names things alike in architectures that compute differently.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_offload.cpu_kernels.heads import HeadsShape
from moe_offload.cpu_kernels.layout import WeightType
from moe_offload.cpu_kernels.matrices import Norm
from moe_offload.cpu_kernels.route import Routing

# decoder layers whose attention is: norm, q k v, (norm,) rotary embedding, softmax, output, residual
LAYER_CLASSES = frozenset(
    f"{name}DecoderLayer" for name in ("Qwen2Moe", "Qwen3Moe", "Mixtral", "Olmoe", "Glm4Moe", "Phimoe", "GptOss")
)
# blocks that are a router and experts, nothing else, and how their routers choose
ROUTERS: dict[str, Routing] = {
    "Qwen3MoeTopKRouter": "softmax",
    "OlmoeTopKRouter": "softmax",
    "MixtralTopKRouter": "softmax_normed",
    "GptOssTopKRouter": "softmax_of_chosen",
}
WEIGHT_TYPES: dict[torch.dtype, WeightType] = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


class Snapshot:
    """f32 copies of small parameters, and whether the parameters are still what was copied."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.float32]] = []
        self._taken: list[tuple[torch.Tensor, int, int]] = []

    def take(self, parameter: torch.Tensor | None) -> int:
        """Address of an f32 copy; 0 for None."""
        if parameter is None:
            return 0
        values = parameter.detach().to(torch.float32).contiguous().numpy().copy()
        self._arrays.append(values)
        self.watch(parameter)
        return int(values.ctypes.data)

    def watch(self, parameter: torch.Tensor) -> int:
        """Address of the parameter itself, which is to stay as it is."""
        self._taken.append((parameter, parameter.data_ptr(), parameter._version))
        return parameter.data_ptr()

    def holds(self) -> bool:
        """Whether no parameter was written to or moved since."""
        return all(p.data_ptr() == address and p._version == version for p, address, version in self._taken)


@dataclass(frozen=True, slots=True)
class AttentionModules:
    """One layer's attention."""

    norm: Norm
    projections: tuple[nn.Module, nn.Module, nn.Module]  # q, k, v
    output: nn.Module
    heads: HeadsShape
    scale: float
    sinks: int  # address of f32 [Hq]; 0 without


@dataclass(frozen=True, slots=True)
class RouterModule:
    """A router that the route stage computes as well."""

    weight: torch.Tensor  # [E, H]
    bias: int  # address of f32 [E]; 0 without
    choices: int
    routing: Routing
    rounded: bool  # weights are brought to the model's type


def read_norm(module: nn.Module, snapshot: Snapshot) -> Norm | None:
    """An RMSNorm of transformers' kind, or torch's LayerNorm; None for anything else."""
    if type(module) is nn.LayerNorm:
        if module.weight is None or module.bias is None:
            return None
        return Norm(snapshot.take(module.weight), module.eps, snapshot.take(module.bias))
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return Norm(snapshot.take(module.weight), float(module.variance_epsilon))  # type: ignore[arg-type]
    return None


def read_attention(layer: Any, snapshot: Snapshot) -> AttentionModules | None:
    """The attention of a decoder layer; None where the fused step does not know it."""
    if type(layer).__name__ not in LAYER_CLASSES:
        return None
    attention = layer.self_attn
    norm = read_norm(layer.input_layernorm, snapshot)
    if norm is None:
        return None
    size = int(attention.head_dim)
    q_norm, k_norm = (read_norm(m, snapshot) if isinstance(m, nn.Module) else None for m in (
        getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)))  # fmt: skip
    q_heads, kv_heads = (m.out_features // size for m in (attention.q_proj, attention.k_proj))
    config = attention.config
    heads = HeadsShape(
        q_heads, kv_heads, size, 0,
        q_norm.weight if q_norm else 0, k_norm.weight if k_norm else 0,
        whole=type(layer).__name__ == "OlmoeDecoderLayer",
        epsilon=q_norm.epsilon if q_norm else 1e-6,
        clip=float(getattr(config, "clip_qkv", None) or 0.0),
    )  # fmt: skip
    return AttentionModules(
        norm, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj, heads,
        float(attention.scaling), snapshot.take(getattr(attention, "sinks", None)),
    )  # fmt: skip


def read_router(block: Any, snapshot: Snapshot) -> RouterModule | None:
    """The router of a MoE block that is a router and experts alone; None for any other block."""
    children = dict(block.named_children())
    experts = children.pop("experts", None)
    if experts is None or len(children) != 1:
        return None
    (router,) = children.values()
    routing = ROUTERS.get(type(router).__name__)
    if routing is None:
        return None
    if routing == "softmax" and router.norm_topk_prob:
        routing = "softmax_normed"
    snapshot.watch(router.weight)
    rounded = type(router).__name__ != "MixtralTopKRouter"
    return RouterModule(
        router.weight, snapshot.take(getattr(router, "bias", None)), int(router.top_k), routing, rounded
    )
