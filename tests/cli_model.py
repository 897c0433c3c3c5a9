"""A tiny model folder as a user would have it: weights in shards, a tokenizer, a chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny_models

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>")
CONTEXT = 256
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(template: str | None = _TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level: every text has tokens, and every byte is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL[3:]),
    )
    tokenizer.chat_template = template
    return tokenizer


def make_folder(
    folder: Path,
    model_type: str = "qwen3_moe",
    *,
    template: str | None = _TEMPLATE,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "60KB",
    **overrides: Any,
) -> Path:
    """A random model of `model_type` that speaks bytes, in several shards."""
    sizes = {"vocab_size": 262, "max_position_embeddings": CONTEXT} | overrides
    model = tiny_models.build(model_type, dtype, **sizes)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    tiny_models.save(model, folder, max_shard_size)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def copied(source: Path, target: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(source, target)
    return target


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_shard(path: Path, header: Any, data: bytes) -> None:
    """The inverse of `read_shard`, for headers that lie too."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shard_of(folder: Path, tensor: str) -> Path:
    """The file that holds `tensor`."""
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    return folder / str(index["weight_map"][tensor])
