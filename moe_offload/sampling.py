"""How the next token is chosen: the flags' values, checked before a model is loaded.

A value of None leaves the choice to the model's own generation_config.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_offload.models.errors import OptionError

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Wide enough for any use; beyond them a 32-bit logit overflows and every probability becomes NaN.
_TEMPERATURES = (0.001, 1000.0)
_PENALTIES = (0.1, 10.0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters as the command line takes them. Raises OptionError for values out of bounds."""

    temperature: float | None = None  # 0 means greedy
    top_k: int | None = None  # 0 switches it off
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    greedy: bool = False
    seed: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        if self.temperature != 0:
            _require("temperature", self.temperature, low, high, "0 (greedy) or ")
        _require("top-p", self.top_p, 0, 1, "more than 0 and ", open_below=True)
        _require("min-p", self.min_p, 0, 1)
        _require("repetition-penalty", self.repetition_penalty, *_PENALTIES)
        _require("top-k", self.top_k, 0)
        _require("seed", self.seed, 0, 2**63 - 1)
        _require("max-new-tokens", self.max_new_tokens, 1)
        if self.greedy and self._samples():
            raise OptionError(
                "--greedy takes the most probable token, so --temperature, --top-k, --top-p and "
                "--min-p have no meaning beside it: give one or the other"
            )

    def apply(self, defaults: "GenerationConfig") -> "GenerationConfig":
        """A copy of a model's generation_config with these values in it."""
        config = copy.deepcopy(defaults)
        # One sequence, streamed: beams and assistants have none to show before the end.
        config.num_beams = config.num_return_sequences = 1
        config.max_length = config.min_length = None
        if self.greedy or self.temperature == 0:
            config.do_sample = False
            config.temperature = config.top_k = config.top_p = config.min_p = None
        elif self._samples():
            config.do_sample = True
        if config.do_sample:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                if (value := getattr(self, name)) is not None:
                    setattr(config, name, value)
        if self.repetition_penalty is not None:
            config.repetition_penalty = self.repetition_penalty
        return config

    def _samples(self) -> bool:
        """Whether a flag asks for random choice."""
        values = (self.temperature or None, self.top_k, self.top_p, self.min_p)
        return any(value is not None for value in values)


def _require(
    flag: str,
    value: float | None,
    low: float,
    high: float = math.inf,
    also: str = "",
    *,
    open_below: bool = False,
) -> None:
    if value is None:
        return
    if low <= value <= high and not (open_below and value == low) and math.isfinite(value):
        return
    if open_below:
        bounds = f"{also}at most {high}"
    elif high == math.inf:
        bounds = f"{also}at least {low}"
    else:
        bounds = f"{also}between {low} and {high}"
    raise OptionError(f"--{flag} {value} is out of bounds: it must be {bounds}")
