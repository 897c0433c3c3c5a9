"""A file of text as token sequences: a .txt in pieces of one length, a .jsonl with a prompt or conversation a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_offload.cli_options import read_utf8
from moe_offload.models.errors import OptionError
from moe_offload.opening import OpenedModel
from moe_offload.prompts import encode_chat, encode_text, max_context, require_known_ids

_LINES = 1 << 20  # characters that are made tokens at once


@dataclass(frozen=True, slots=True)
class PromptFile:
    """sequence_tokens: of a piece, and of a prompt at most. new_tokens: that are to follow a sequence. max_tokens: of
    all of them together.
    """

    path: Path
    sequence_tokens: int
    new_tokens: int = 0
    max_tokens: int | None = None


def read_sequences(opened: OpenedModel, wanted: PromptFile) -> list[list[int]]:
    """The token ids of each sequence. Raises OptionError for what is wrong with the file."""
    path = wanted.path
    try:
        text = read_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionError(f"cannot read the prompts {path}: {error.strerror or error}") from error
    if not text.strip():
        raise OptionError(f"{path} is empty: give it text")
    context = max_context(opened.config)
    if context is not None and wanted.sequence_tokens + wanted.new_tokens > context:
        raise OptionError(
            f"sequences of {wanted.sequence_tokens} tokens and {wanted.new_tokens} new ones do not fit the model's "
            f"context of {context}: give a smaller --sequence-tokens or --new-tokens"
        )
    found = _prompts if path.suffix == ".jsonl" else _pieces
    sequences: list[list[int]] = []
    left = wanted.max_tokens
    for ids in found(text, opened.tokenizer, wanted):
        if left is not None:
            left -= len(ids) + wanted.new_tokens
            if left < 0:
                break
        require_known_ids(ids, opened.config)
        sequences.append(ids)
    if not sequences and left is not None and left < 0:
        raise OptionError(f"--max-tokens {wanted.max_tokens} is less than the first sequence has")
    if not sequences:
        raise OptionError(
            f"{path} has fewer than {wanted.sequence_tokens} tokens, too few for one sequence: give more text, or a "
            "smaller --sequence-tokens"
        )
    return sequences


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, wanted: PromptFile) -> Iterator[list[int]]:
    """A text in pieces of one length, each with what the tokenizer puts in front of a text; a rest is left out."""
    begin = _beginning(tokenizer)
    size = max(wanted.sequence_tokens - len(begin), 1)
    waiting: list[int] = []
    for part in _parts(text):
        waiting += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(waiting) // size * size
        for at in range(0, whole, size):
            yield begin + waiting[at : at + size]
        waiting = waiting[whole:]


def _parts(text: str) -> Iterator[str]:
    """The text cut at line ends."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + _LINES) + 1 or len(text)
        yield text[at:end]
        at = end


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    marked: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return marked[: len(marked) - len(bare)] if bare and marked[-len(bare) :] == bare else []


def _prompts(text: str, tokenizer: PreTrainedTokenizerBase, wanted: PromptFile) -> Iterator[list[int]]:
    """One prompt a line, its first tokens where it has too many."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{wanted.path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where} is not JSON ({error})") from error
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        messages: Any = entry.get("messages") if isinstance(entry, dict) else None
        try:
            if isinstance(prompt, str) and prompt:
                ids = encode_text(tokenizer, prompt)
            elif _is_conversation(messages):
                ids = encode_chat(tokenizer, messages)
            else:
                raise OptionError('it needs {"prompt": "text"} or {"messages": [{"role": ..., "content": ...}]}')
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from error
        yield ids[: wanted.sequence_tokens]


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages)
    )
