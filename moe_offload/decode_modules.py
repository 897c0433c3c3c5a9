"""What the fused decode step needs of a decoder layer: its modules, and the numbers in them, read once.

Only classes that are known are taken: transformers names things alike in architectures that compute differently.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter, is_, methodcaller
from types import MappingProxyType
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
_VERSION = attrgetter("_version")
_RECORDERS = "transformers.utils.output_capturing"
_collector: Any = getattr(importlib.import_module(_RECORDERS), "_active_collector", None)  # of the thread's call


class Snapshot:
    """Parameters that a plan reads, small ones as f32 copies, and whether they still are what was found.

    Writing through `.data` counts no version: `same` sees it, at the cost of comparing the copies. `holds` is asked at
    every step: it loops in C.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, NDArray[np.float32]]] = []
        # where each parameter was found, under which name, and what was there
        self._places: list[dict[str, nn.Parameter | None]] = []
        self._names: list[str] = []
        self._found: list[torch.Tensor | None] = []
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._counted: list[torch.Tensor] = []  # tensors made in inference mode count no versions
        self._versions: list[int] = []

    @classmethod
    def of_all(cls, snapshots: Iterable["Snapshot"]) -> "Snapshot":
        """One that holds as long as all of these do."""
        joined = cls()
        for each in snapshots:
            for name, values in vars(each).items():
                getattr(joined, name).extend(values)
        return joined

    def take(self, module: nn.Module, name: str) -> int:
        """Address of a parameter's values in f32; 0 where there is none."""
        tensor = self._watch(module, name)
        if tensor is None:
            return 0
        if tensor.dtype == torch.float32 and tensor.is_contiguous():
            return tensor.data_ptr()
        copy = _floats(tensor)
        self._copies.append((tensor, copy))
        return int(copy.ctypes.data)

    def watch(self, module: nn.Module, name: str) -> int:
        """Address of a parameter itself."""
        tensor = self._watch(module, name)
        assert tensor is not None
        return tensor.data_ptr()

    def _watch(self, module: nn.Module, name: str) -> torch.Tensor | None:
        tensor = module._parameters.get(name)
        self._places.append(module._parameters)
        self._names.append(name)
        self._found.append(tensor)
        if tensor is not None:
            self._tensors.append(tensor)
            self._addresses.append(tensor.data_ptr())
            if not tensor.is_inference():
                self._counted.append(tensor)
                self._versions.append(tensor._version)
        return tensor

    def holds(self) -> bool:
        """Whether no parameter was replaced, moved or written to since."""
        return (
            all(map(is_, map(dict.get, self._places, self._names), self._found))
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_VERSION, self._counted)) == self._versions
        )

    def same(self) -> bool:
        """Whether the copies still have the parameters' values."""
        return all(_floats(tensor).tobytes() == copy.tobytes() for tensor, copy in self._copies)


def _floats(tensor: torch.Tensor) -> NDArray[np.float32]:
    """A copy in f32."""
    values: NDArray[np.float32] = tensor.detach().to(torch.float32).contiguous().numpy().copy()
    return values


_TRAINS = attrgetter("training")
_FORWARD = methodcaller("get", "forward")


class Inside:
    """The modules inside of a module, and whether calling them would still do nothing but what their classes say.

    forwards: by a module's id, the function that is expected to stand for its forward. Asked at every step: loops over
    the modules run in C.
    """

    def __init__(self, root: nn.Module, forwards: Mapping[int, Any] = MappingProxyType({})) -> None:
        found = [
            (parent._modules, name, child)
            for parent in root.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self._parents, self._names, self._modules = zip(*found, strict=True)
        self._dicts = [each.__dict__ for each in self._modules]
        self._forwards = [forwards.get(id(each)) for each in self._modules]
        self._hooks = [hooks for each in self._modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]

    def untouched(self) -> bool:
        """Whether all hang where they hung, without hooks and functions of their own, and none is in training."""
        return (
            not (any(self._hooks) and self._watched())
            and not any(map(_TRAINS, self._modules))
            and all(map(is_, map(_FORWARD, self._dicts), self._forwards))
            and all(map(is_, map(dict.get, self._parents, self._names), self._modules))
        )

    def _watched(self) -> bool:
        """Whether a hook wants to see something.

        Once hidden states or attentions were asked for, transformers leaves its recorders on the modules for good; they
        look at nothing as long as nothing is collected.
        """
        if _collector is None or _collector.get():
            return True
        found = (hook for hooks in self._hooks for hook in hooks.values())
        return not all(getattr(hook, "__module__", None) == _RECORDERS for hook in found)


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
        return Norm(snapshot.take(module, "weight"), module.eps, snapshot.take(module, "bias"))
    if is_transformers(module) and type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return Norm(snapshot.take(module, "weight"), float(module.variance_epsilon))  # type: ignore[arg-type]
    return None


def is_transformers(module: nn.Module) -> bool:
    """Whether a module's class is transformers' own: a checkpoint's code may bear the same names."""
    return type(module).__module__.startswith("transformers.models.")


def read_attention(layer: Any, snapshot: Snapshot) -> AttentionModules | None:
    """The attention of a decoder layer; None where the fused step does not know it."""
    attention = layer.self_attn
    norm = read_norm(layer.input_layernorm, snapshot)
    if norm is None:
        return None
    size = int(attention.head_dim)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if each is None else read_norm(each, snapshot) for each in norms)
    if (q_norm is None) != (norms[0] is None) or (k_norm is None) != (norms[1] is None):
        return None
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    if not all(hasattr(each, "out_features") for each in projections):
        return None
    q_heads, kv_heads = (each.out_features // size for each in projections[:2])
    config = attention.config
    heads = HeadsShape(
        q_heads, kv_heads, size, 0,
        q_norm.weight if q_norm else 0, k_norm.weight if k_norm else 0,
        whole=type(layer).__name__ == "OlmoeDecoderLayer",
        epsilon=q_norm.epsilon if q_norm else 1e-6,
        clip=float(getattr(config, "clip_qkv", None) or 0.0),
    )  # fmt: skip
    return AttentionModules(
        norm, projections, attention.o_proj, heads,
        float(attention.scaling), snapshot.take(attention, "sinks"),
    )  # fmt: skip


def read_router(block: Any, snapshot: Snapshot) -> RouterModule | None:
    """The router of a MoE block that is a router and experts alone; None for any other block."""
    if not is_transformers(block):
        return None
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
    snapshot.watch(router, "weight")
    rounded = type(router).__name__ != "MixtralTopKRouter"
    return RouterModule(router.weight, snapshot.take(router, "bias"), int(router.top_k), routing, rounded)
