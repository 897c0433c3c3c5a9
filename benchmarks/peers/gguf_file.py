"""The checkpoint as GGUF, written by the package `gguf`: the same bf16 values in llama.cpp's names and order; norms and
routers in f32.

Token ids are fed, never text, so the file says that it has no vocabulary. llama.cpp rotates the halves of a head
interleaved in its `llama` architecture (Mixtral), as Meta's checkpoints did: rows of q and k are put in that order.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.protocol import MissingError
from benchmarks.peers.stored import StoredTensors, read_config

HOW_TO_INSTALL = (
    "pip install llama-cpp-python gguf   (builds llama.cpp, some minutes; gguf is also in the extra peers of "
    "moe-offload; name another interpreter that has both with --llama-python)"
)
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp calls a model type, and where the checkpoint keeps its MoE block.

    name: llama.cpp's name.
    block: prefix of router and experts in a layer.
    matrices: the checkpoint's names of gate, up and down.
    inner: key of config.json for the experts' intermediate size.
    interleaved: q and k rows are to be put in interleaved order.
    """

    name: str
    block: str
    matrices: tuple[str, str, str]
    inner: str
    interleaved: bool


ARCHITECTURES = {
    "qwen3_moe": Architecture("qwen3moe", "mlp", ("gate_proj", "up_proj", "down_proj"), "moe_intermediate_size", False),
    "mixtral": Architecture("llama", "block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size", True),
}

_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to be written: its shape, whether it is kept as bf16 bits (else f32), and how to get it."""

    name: str
    shape: tuple[int, ...]
    bf16: bool
    read: Callable[[], Array]


def gguf_tensors(folder: Path) -> Iterator[GgufTensor]:
    """All tensors of the file, none of them read yet. Raises KeyError for a model type that is not known here."""
    config = read_config(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    stored = StoredTensors.open(folder)

    def one(source: str, target: str, heads: int = 0) -> GgufTensor:
        shape = stored.places[source].shape
        if len(shape) == 1 or target.endswith("ffn_gate_inp"):
            return GgufTensor(f"{target}.weight", shape, False, lambda: stored.float32(source))
        if heads and architecture.interleaved:
            return GgufTensor(f"{target}.weight", shape, True, lambda: interleave(stored.bits(source), heads))
        return GgufTensor(f"{target}.weight", shape, True, lambda: stored.bits(source))

    def stacked(sources: list[str], target: str) -> GgufTensor:
        shape = (len(sources), *stored.places[sources[0]].shape)
        return GgufTensor(f"{target}.weight", shape, True, lambda: np.stack([stored.bits(name) for name in sources]))

    for source, target in _OUTER.items():
        yield one(f"{source}.weight", target)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        before, after = f"model.layers.{layer}", f"blk.{layer}"
        for source, target in _LAYER.items():
            if f"{before}.{source}.weight" in stored.places:
                yield one(f"{before}.{source}.weight", f"{after}.{target}", heads.get(target, 0))
        yield one(f"{before}.{architecture.block}.gate.weight", f"{after}.ffn_gate_inp")
        for source, target in zip(architecture.matrices, ("gate", "up", "down"), strict=True):
            names = [
                f"{before}.{architecture.block}.experts.{expert}.{source}.weight"
                for expert in range(config["num_local_experts"])
            ]
            yield stacked(names, f"{after}.ffn_{target}_exps")


def interleave(rows: Array, heads: int) -> Array:
    """Rows (heads * 2 * half, columns): row h of a head's first half, then row h of its second half."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(folder: Path, target: Path) -> None:
    """Write the checkpoint in `folder` as a bf16 GGUF, tensor by tensor. Raises MissingError without `gguf`."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise MissingError(f"the package gguf is not installed: {HOW_TO_INSTALL}") from error
    config = read_config(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(beside, architecture.name)
    _add_settings(writer, config, architecture)
    types = gguf.GGMLQuantizationType
    tensors = list(gguf_tensors(folder))
    for tensor in tensors:
        width = 2 if tensor.bf16 else 4
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), int(np.prod(tensor.shape)) * width,
            raw_dtype=types.BF16 if tensor.bf16 else types.F32,
        )  # fmt: skip
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.read()))
        writer.close()
        beside.rename(target)
    finally:
        beside.unlink(missing_ok=True)


def _add_settings(writer: Any, config: dict[str, Any], architecture: Architecture) -> None:
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_name("random")
    writer.add_file_type(32)  # mostly bf16
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config[architecture.inner])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
