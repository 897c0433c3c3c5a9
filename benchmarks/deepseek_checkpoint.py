"""A random checkpoint of DeepSeek-V2-Lite's shape, a few layers deep, with latent attention and a dense first layer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config


def make_deepseek(folder: Path, layers: int, name: str = "deepseek", **changes: int) -> Path:
    """DeepSeek-V2-Lite, `layers` deep, the first with a dense block: 1.1 GB of experts in each other one. All experts
    of a layer are one, but for where they lie. name: of one with `changes` in its configuration.
    """
    target = folder / f"{name}-{layers}"
    if target.is_dir():
        return target
    sizes: dict[str, Any] = dict(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, vocab_size=8192, max_position_embeddings=4096, n_group=1, topk_group=1, topk_method="greedy",
        routed_scaling_factor=1.0, norm_topk_prob=False, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["DeepseekV2ForCausalLM"], bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = DeepseekV2Config(**(sizes | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                part = parameter[0] if parameter.dim() == 3 else parameter
                part.normal_(0, 0.02, generator=generator)
                if parameter.dim() == 3:
                    parameter[1:] = part
    beside = folder / f".{target.name}"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, max_shard_size="1GB")
    beside.rename(target)
    return target
