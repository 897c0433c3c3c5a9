"""Random checkpoints with the shapes of real models, a few layers deep, written shard by shard in bounded memory.

Random weights route tokens evenly over experts, which real ones do not: decode figures hold (every token reads
top-k experts), cache hit rates do not and are not measured on these.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

_QWEN3 = dict(norm_topk_prob=True, intermediate_size=1024, architectures=["Qwen3MoeForCausalLM"])
_MIXTRAL = dict(sliding_window=None, rope_theta=1e6, architectures=["MixtralForCausalLM"])


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture, its sizes, and the Hub's names of a layer's experts.

    experts: prefix of an expert's tensors; {layer} and {expert} are put in.
    matrices: names of gate, up [inner, hidden] and down [hidden, inner] below that prefix.
    renamed: (part of transformers' parameter name, the Hub's) where they differ.
    """

    config: type[PreTrainedConfig]
    sizes: dict[str, Any]
    experts: str = "model.layers.{layer}.mlp.experts.{expert}"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renamed: tuple[tuple[str, str], ...] = ()


SHAPES = {
    # Qwen3-30B-A3B, but for its 48 layers and its vocabulary: 1.2 GB of experts a layer.
    "qwen3": Shape(
        Qwen3MoeConfig,
        dict(
            hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, **_QWEN3,
        ),
    ),
    # Few large experts, Mixtral 8x7B at half of its width: 0.7 GB of experts a layer.
    "mixtral": Shape(
        MixtralConfig,
        dict(
            hidden_size=2048, intermediate_size=7168, num_local_experts=8, num_experts_per_tok=2,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, **_MIXTRAL,
        ),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"),
        ((".mlp.gate.", ".block_sparse_moe.gate."),),
    ),
    # Qwen3-30B-A3B's attention around few, small experts: every kernel of the real model, hardly any weights.
    "thin": Shape(
        Qwen3MoeConfig,
        dict(
            hidden_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=8,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, **_QWEN3,
        ),
    ),
    # Small enough for a smoke run.
    "small": Shape(
        Qwen3MoeConfig,
        dict(
            hidden_size=256, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, **_QWEN3,
        ),
    ),
}  # fmt: skip


def make_config(shape: str, layers: int) -> PreTrainedConfig:
    """A configuration of the named shape."""
    return SHAPES[shape].config(
        **SHAPES[shape].sizes, num_hidden_layers=layers, vocab_size=8192, max_position_embeddings=4096,
        dtype="bfloat16", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
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
        for number, tensors in enumerate(_shards(SHAPES[shape], config)):
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


def _shards(shape: Shape, config: PreTrainedConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Everything but the experts first, then the experts of one layer at a time, under the Hub's names."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    rest = {}
    for name, parameter in skeleton.named_parameters():
        if ".experts." not in name:
            for ours, hub in shape.renamed:
                name = name.replace(ours, hub)
            rest[name] = (
                torch.ones(parameter.shape, dtype=torch.bfloat16) if parameter.dim() == 1 else random(*parameter.shape)
            )
    yield rest
    count, hidden, inner = expert_sizes(config)
    for layer in range(config.num_hidden_layers):
        tensors = {}
        for expert in range(count):
            prefix = shape.experts.format(layer=layer, expert=expert)
            sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
            for name, size in zip(shape.matrices, sizes, strict=True):
                tensors[f"{prefix}.{name}.weight"] = random(*size)
        yield tensors


def expert_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(experts a layer, hidden, inner)."""
    if isinstance(config, MixtralConfig):
        return config.num_local_experts, config.hidden_size, config.intermediate_size
    return config.num_experts, config.hidden_size, config.moe_intermediate_size
