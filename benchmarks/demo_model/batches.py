"""From text to batches: token streams, windows of them, and what each step learns from."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.demo_model.corpus import BOS, EOS, Corpus, conversations, render

Ints = np.ndarray[Any, np.dtype[np.int64]]


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Ints:
    """One stream of tokens; the texts carry their own special tokens."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])


class Windows:
    """Windows of a token stream; the window at an index depends on the seed and the index only.

    Each pass over the stream starts at another offset and has another order.
    """

    def __init__(self, stream: Ints, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self._order: tuple[tuple[int, int], Ints] | None = None

    def at(self, index: int, size: int) -> Ints:
        """A window of size + 1 tokens: the inputs and, one further, the targets."""
        count = (len(self.stream) - 1) // size - 1
        epoch, position = divmod(index, count)
        if self._order is None or self._order[0] != (epoch, size):
            random = np.random.default_rng([self.seed, epoch, size])
            starts = random.integers(size) + size * random.permutation(count)
            self._order = ((epoch, size), starts)
        start = self._order[1][position]
        return self.stream[start : start + size + 1]


class Batches:
    """Rows of files and, for a `chat_share` of them, of conversations."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        tokens_per_step: int,
        chat_share: float,
    ) -> None:
        files = (BOS + document.text + EOS for document in corpus.train)
        chats = map(render, conversations(corpus.train))
        self.files = Windows(encode_all(tokenizer, files), seed)
        self.chats = Windows(encode_all(tokenizer, chats), seed + 1)
        self.tokens_per_step = tokens_per_step
        self.chat_share = chat_share

    def at(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, [B, T] each: a function of the step and nothing else."""
        rows = self.tokens_per_step // size
        first_chat = math.floor(step * self.chat_share * rows)
        chats = math.floor((step + 1) * self.chat_share * rows) - first_chat
        first_file = step * rows - first_chat
        windows = [self.chats.at(first_chat + row, size) for row in range(chats)]
        windows += [self.files.at(first_file + row, size) for row in range(rows - chats)]
        tokens = torch.from_numpy(np.stack(windows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
