"""Where it is measured: a card; or the CPU through the tests' host shim, with tiny shapes, to try the code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch

from benchmarks.gpu.timer import Call, CudaTimer, Series, Timer, WallTimer, take_turns
from benchmarks.reporting import progress
from moe_offload.cpu_kernels.layout import Activation
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, StoredType
from moe_offload.gpu_kernels.launch import Kernels

_BEYOND_CACHE = 5  # times the L2 cache: what calls rotate through
_MOST_CALLS = 128  # in a sample: the driver queues a thousand launches, then the host waits
_SHARE_OF_FREE = 0.5  # of the card's free memory, at most


@dataclass(frozen=True, slots=True)
class Shape:
    """Experts of one model's layer."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    formats: tuple[StoredType, ...]
    activation: Activation = Activation("silu")
    bias: bool = False

    def record(self, dtype: StoredType) -> ExpertRecord:
        return ExpertRecord(self.hidden, self.inner, dtype, bias=self.bias)


QWEN3 = Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, ("int4", "int8", "bf16"))
SHAPES = (
    QWEN3,
    Shape("Mixtral-8x7B", 4096, 14336, 8, 2, ("int4", "int8", "bf16")),
    Shape("gpt-oss-20b", 2880, 2880, 32, 4, ("mxfp4",), Activation("swiglu_oai", 1.702, 7.0), bias=True),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6, ("int4", "int8", "bf16")),
)
TINY = (
    Shape("tiny", 64, 32, 4, 2, ("int4", "bf16")),
    Shape("tiny, biased", 64, 64, 2, 1, ("mxfp4",), Activation("swiglu_oai", 1.702, 7.0), bias=True),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. rounds: samples of a contestant; calls: in a sample."""

    shapes: tuple[Shape, ...] = SHAPES
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16)
    many_tokens: tuple[int, ...] = (64, 256, 1024, 4096)
    crossover: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    rounds: int = 30
    calls: int = 16
    copied_bytes: int = 1 << 30
    linked_bytes: int = 256 << 20


SMOKE = Sizes(TINY, (1, 3), (5,), (1, 4), (130,), rounds=1, calls=2, copied_bytes=1 << 16, linked_bytes=1 << 16)


@dataclass(frozen=True, slots=True)
class Bench:
    """A device, what compiles for it, its clock, and what of it decides the sizes."""

    device: torch.device
    kernels: Kernels
    timer: Timer
    sizes: Sizes
    capability: tuple[int, int]
    processors: int
    cache_bytes: int
    left_out: list[str] = field(default_factory=list)  # what could not be measured here, and why

    @classmethod
    def of_card(cls, index: int = 0) -> Self:
        """KernelError and RuntimeError where the card cannot be used."""
        from moe_offload.gpu_kernels.cupy_kernels import CupyKernels

        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        facts = torch.cuda.get_device_properties(device)
        cache = int(getattr(facts, "L2_cache_size", 0)) or 64 << 20  # an older torch does not tell
        return cls(
            device, CupyKernels(index), CudaTimer(device), Sizes(), (facts.major, facts.minor),
            int(facts.multi_processor_count), cache,
        )  # fmt: skip

    @classmethod
    def of_host(cls) -> Self:
        """Kernels built with g++, run on the CPU."""
        from tests.gpu_kernels.host_kernels import HostKernels

        return cls(torch.device("cpu"), HostKernels(), WallTimer(), SMOKE, (8, 0), 2, 0)

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """What cuBLAS and attention are given here: bf16 where the card has it."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16

    def copies(self, nbytes: int, least: int) -> int:
        """How many buffers of `nbytes` calls must rotate through, at least `least`; fewer where memory is short."""
        wanted = max(least, -(-_BEYOND_CACHE * self.cache_bytes // nbytes))
        if not self.on_card:
            return wanted
        room = int(torch.cuda.mem_get_info(self.device)[0] * _SHARE_OF_FREE) // nbytes
        if room < 1:
            raise MemoryError(f"{nbytes} bytes do not fit into half of the card's free memory")
        return min(wanted, room)

    def calls(self, nbytes: int) -> int:
        """How many calls that read `nbytes` each a sample needs, to go beyond the cache."""
        return max(self.sizes.calls, min(_MOST_CALLS, -(-_BEYOND_CACHE * self.cache_bytes // nbytes)))

    def times_the_cache(self, nbytes: int) -> float:
        """How often `nbytes` fill the L2 cache."""
        return round(nbytes / self.cache_bytes, 1) if self.cache_bytes else 0.0

    @contextmanager
    def within_memory(self, what: str) -> Iterator[None]:
        """What does not fit the card's memory is left out, and said."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.left_out.append(f"{what}: {str(error).partition(chr(10))[0]}")
            progress(self.left_out[-1])
        finally:
            if self.on_card:
                torch.cuda.empty_cache()  # `copies` asks how much is free

    def times(self, **contestants: Sequence[Call]) -> dict[str, Series]:
        """Interleaved samples of each contestant."""
        return take_turns(self.timer, contestants, self.sizes.rounds)
