"""Tokens in, text out as soon as it is certain, with the times at which they came."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

# What a decoder puts where bytes are no character, or not yet a whole one.
_INCOMPLETE = "\ufffd"


class TextDecoder:
    """Turns a growing list of tokens into a growing text.

    A token need not be a character: one may hold half of it, and some tokenizers write a space only
    between two tokens. So each piece is the difference between the text of a few tokens with and
    without the new ones, and is held back while it ends in half a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(before)  # tokens whose text is known, then those still to be shown
        self._known = len(self._window)

    def add(self, token: int) -> str:
        """The text that `token` makes certain; may be empty."""
        self._window.append(token)
        return self._piece(whole=True)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._piece(whole=False)

    def _piece(self, whole: bool) -> str:
        known = self._decode(self._window[: self._known])
        text = self._decode(self._window)
        if len(text) <= len(known) or (whole and text.endswith(_INCOMPLETE)):
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class TextStream(BaseStreamer):  # type: ignore[misc]
    """What `generate` hands its tokens to.

    `on_token` is called for each, with the text it made certain.
    """

    def __init__(self, decoder: TextDecoder, on_token: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.started = self.first = self.last = time.perf_counter()
        self._decoder = decoder
        self._on_token = on_token
        self._prompt_passed = False

    def put(self, value: Any) -> None:
        if not self._prompt_passed:  # generate() puts the prompt first
            self._prompt_passed = True
            return
        self.last = time.perf_counter()
        if not self.ids:
            self.first = self.last
        for token in value.flatten().tolist():
            self.ids.append(token)
            self._emit(self._decoder.add(token))

    def end(self) -> None:
        """Called by generate(); after an interruption by us."""
        self._emit(self._decoder.rest())

    def _emit(self, piece: str) -> None:
        self.text += piece
        self._on_token(piece)
