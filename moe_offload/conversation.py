"""A conversation with a model: its turns, their room, and the cache kept between them."""

from collections.abc import Callable, Sequence

from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moe_offload.generation import Generation, generate
from moe_offload.prompts import (
    Message,
    encode_chat,
    max_context,
    require_known_ids,
    room_for_answer,
)
from moe_offload.sampling import Sampling

# Of a full context, what is kept free for the answer before old turns are dropped for it.
_ANSWER_SHARE = 4
_MAX_NEW_TOKENS = 2048


class Conversation:
    """Turns of a user and a model.

    `ask` adds one; the cache makes the model read only what is new.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        system: str = "",
        reuse_cache: bool = True,
        show_progress: bool = False,
    ) -> None:
        self.messages: list[Message] = []  # without the system's
        self.system = system
        self.dropped = 0  # turns that `ask` had to leave out for want of room, the last time
        self._model = model
        self._tokenizer = tokenizer
        self._config = sampling.apply(model.generation_config)
        self._max_new = sampling.max_new_tokens or self._config.max_new_tokens or _MAX_NEW_TOKENS
        self._reuse_cache = reuse_cache
        self._show_progress = show_progress
        self._cache: DynamicCache | None = None
        self._cached_ids: tuple[int, ...] = ()

    def ask(self, text: str, on_text: Callable[[str], None]) -> Generation:
        """The model's answer to `text`. Both become part of the conversation, an interrupted answer
        as far as it went.

        The oldest turns are dropped when there is no room for them any more.

        Raises OptionError, leaving the conversation as it was, when `text` alone is too long for
        the context.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        ids, room, self.dropped = self._fit(turns)
        self._config.max_new_tokens = room
        cache = self._cache_for(ids)
        self._cache = None  # whatever happens now, it is not what it was
        generation = generate(
            self._model, self._tokenizer, ids, self._config,
            on_text=on_text, cache=cache, show_progress=self._show_progress,
        )  # fmt: skip
        self._cache, self._cached_ids = generation.cache, generation.cached_ids
        if generation.new_ids:
            answer = {"role": "assistant", "content": generation.text}
            self.messages = [*turns[self.dropped * 2 :], answer]
        return generation

    def clear(self) -> None:
        """Forget all turns; the system's message stays."""
        self.messages = []

    def _fit(self, turns: list[Message]) -> tuple[list[int], int, int]:
        """Token ids, room for the answer, and how many old turns had to go."""
        context = max_context(self._model.config)
        dropped = 0
        while True:
            ids = self._encode(turns[dropped * 2 :])
            rest = len(turns) - dropped * 2
            wanted = min(self._max_new, (context or 0) // _ANSWER_SHARE)
            if context is None or rest == 1 or len(ids) + wanted <= context:
                return ids, room_for_answer(len(ids), context, self._max_new), dropped
            dropped += 1

    def _encode(self, turns: Sequence[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        ids = encode_chat(self._tokenizer, [*system, *turns])
        require_known_ids(ids, self._model.config)
        return ids

    def _cache_for(self, ids: Sequence[int]) -> DynamicCache | None:
        """The cache, cut to what it shares with the beginning of `ids`; None where that fails."""
        if not self._reuse_cache or self._cache is None:
            return None
        same = 0
        for ours, theirs in zip(self._cached_ids, ids[:-1], strict=False):  # one token must be left to read
            if ours != theirs:
                break
            same += 1
        surplus = len(self._cached_ids) - same
        if same == 0:
            return None
        if surplus:
            try:
                self._cache.crop(-surplus)
            except (
                RuntimeError,
                ValueError,
                NotImplementedError,
            ):  # a sliding window has forgotten too much
                return None
        return self._cache if self._cache.get_seq_length() == same else None
