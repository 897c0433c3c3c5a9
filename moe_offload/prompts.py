"""Text into token ids: a model's tokenizer, its chat template, the room in its context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moe_offload.loading import require_experts
from moe_offload.models.errors import CheckpointError, OptionError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "tekken.json",
)

Message = dict[str, str]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises CheckpointError when there is none, or a damaged one, and as `load` where the
    model itself is what is wrong.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        require_experts(folder)
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model): copy the one of the original model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files raise whatever they like
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0].rstrip(': ')}"
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({reason}): "
            "its files are incomplete or damaged, copy those of the original model there"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def max_context(config: PreTrainedConfig) -> int | None:
    """Tokens that prompt and answer may have together; None where there is no bound."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that is to be continued as it is."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise OptionError("the prompt has no token: give it some text")
    return ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation in the model's own format, up to where the answer begins."""
    require_template(tokenizer)
    try:
        encoded: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates are programs: they refuse roles, or fail
        raise OptionError(f"the model's chat template does not take this conversation: {error}") from error
    return list(encoded["input_ids"])


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless the model can hold a conversation."""
    if not tokenizer.chat_template:
        raise OptionError(
            "this model has no chat template, it only continues text: use `moe-offload generate` without --chat"
        )


def room_for_answer(prompt_tokens: int, context: int | None, wanted: int) -> int:
    """How many of `wanted` new tokens fit behind the prompt.

    Raises OptionError when not even one does.
    """
    if context is None:
        return wanted
    if prompt_tokens >= context:
        raise OptionError(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds {context}, "
            "answer included: shorten it"
        )
    return min(wanted, context - prompt_tokens)


def require_known_ids(ids: Sequence[int], config: PreTrainedConfig) -> None:
    """Raise when the tokenizer makes ids that the model has no embedding for."""
    size = int(config.get_text_config(decoder=True).vocab_size)
    if max(ids) >= size:
        raise CheckpointError(
            f"the tokenizer makes token {max(ids)}, but the model's vocabulary has {size}: it belongs to another model"
        )
