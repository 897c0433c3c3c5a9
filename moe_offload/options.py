"""The engine's options: decided once at load, frozen, checked here."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from moe_offload.models.errors import OptionError
from moe_offload.scheduling.policy_names import POLICIES

# Called with what is being done ("compiling kernels (...)", "converting experts", ...), how much of it is done, and how
# much there is: kernels are counted, all else in bytes.
Progress = Callable[[str, int, int], None]

Weights = Literal["auto", "bf16", "f16", "f32", "fp8", "mxfp4", "int8", "int4"]
Activations = Literal["auto", "int16", "int8", "f32"]
DenseFormat = Literal["int8", "int4"]
Dense = Literal["auto", "stored", "int8", "int4"]
NO_PREDICTOR, LOOK_AHEAD = "off", "look-ahead"
NO_PREDICTOR_FILE = ("auto", NO_PREDICTOR, LOOK_AHEAD)  # predictors without a file that the user names


@dataclass(frozen=True, slots=True)
class Options:
    """How the engine runs a model.

    weights: format of the expert weights. "int8" and "int4" convert them once, into a pack on disk. "auto" takes them
        as they are stored if that fits in memory, else "int8", else "int4"; experts stored as MXFP4 are put into
        another order, losslessly. Naming any other format asserts that it is the stored one.
    threads: CPU threads for the expert kernels; None takes the physical cores that this process may use.
    memory_limit: bytes that the model may take of this machine's memory; None takes what is free.
    gemm_rows: tokens per expert from which on torch's matrix product runs an expert instead of our kernels. The
        kernels are made to read weights once for a few tokens; a GEMM has the arithmetic for many. None takes the
        measured crossover. Packed experts always run through our kernels.
    activations: precision of activations in products with packed weights; see `PackedExpertKernel`.
    pack_dir: folder for packs; None takes a folder in the user's cache.
    dense: format of the linears outside of the experts (attention, shared experts, dense layers, output head). "int8"
        and "int4" convert them once, into a pack of their own; "auto" takes "int8" with experts from a pack, else
        leaves them as stored.
    device: what runs the model beside the CPU: "auto" (the first usable NVIDIA card, else none), "cpu", "cuda",
        "cuda:N", or "virtual:PROFILE", a server that is simulated: real numbers, modelled times
        (transfer/server_profile.py).
    gpu_memory: bytes of the device's memory that the model may take, all in all; None takes what is free. ram: bytes of
    page-locked host memory for experts on their way to the device; None takes as many as there are experts. policy: who
    decides what runs where; see `scheduling/policies.py`. overlap: False waits for every copy and launch before the
    next: the same decisions one after the other. predictor: what says which experts the next layers will want, for a
    device's policies that copy ahead: "auto" (the one trained for this model, if there is one), "off", "look-ahead"
    (the next layers' routers) or a file; see `predictor_choice.py`. adapt: whether it follows the traffic.
    cuda_graphs: replay a CUDA graph for a layer whose experts are all on the card (`whole_layers.py`); off unless asked
        for, since no card has shown yet what it is worth.
    fused_decode: run a decode step's layers in one launch each where the architecture is known (decode_modules.py);
        False leaves every layer to transformers' modules.

    Raises OptionError for values out of bounds.
    """

    weights: Weights = "auto"
    threads: int | None = None
    memory_limit: int | None = None
    gemm_rows: int | None = None
    activations: Activations = "auto"
    pack_dir: str | os.PathLike[str] | None = None
    dense: Dense = "auto"
    fused_decode: bool = True
    device: str = "auto"
    gpu_memory: int | None = None
    ram: int | None = None
    policy: str = "ours"
    overlap: bool = True
    predictor: str | os.PathLike[str] = "auto"
    adapt: bool = True
    cuda_graphs: bool = False

    def dense_format(self, packed: bool, device: bool = False) -> Dense:
        """What `dense` comes to: "stored", "int8" or "int4".

        packed: whether the experts are read from a pack. device: whether linears are on a device.
        """
        if self.dense != "auto":
            return self.dense
        return "int8" if packed and not device else "stored"

    @property
    def names_predictor(self) -> bool:
        """Whether `predictor` is a file."""
        return self.predictor not in NO_PREDICTOR_FILE

    def __post_init__(self) -> None:
        for name, known in (("weights", Weights), ("activations", Activations), ("dense", Dense)):
            if getattr(self, name) not in get_args(known):
                raise OptionError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(known))}")
        if self.pack_dir is not None and (not isinstance(self.pack_dir, str | os.PathLike) or not str(self.pack_dir)):
            raise OptionError(f"pack_dir={self.pack_dir!r} is not the name of a folder")
        if not isinstance(self.predictor, str | os.PathLike) or not str(self.predictor):
            raise OptionError(f"predictor={self.predictor!r} is not {', '.join(NO_PREDICTOR_FILE)} or a file's name")
        if self.device == "cpu" and self.names_predictor:
            raise OptionError(f"predictor={str(self.predictor)!r} says what to copy to a device, but device is 'cpu'")
        if self.policy not in POLICIES:
            raise OptionError(f"there is no policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.device not in ("auto", "cpu", "cuda"):
            from moe_offload.transfer.find_device import parse_device  # imports torch

            try:
                parse_device(self.device)
            except ValueError as error:
                raise OptionError(str(error)) from error
        if self.device not in ("auto", "cpu") and self.dense in ("int8", "int4"):
            raise OptionError(f"dense={self.dense!r} packs linears for the CPU, but device={self.device!r} runs them")
        for name in ("threads", "memory_limit", "gemm_rows", "gpu_memory", "ram"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f"{name}={value!r} must be a whole number of at least 1, or None")
