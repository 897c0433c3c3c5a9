"""The engine's options: decided once at load, frozen, checked here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from moe_offload.models.errors import OptionError

# Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

Weights = Literal["auto", "bf16", "f16", "f32", "fp8", "mxfp4"]


@dataclass(frozen=True, slots=True)
class Options:
    """How the engine runs a model.

    weights: format of the expert weights; "auto" takes them as they are stored. Naming a format asserts that it is the
        stored one.
    threads: CPU threads for the expert kernels; None takes the physical cores that this process may use.
    memory_limit: bytes that the model may take of this machine's memory; None takes what is free.
    gemm_rows: tokens per expert from which on torch's matrix product runs an expert instead of our kernels. The
        kernels are made to read weights once for a few tokens; a GEMM has the arithmetic for many. None takes the
        measured crossover.

    Raises OptionError for values out of bounds.
    """

    weights: Weights = "auto"
    threads: int | None = None
    memory_limit: int | None = None
    gemm_rows: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise OptionError(f"weights={self.weights!r} is not one of {', '.join(get_args(Weights))}")
        for name in ("threads", "memory_limit", "gemm_rows"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f"{name}={value!r} must be a whole number of at least 1, or None")
