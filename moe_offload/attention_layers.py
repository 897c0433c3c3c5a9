"""Which attention layers of a model may have their KV cache in host memory, and what keeps the others on the device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from moe_offload.models import compat

# transformers' implementations that ours stands for, and its name then: masks differ
NAMES = {"sdpa": "moe_offload", "eager": "moe_offload_eager"}
# known by heart: a softmax with one more logit for each head, `sinks`, for which sdpa has no place
SINK_CLASSES = frozenset(("GptOssAttention", "FlintAttention", "GraniteMoeSWAAttention", "MiMoV2FlashAttention"))


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer of a model's cache.

    module: its attention, None where there is none (linear attention) or the layer has several. implementation: what
    it would call without us. obstacle: what keeps the cache on the device, empty where nothing does. width: elements
    that keys and values of a position have, in one sequence, as far as the modules tell. window: positions that are
    kept, 0 = all.
    """

    index: int
    module: Any
    implementation: str
    obstacle: str
    width: int
    window: int

    @property
    def schedulable(self) -> bool:
        """Whether the cache may be in host memory."""
        return not self.obstacle


def attention_layers(model: Any) -> tuple[AttentionLayer, ...]:
    """All layers of the cache that a model makes for itself."""
    kinds = DynamicCache(config=model.config).layers
    found: dict[int, list[Any]] = {}
    for module in model.modules():
        if compat.is_dispatched_attention(module) and getattr(module, "layer_idx", None) is not None:
            found.setdefault(module.layer_idx, []).append(module)
    attentions: set[type[nn.Module]] = {type(module) for modules in found.values() for module in modules}
    obstacles = {each: compat.keeps_what_the_cache_returns(each) for each in attentions}
    classes: set[type[nn.Module]] = {type(module) for module in model.modules()}
    if any(compat.asks_for_sdpa_by_name(each) for each in classes):
        obstacles = {each: reason or "the model asks for sdpa by its name" for each, reason in obstacles.items()}
    return tuple(_describe(index, found.get(index, []), kind, obstacles) for index, kind in enumerate(kinds))


def schedulable_layers(model: Any) -> list[bool]:
    """Whether each layer's KV cache may be in host memory."""
    return [layer.schedulable for layer in attention_layers(model)]


def explain(layers: Sequence[AttentionLayer]) -> str:
    """One line for a log: how many layers may be on either side, and what keeps the others."""
    free = sum(layer.schedulable for layer in layers)
    kept = Counter(layer.obstacle for layer in layers if layer.obstacle)
    reasons = "; ".join(f"{count} on the device: {reason}" for reason, count in kept.items())
    return f"KV cache of {free} of {len(layers)} layers may be on either side" + (f" ({reasons})" if reasons else "")


def _describe(index: int, modules: list[Any], kind: Any, obstacles: Mapping[type[nn.Module], str]) -> AttentionLayer:
    window = int(getattr(kind, "sliding_window", 0) or 0)
    if len(modules) != 1:
        obstacle = "several attentions share it" if modules else "no attention with keys and values"
        return AttentionLayer(index, None, "", obstacle, sum(map(_width, modules)), window)
    (module,) = modules
    named = module.config._attn_implementation
    implementation = next((former for former, ours in NAMES.items() if ours == named), named)
    obstacle = _obstacle(module, kind, implementation) or obstacles[type(module)]
    return AttentionLayer(index, module, implementation, obstacle, _width(module), window)


def _obstacle(module: Any, kind: Any, implementation: str) -> str:
    if type(kind) is not DynamicLayer:
        return "a sliding window" if kind.is_sliding else f"a cache of its own kind, {type(kind).__name__}"
    if implementation == "eager" and type(module).__name__ not in SINK_CLASSES or implementation not in NAMES:
        return f"the attention is {implementation!r}, which is not replaced"
    return ""


def _width(module: Any) -> int:
    projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    outputs = [int(getattr(each, "out_features", 0)) for each in projections]
    if all(outputs):
        return sum(outputs)
    config = module.config
    latent = getattr(config, "kv_lora_rank", None)
    if latent and compat.caches_latents(type(module)):
        return int(latent + config.qk_rope_head_dim)
    if latent:
        return int(config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))
    size = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_key_value_heads * size)
