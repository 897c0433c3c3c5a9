"""Tiny random checkpoints of every MoE architecture that this transformers can build from a configuration.

Real Hugging Face checkpoints: built from a config, saved with `save_pretrained`, to be loaded from disk through the
public path.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_COMMON: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8,
    num_experts_per_tok=2, moe_k=2, moe_topk=2, top_k_experts=2,
    shared_expert_intermediate_size=40, n_shared_experts=1, num_shared_experts=1, shared_intermediate_size=24,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, n_group=2, topk_group=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    first_k_dense_replace=1, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip

_LINEAR = dict(layer_types=["linear_attention", "full_attention", "linear_attention"])
_DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, **_LINEAR
)
_MLA = dict(num_key_value_heads=4)
_INDEXED = dict(index_n_heads=2, index_head_dim=16, index_topk=4, **_MLA)

# What an architecture needs beside the common sizes.
_EXTRA: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _LINEAR | _MLA,
    "beam": dict(mlp_layer_types=["dense", "sparse", "sparse"]),
    "deepseek_v2": dict(topk_method="group_limited_greedy", head_dim=8, **_MLA),
    "deepseek_v3": dict(rope_interleave=True, head_dim=8, **_MLA),
    "deepseek_v32": _INDEXED,
    "ernie4_5_moe": dict(moe_layer_start_index=1, moe_num_shared_experts=1),
    "flint": dict(mlp_only_layers=[0]),
    "gemma4_text": dict(
        enable_moe_block=True, num_kv_shared_layers=0, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _INDEXED,
    "gpt_oss": dict(
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granitemoe": dict(embedding_multiplier=1.0),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention", "mamba"], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=8,
    ),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4,
        mamba_d_conv=2, mamba_expand=2, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "kimi_linear": dict(linear_num_heads=4, **_LINEAR, **_MLA),
    "lfm2_moe": dict(num_dense_layers=1, layer_types=["conv", "full_attention", "conv"]),
    "llama4_text": dict(
        intermediate_size_mlp=48, moe_layers=None, interleave_moe_layer_step=1, attention_chunk_size=16,
    ),
    "longcat_flash": dict(
        num_layers=2, num_hidden_layers=4, ffn_hidden_size=48, expert_ffn_hidden_size=24, zero_expert_num=2, **_MLA,
    ),
    "minimax": dict(block_size=8, **_LINEAR),
    "minimax_m2": dict(rotary_dim=8),
    "mistral4": _MLA,
    "muse_spark_text": dict(moe_hidden_size=16),
    "nemotron_h": dict(
        layers_block_type=["mamba", "moe", "attention"], mamba_num_heads=4, mamba_head_dim=16, n_groups=2,
        ssm_state_size=8, chunk_size=8, moe_shared_expert_intermediate_size=24, moe_latent_size=None,
        mlp_hidden_act="relu2",
    ),
    "phimoe": dict(router_jitter_noise=0.01),
    "qwen2_moe": dict(decoder_sparse_step=1),
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip

_DROPPED: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("num_experts",),
    "ernie4_5_moe": ("num_experts_per_tok",),
    "gpt_oss": ("n_group",),
    "longcat_flash": ("num_experts", "num_local_experts"),
}

# Text models that AutoModelForCausalLM does not map.
_CLASSES: dict[str, tuple[str, str]] = {
    "aria_text": ("aria", "AriaTextForCausalLM"),
    "minimax_m3_vl_text": ("minimax_m3_vl", "MiniMaxM3VLForCausalLM"),
    "mistral4": ("mistral4", "Mistral4ForCausalLM"),
    "muse_spark_text": ("muse_spark", "MuseSparkTextModel"),
    "openai_privacy_filter": ("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
}

ARCHITECTURES = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4_text",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "jamba", "kimi_linear", "kolibri1",
    "laguna", "lfm2_moe", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "mistral4", "mixtral", "muse_spark_text", "nemotron_h", "olmoe", "openai_privacy_filter",
    "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "solar_open", "zaya",
)  # fmt: skip


def known_architectures() -> list[str]:
    """Those of ARCHITECTURES that the installed transformers has, and dispatches (aria since 5.15 or later)."""
    return [name for name in ARCHITECTURES if name in CONFIG_MAPPING and (name != "aria_text" or _aria_is_dispatched())]


def _aria_is_dispatched() -> bool:
    from transformers.models.aria import modeling_aria

    return "@use_experts_implementation" in inspect.getsource(modeling_aria)


def make_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A tiny configuration of `model_type`: the common sizes that it knows, and what it needs beside them."""
    kind = CONFIG_MAPPING[model_type]
    fields = set(getattr(kind, "__dataclass_fields__", {})) | set(inspect.signature(kind.__init__).parameters)
    aliases = getattr(kind, "attribute_map", None) or {}
    common = {k: v for k, v in _COMMON.items() if k not in _DROPPED.get(model_type, ())}
    kept = {k: v for k, v in common.items() if (k in fields and k not in aliases) or k == "vocab_size"}
    for name, value in common.items():
        if aliases.get(name) in fields:
            kept.setdefault(aliases[name], value)
    return kind(**(kept | _EXTRA.get(model_type, {}) | overrides))


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of `model_type` with eager experts, ready to be saved."""
    torch.manual_seed(seed)
    config = make_config(model_type, **overrides)
    options = dict(dtype=dtype, experts_implementation="eager")
    if model_type in _CLASSES:
        folder, name = _CLASSES[model_type]
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        model = getattr(module, name)._from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_config(config, **options)
    for name, buffer in model.named_buffers():
        if "bias" in name:  # correction biases of the router: zero would leave their use untested
            buffer.data.uniform_(-0.1, 0.1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 3 and "experts" in name:
            parameter.data.normal_(0, 0.2)
        if ("gate.weight" in name or "router.weight" in name) and not parameter.any():
            parameter.data.normal_(0, 0.5)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "60KB") -> Path:
    """Save as several shards, the way large checkpoints come."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def token_ids(rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
