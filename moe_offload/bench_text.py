"""Tokens for benchmarks: real text, since a router sends random tokens to experts that no text asks for.

Real text is Python's own standard library, as sources with their documentation: it is wherever this program runs. Every
sequence begins in a document of its own, at a line drawn from a seed, and goes on with the next document where that one
ends. The same seed gives the same tokens in every run.
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from moe_offload.models.errors import OptionError
from moe_offload.prompts import require_known_ids

Ids = NDArray[np.int64]

_CHARACTERS = 8  # of a token, at least as many as are usual: more text is read where it is too little
_LONG_LINE = 1000  # a sequence begins inside of it
_LEAST_BYTES = 20_000  # of a source to be a document of its own


class Tokens(Protocol):
    """Where sequences come from."""

    description: str  # for tables: what kind of text

    def take(self, count: int, length: int) -> Ids:
        """[count, length] token ids, other ones with every call."""


class RandomTokens:
    """Any tokens of the vocabulary but those that begin, end or fill a text."""

    description = "random tokens"

    def __init__(self, config: PreTrainedConfig, seed: int = 0) -> None:
        text = config.get_text_config(decoder=True)
        special = [getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
        named = [each for ids in special if ids is not None for each in (ids if isinstance(ids, list) else [ids])]
        self._ids = np.setdiff1d(np.arange(int(text.vocab_size)), np.array(named, np.int64))
        self._rng = np.random.default_rng(seed)

    def take(self, count: int, length: int) -> Ids:
        return self._rng.choice(self._ids, (count, length))


class RealText:
    """Stretches of documents, which are read when they are wanted.

    Raises OptionError where there is no text, CheckpointError where the tokenizer belongs to another model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        documents: Sequence[Callable[[], str]],
        description: str,
        seed: int = 0,
    ) -> None:
        self.description = description
        self._tokenizer, self._config, self._documents = tokenizer, config, documents
        self._rng = np.random.default_rng(seed)
        self._order = self._documents_for_ever()
        first: list[int] = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self._begin = [bos] if bos is not None and first[:1] == [bos] else []

    def take(self, count: int, length: int) -> Ids:
        return np.array([self._sequence(length) for _ in range(count)], np.int64).reshape(count, length)

    def _sequence(self, length: int) -> list[int]:
        ids, fruitless = list(self._begin), 0
        text = next(self._order)
        start = int(self._rng.integers(len(text))) if text else 0
        line = text.find("\n", start, start + _LONG_LINE)
        start = start if line < 0 else line + 1
        while True:
            wanted = _CHARACTERS * (length - len(ids)) + 64
            more: list[int] = self._tokenizer(text[start : start + wanted], add_special_tokens=False)["input_ids"]
            fruitless = 0 if more else fruitless + 1
            if fruitless > 1 + len(self._documents):
                raise OptionError(f"{self.description} has no token: give another")
            ids += more
            if len(ids) >= length:
                break
            text, start = next(self._order), 0
        require_known_ids(ids[:length], self._config)
        return ids[:length]

    def _documents_for_ever(self) -> Iterator[str]:
        while True:
            for at in self._rng.permutation(len(self._documents)):
                yield self._documents[int(at)]()


def standard_library(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> RealText:
    """Text of Python's standard library. Raises OptionError where its sources are not there."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size >= _LEAST_BYTES)
    if not paths:
        raise OptionError(f"{folder} has no sources of Python's library to take text from: give --prompt-file FILE")
    return RealText(tokenizer, config, [_reader(path) for path in paths], "text of Python's standard library")


def _reader(path: Path) -> Callable[[], str]:
    return lambda: path.read_text(encoding="utf-8", errors="replace")
