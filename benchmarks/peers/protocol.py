"""What an engine must be able to do to be compared, and what it says when it cannot be had."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class MissingError(Exception):
    """This engine cannot run here; the message says what to install."""


class Engine(Protocol):
    """One loaded model. Prompts are token ids; those of a batch are equally long."""

    def describe(self) -> dict[str, Any]:
        """Version and settings that figures depend on."""
        ...

    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """Logits of every position: [prompts, tokens, vocabulary]."""
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from an empty cache to the token after the prompt."""
        ...

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Seconds of each step after the first token, greedily; a step gives every prompt one token."""
        ...


class Contestant(Protocol):
    """An engine that is timed, wherever it runs. most_tokens: of one forward that it has memory for."""

    most_tokens: float

    def call(self, method: str, **arguments: Any) -> Any:
        """The result of one of `Engine`'s methods, or of those that come before one is open."""
        ...

    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """As of `Engine`."""
        ...
