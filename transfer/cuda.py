"""A CUDA device. torch owns the memory, the streams and the events; CuPy, where kernels want it, launches on them.

- Device memory comes from torch's allocator, so that the model's modules and we do not hoard it from each other.
- A copy is `tensor.copy_(other, non_blocking=True)` between device memory and a `PinnedArena`: torch makes one
  cudaMemcpyAsync of it on the current stream, which returns at once because the host side is page-locked. No other host
  memory is accepted: its copies would go through a buffer of the driver, and the caller would wait.
- Launches read and write arena memory in place, through its address on the device.
- A failed call makes the device lost, unless it was out of memory (`cuda_errors.py`). `free`, giving back a
  reservation, `run_host` and `close` work on a lost device, and so does the host's side of arenas.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import (
    Accelerator,
    Buffer,
    DeviceLostError,
    OutOfDeviceMemoryError,
    Span,
    Stream,
    Work,
)
from moe_offload.transfer.cuda_errors import Health
from moe_offload.transfer.cuda_stream import CudaEvent, CudaRuntime, CudaStream
from moe_offload.transfer.page_locker import CudaPageLocker, PageLocker
from moe_offload.transfer.pinned_arena import PinnedArena, PinnedBuffer

HEAD_ROOM = 600_000_000  # left free for cuBLAS, kernels' code and what torch's allocator rounds up


class _Memory:
    """One allocation; None when it was given back."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor


