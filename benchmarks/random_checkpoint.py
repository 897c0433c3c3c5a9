"""Random checkpoints with the shapes of real models, a few layers deep, written shard by shard in bounded memory.

Random weights route tokens evenly over experts, which real ones do not: decode figures hold (every token reads
top-k experts), cache hit rates do not and are not measured on these.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig

SHAPES: dict[str, dict[str, Any]] = {
    # Qwen3-30B-A3B, but for its 48 layers and its vocabulary.
    "qwen3": dict(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    ),
    # Small enough for a smoke run.
    "small": dict(
        hidden_size=256, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    ),
}  # fmt: skip


def make_config(shape: str, layers: int) -> PreTrainedConfig:
    """A Qwen3-MoE configuration of the named shape."""
    return Qwen3MoeConfig(
        **SHAPES[shape], num_hidden_layers=layers, intermediate_size=1024, vocab_size=8192,
        max_position_embeddings=4096,
        norm_topk_prob=True, dtype="bfloat16", tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def make_checkpoint(folder: Path, shape: str, layers: int, progress: Callable[[str], None] = lambda _: None) -> Path:
    """A bf16 checkpoint in `folder` / name; one that is already there is taken as it is."""
    target = folder / f"{shape}-{layers}"
    if target.is_dir():
        return target
    beside = folder / f".{target.name}.{os.getpid()}"
    beside.mkdir(parents=True)
    try:
        config = make_config(shape, layers)
        config.save_pretrained(beside)
        weight_map = {}
        for number, tensors in enumerate(_shards(config)):
            name = f"model-{number:05d}.safetensors"
            progress(f"writing {target.name}: shard {number + 1} of {layers + 1}")
            save_file(tensors, beside / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
        index = {"metadata": {}, "weight_map": weight_map}
        (beside / "model.safetensors.index.json").write_text(json.dumps(index))
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


def _shards(config: PreTrainedConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Everything but the experts first, then the experts of one layer at a time, under the Hub's names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    rest = {}
    for name, parameter in skeleton.named_parameters():
        if ".experts." not in name:
            rest[name] = (
                torch.ones(parameter.shape, dtype=torch.bfloat16) if parameter.dim() == 1 else random(*parameter.shape)
            )
    yield rest
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        tensors = {}
        for expert in range(config.num_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                tensors[f"{prefix}.{name}_proj.weight"] = random(*shape)
        yield tensors
