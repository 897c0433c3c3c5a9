"""What a device is to the rest of the program: memory, streams, events, copies, launches, a clock.

Two implementations share all code above: `cuda.py` (torch owns the memory) and `virtual.py` (real numbers, modelled
time, hard budget, race detection). The protocol, which the virtual one enforces:

- An operation on a stream runs after what was put on that stream before it, and after every event the stream was told
  to wait for. Nothing else orders two operations: a copy on one stream and a kernel on another need an event between
  them.
- Memory that an operation in flight reads or writes is not written, read, reused or freed by anybody that is not
  ordered after it. The host is ordered after an operation once it has synchronised with an event recorded behind it.
- Copies are asynchronous, so their host side lies in a `HostArena`: page-locked memory that the device can reach. A
  copy from other memory would make the caller wait, silently; here it is an error.
- Small data on the compute path (routing to the host, the CPU's share of an output back) is not copied: the copy engine
  works in order, and a small copy waits behind megabytes of experts. A launch may read and write arena memory itself.

Every operation takes a `Work`, which says how much it reads and multiplies: the virtual accelerator makes time of it,
the real one ignores it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray


class DeviceError(RuntimeError):
    """Something about the device."""


class OutOfDeviceMemoryError(DeviceError, MemoryError):
    """An allocation does not fit; the message says how much was asked for and how much there is."""


class DeviceLostError(DeviceError):
    """The device does not answer any more, and what its memory held is gone. Every later operation raises it too."""


@dataclass(frozen=True, slots=True)
class Work:
    """Weights that are read and multiplied: for each entry of `rows`, `nbytes` are read once and `rows[i]` rows cost
    `flops_per_row` each. `link_bytes` go over the link without a copy (mapped memory). `launches`: kernels started.
    """

    nbytes: int = 0
    flops_per_row: int = 0
    rows: Sequence[int] | NDArray[Any] = (1,)
    link_bytes: int = 0
    launches: int = 1


NOTHING = Work()


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time: for traces. Seconds on the accelerator's clock."""

    track: str
    name: str
    start: float
    end: float


class Buffer(ABC):
    """Bytes on the device or in a host arena."""

    name: str
    nbytes: int
    on_device: bool

    @abstractmethod
    def part(self, offset: int, nbytes: int) -> "Buffer":
        """Some of the bytes; IndexError outside of the buffer. Ordering is that of the whole buffer."""

    @abstractmethod
    def host(self, *, write: bool = False) -> NDArray[np.uint8]:
        """The bytes as the host sees them, [nbytes]; TypeError for device memory."""


class Event(ABC):
    """A point on a stream."""

    @abstractmethod
    def query(self) -> bool:
        """Whether the stream has passed it. Does not order the host behind it: see `synchronize`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the stream has passed it."""

    @abstractmethod
    def time(self) -> float:
        """When the stream passed it, on the accelerator's clock; for an event recorded with timed=True and passed."""


class Stream(ABC):
    """Operations in order."""

    name: str

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is put on the stream from now on runs after `event`."""

    @abstractmethod
    def record(self, *, timed: bool = False) -> Event:
        """An event behind everything on the stream so far."""

    def synchronize(self) -> None:
        """Wait for everything on the stream so far."""
        self.record().synchronize()


class HostArena(ABC):
    """Page-locked host memory of a fixed size."""

    nbytes: int

    @abstractmethod
    def take(self, nbytes: int, name: str) -> Buffer:
        """The next bytes, aligned to 4096, for the arena's life. MemoryError when they do not fit."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Harmless when done twice. RaceError-s of the virtual one tell of copies in flight."""


class Accelerator(ABC):
    """A device with `budget` bytes for us. Not thread-safe: one thread at a time."""

    name: str  # such as "NVIDIA GeForce GTX 1080 Ti", or "virtual gtx1080ti"
    budget: int  # bytes, hard
    used: int  # of them, now
    peak: int  # the most ever used
    torch_device: torch.device  # where torch keeps what the model's modules compute; the CPU for a virtual one
    simulated: bool  # times are modelled, not measured
    compute: Stream  # what the model's own modules run on

    @abstractmethod
    def allocate(self, nbytes: int, name: str) -> Buffer:
        """Device memory, not initialised. Raises OutOfDeviceMemoryError."""

    @abstractmethod
    def free(self, buffer: Buffer) -> None:
        """Give device memory back (a whole allocation, no part)."""

    @abstractmethod
    def reserve(self, nbytes: int, name: str) -> None:
        """Count memory that is not ours to allocate (the model's parameters, its KV cache) in `used`; negative gives
        back.

        Raises OutOfDeviceMemoryError.
        """

    @abstractmethod
    def host_arena(self, nbytes: int) -> HostArena:
        """Page-locked host memory. Raises MemoryError when the system refuses."""

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """A new stream."""

    @abstractmethod
    def copy_in(self, device: Buffer, host: Buffer, stream: Stream) -> None:
        """Host to device, asynchronous; both of one size."""

    @abstractmethod
    def copy_out(self, host: Buffer, device: Buffer, stream: Stream) -> None:
        """Device to host, asynchronous; both of one size."""

    @abstractmethod
    def launch(
        self,
        stream: Stream,
        function: Callable[..., None],
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        work: Work,
        name: str = "kernel",
    ) -> None:
        """Put `function(*tensors)` on the stream: a torch uint8 tensor [nbytes] for each of reads, then writes.

        The function starts device work and returns; it must not wait for it.
        """

    @abstractmethod
    def run_host(self, function: Callable[[], None], work: Work, name: str = "experts") -> None:
        """Run CPU work on the calling thread. The virtual clock advances by what the work would take on its server."""

    @abstractmethod
    def now(self) -> float:
        """Seconds on the host's clock."""

    @abstractmethod
    def keep_timeline(self, on: bool) -> None:
        """Whether operations are written down from now on."""

    @abstractmethod
    def timeline(self) -> list[Span]:
        """What was written down since it was switched on, or since the last call."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight and give everything back. Harmless when done twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_tensor(data: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A launch's bytes seen as `shape` elements of `dtype`, from the first byte on."""
    count = int(np.prod(shape)) * dtype.itemsize
    return data[:count].view(dtype).view(*shape)