class DeviceBuffer(Buffer):
    """Bytes `start` on of an allocation."""

    __slots__ = ("memory", "start", "name", "nbytes", "_tensor")
    on_device = True

    def __init__(self, memory: _Memory, start: int, nbytes: int, name: str) -> None:
        self.memory, self.start, self.nbytes, self.name = memory, start, nbytes, name
        self._tensor: torch.Tensor | None = None

    def part(self, offset: int, nbytes: int) -> "DeviceBuffer":
        if offset < 0 or nbytes <= 0 or offset + nbytes > self.nbytes:
            raise IndexError(f"{self.name}: {nbytes} bytes from byte {offset} on are not in its {self.nbytes} bytes")
        return DeviceBuffer(self.memory, self.start + offset, nbytes, f"{self.name}[{offset}:{offset + nbytes}]")

    def host(self, *, write: bool = False) -> NDArray[np.uint8]:
        raise TypeError(f"{self.name} is device memory: the host cannot reach it, copy it out")

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [nbytes] on the device."""
        if self.memory.tensor is None:
            raise ValueError(f"{self.name} was given back")
        if self._tensor is None:
            with torch.inference_mode(False):
                self._tensor = self.memory.tensor[self.start : self.start + self.nbytes]
        return self._tensor

    @property
    def seen(self) -> torch.Tensor:
        """What a kernel gets."""
        return self.tensor


class CudaAccelerator(Accelerator):
    """The device that torch calls cuda:`index`. `budget` None: what is free now, less `HEAD_ROOM`.

    Raises ValueError for a budget that is larger than the card.
    """

    simulated = False
    compute: CudaStream

    def __init__(self, index: int = 0, budget: int | None = None) -> None:
        self.index = index
        self.torch_device = self._device = torch.device("cuda", index)
        self.health = Health(f"cuda:{index}")
        with self.health:
            self.name = torch.cuda.get_device_name(index)
            self.health.device = f"{self.name} (cuda:{index})"
            free, total = torch.cuda.mem_get_info(index)
            # what torch's allocator holds without using it is free to us
            free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        if budget is None:
            budget = max(free - HEAD_ROOM, 0)
        if not 0 <= budget <= total:
            raise ValueError(f"a budget of {budget} bytes: {self.health.device} has 0 to {total}")
        self.budget = budget
        self.used = self.peak = 0
        self.runtime = CudaRuntime(index, self.health)
        self.compute = CudaStream(self.runtime, "compute", None)
        self._memory: dict[_Memory, int] = {}
        self._arenas: set[PinnedArena] = set()
        self._locker: PageLocker | None = None
        self._timeline: list[tuple[str, str, CudaEvent, CudaEvent]] | None = None
        self._host_spans: list[Span] = []

    # memory

    def allocate(self, nbytes: int, name: str) -> DeviceBuffer:
        if nbytes <= 0:
            raise ValueError(f"{name}: {nbytes} bytes asked for, at least 1 is needed")
        with self.health:
            self._require(nbytes, name)
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside of it
                tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._device)  # aligned to 512 bytes
            # Work on the current stream may still use the block, and only that stream is ordered after it.
            torch.cuda.current_stream(self._device).synchronize()
        memory = _Memory(tensor)
        self._memory[memory] = nbytes
        self._use(nbytes)
        return DeviceBuffer(memory, 0, nbytes, name)

    def free(self, buffer: Buffer) -> None:
        if not isinstance(buffer, DeviceBuffer) or buffer.memory not in self._memory:
            raise TypeError(
                f"{getattr(buffer, 'name', buffer)!r} is no device memory of this accelerator, or given back"
            )
        if buffer.nbytes != self._memory[buffer.memory]:
            raise ValueError(f"{buffer.name} is a part: only the whole can be freed")
        self._release(buffer.memory)

    def _release(self, memory: _Memory) -> None:
        tensor, memory.tensor = memory.tensor, None
        self.used -= self._memory.pop(memory)
        if tensor is not None:
            with suppress(RuntimeError):  # of a lost device
                tensor.untyped_storage().resize_(0)  # parts may still have views of it

    def reserve(self, nbytes: int, name: str) -> None:
        if nbytes > 0:
            with self.health:
                self._require(nbytes, name)
        elif -nbytes > self.used:
            raise ValueError(f"{name}: {-nbytes} bytes given back, {self.used} are used")
        self._use(nbytes)

    def _require(self, nbytes: int, name: str) -> None:
        if self.used + nbytes > self.budget:
            left = max(self.budget - self.used, 0)
            raise OutOfDeviceMemoryError(
                f"{name}: {nbytes} bytes asked for, {left} left of {self.budget} on {self.name}"
            )

    def _use(self, nbytes: int) -> None:
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def host_arena(self, nbytes: int) -> PinnedArena:
        with self.health:
            if self._locker is None:
                self._locker = CudaPageLocker(self.index)
        arena = PinnedArena(nbytes, self._locker)  # its MemoryError is about the host
        self._arenas = {known for known in self._arenas if not known.closed} | {arena}
        return arena

    # work

    def stream(self, name: str) -> CudaStream:
        with self.health:
            raw = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return CudaStream(self.runtime, name, raw)

    def copy_in(self, device: Buffer, host: Buffer, stream: Stream) -> None:
        self._copy(self._host_side(host), self._device_side(device), self._own(stream), inwards=True)

    def copy_out(self, host: Buffer, device: Buffer, stream: Stream) -> None:
        self._copy(self._host_side(host), self._device_side(device), self._own(stream), inwards=False)

    def _copy(self, host: PinnedBuffer, device: DeviceBuffer, stream: CudaStream, *, inwards: bool) -> None:
        if host.nbytes != device.nbytes:
            raise ValueError(f"{host.name} has {host.nbytes} bytes, {device.name} {device.nbytes}: not a copy")
        target, source = (device.tensor, host.tensor) if inwards else (host.tensor, device.tensor)
        start = self._mark(stream)
        with self.health, stream.entered():
            target.copy_(source, non_blocking=True)
        self._write_down(stream, device.name, start)

    def launch(
        self,
        stream: Stream,
        function: Callable[..., None],
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        work: Work,
        name: str = "kernel",
    ) -> None:
        own = self._own(stream)
        with self.health:
            tensors = [self._side(buffer).seen for buffer in (*reads, *writes)]
        start = self._mark(own)
        with self.health, own.entered():
            function(*tensors)
        self._write_down(own, name, start)

    def run_host(self, function: Callable[[], None], work: Work, name: str = "experts") -> None:
        start = time.perf_counter()
        function()
        if self._timeline is not None:
            self._host_spans.append(Span("host", name, start, time.perf_counter()))

    def _own(self, stream: Stream) -> CudaStream:
        if not isinstance(stream, CudaStream) or stream.runtime is not self.runtime:
            raise TypeError(f"{stream!r} is no stream of this accelerator")
        return stream

    def _host_side(self, buffer: Buffer) -> PinnedBuffer:
        if not isinstance(buffer, PinnedBuffer) or buffer.arena not in self._arenas:
            what = getattr(buffer, "name", None) or type(buffer).__name__
            raise TypeError(f"{what} is not in an arena of this accelerator, and a copy of it would make the host wait")
        return buffer

    def _device_side(self, buffer: Buffer) -> DeviceBuffer:
        if not isinstance(buffer, DeviceBuffer):
            raise TypeError(f"{getattr(buffer, 'name', buffer)!r} is not on the device")
        if buffer.memory not in self._memory:
            raise ValueError(f"{buffer.name} is no memory of this accelerator, or was given back")
        return buffer

    def _side(self, buffer: Buffer) -> PinnedBuffer | DeviceBuffer:
        return self._device_side(buffer) if buffer.on_device else self._host_side(buffer)

    # time

    def now(self) -> float:
        return time.perf_counter()

    def keep_timeline(self, on: bool) -> None:
        self._timeline = [] if on else None
        self._host_spans = []
        self.runtime.waits = [] if on else None
        if on:
            self.runtime.tie()

    def timeline(self) -> list[Span]:
        """Waits for what was written down last."""
        if self._timeline is None or self.runtime.waits is None:
            return []
        marks, spans, waits = self._timeline, self._host_spans, self.runtime.waits
        self._timeline, self._host_spans, self.runtime.waits = [], [], []
        spans += [Span("host", "wait", start, end) for start, end in waits]
        for track, name, start, end in marks:
            with self.health:
                end.raw.synchronize()
            began = start.time()
            spans.append(Span(track, name, began, max(began, end.time())))  # two bases may differ by microseconds
        return sorted(spans, key=lambda span: span.start)

    def _mark(self, stream: CudaStream) -> CudaEvent | None:
        return None if self._timeline is None else stream.record(timed=True)

    def _write_down(self, stream: CudaStream, name: str, start: CudaEvent | None) -> None:
        if start is not None and self._timeline is not None:
            self._timeline.append((stream.name, name, start, stream.record(timed=True)))

    def close(self) -> None:
        if self.health.gone is None:
            with suppress(DeviceLostError), self.health:
                torch.cuda.synchronize(self._device)
        for arena in self._arenas:
            arena.close()
        for memory in list(self._memory):
            self._release(memory)
        self._arenas, self._timeline, self.runtime.waits = set(), None, None
        if self.health.gone is None:
            torch.cuda.empty_cache()
            self.health.gone = f"{self.health.device} is closed"
