"""How the next token is chosen: the flags' values, checked before a model is loaded.

A value of None leaves the choice to the model's own generation_config, which is checked as well.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moe_offload.models.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from transformers import GenerationConfig


class _Bounds(NamedTuple):
    low: float
    high: float
    words: str

    def hold(self, value: object) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and self.low <= value <= self.high
        )


# Wide enough for any use; beyond them a 32-bit logit overflows and every probability becomes NaN.
_BOUNDS = {
    "temperature": _Bounds(0.001, 1000, "0 (greedy) or between 0.001 and 1000"),
    "top_k": _Bounds(0, 2**31 - 1, "at least 0"),
    "top_p": _Bounds(1e-6, 1, "more than 0 and at most 1"),
    "min_p": _Bounds(0, 1, "between 0 and 1"),
    "repetition_penalty": _Bounds(0.1, 10, "between 0.1 and 10"),
    "seed": _Bounds(0, 2**63 - 1, "between 0 and 2^63 - 1"),
    "max_new_tokens": _Bounds(1, 2**31 - 1, "at least 1"),
}
_CHANCE = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters as the command line takes them.

    Raises OptionError for values out of bounds.
    """

    temperature: float | None = None  # 0 means greedy
    top_k: int | None = None  # 0 switches it off
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    greedy: bool = False
    seed: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, bounds in _BOUNDS.items():
            value = getattr(self, name)
            if value is None or bounds.hold(value) or (name == "temperature" and value == 0):
                continue
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} {value} is out of bounds: it must be {bounds.words}")
        if self.greedy and self._asks_for_chance():
            raise OptionError(
                "--greedy takes the most probable token, so --temperature, --top-k, --top-p and "
                "--min-p have no meaning beside it: give one or the other"
            )

    def apply(self, defaults: "GenerationConfig") -> "GenerationConfig":
        """A copy of a model's generation_config with these values in it.

        Raises CheckpointError when what the model says itself is out of bounds.
        """
        config = copy.deepcopy(defaults)
        # One sequence, streamed: beams have none to show before the end.
        config.num_beams = config.num_return_sequences = 1
        config.max_length = config.min_length = None
        if self.greedy or self.temperature == 0:
            config.do_sample = False
        elif self._asks_for_chance():
            config.do_sample = True
        for name in (*_CHANCE, "repetition_penalty", "max_new_tokens"):
            given = getattr(self, name)
            if name in _CHANCE and not config.do_sample:
                setattr(config, name, None)
            elif given is not None:
                setattr(config, name, given)
            value = getattr(config, name)
            if value is not None and not _BOUNDS[name].hold(value):
                raise CheckpointError(
                    f"the model's generation_config.json says {name} {value!r}, which must be "
                    f"{_BOUNDS[name].words}: mend it, or give --{name.replace('_', '-')}"
                )
        return config

    def _asks_for_chance(self) -> bool:
        """Whether a flag says how to choose at random."""
        return any(getattr(self, name) for name in _CHANCE) or self.top_k == 0
