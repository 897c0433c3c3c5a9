"""The virtual accelerator: real numbers, modelled time, a hard budget, and every race is an error.

Operations run at once, in the order in which they are issued: one legal schedule out of many. Their data is real (torch
tensors of the host), their time is computed from a `ServerProfile` (`virtual_host.py` has the clocks), and every access
is checked (`virtual_memory.py`). No threads, no sleeping: the same run takes the same time again.

Time: a call costs the host `launch_seconds` for each launch or copy. An operation starts when the host has issued it,
its stream is through with what came before and with the events it waits for, and the engine it needs is free. There is
one for copies in, one for copies out and one for kernels, and each takes operations of all streams in the order of
submission: kernels do not overlap kernels. Bytes over mapped memory (`Work.link_bytes`) take the link's time, but do
not contend with copies.

With `ghost=True` nothing has data and functions are not called, while times, budgets and checks stay: for simulations
of models that do not fit this machine.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moe_offload.transfer.accelerator import (
    Accelerator,
    Buffer,
    DeviceError,
    DeviceLostError,
    OutOfDeviceMemoryError,
    Span,
    Stream,
    Work,
)
from moe_offload.transfer.server_profile import ServerProfile
from moe_offload.transfer.virtual_host import Mark, VirtualHost, VirtualStream
from moe_offload.transfer.virtual_memory import Allocation, RaceError, VirtualArena, VirtualBuffer

__all__ = ["RaceError", "VirtualAccelerator"]


class VirtualAccelerator(Accelerator):
    """The server that `profile` describes. `budget` is at most the card's memory (None: all of it); `seed` is of the
    noise.
    """

    simulated = True

    def __init__(
        self, profile: ServerProfile, budget: int | None = None, *, ghost: bool = False, seed: int = 0
    ) -> None:
        if budget is None:
            budget = profile.memory_bytes
        if not 0 <= budget <= profile.memory_bytes:
            raise ValueError(f"a budget of {budget} bytes: {profile.name} has {profile.memory_bytes}, choose fewer")
        self.name = f"virtual {profile.name}"
        self.profile, self.ghost, self.budget = profile, ghost, budget
        self.torch_device = torch.device("cpu")
        self.used = self.peak = 0
        # seconds of copies in and out, kernels, and work of the host's threads
        self.busy = {"h2d": 0.0, "d2h": 0.0, "compute": 0.0, "host": 0.0}
        self._host = VirtualHost(profile.wait_seconds)
        self._free_at = {"h2d": 0.0, "d2h": 0.0, "compute": 0.0}
        self._allocated: dict[Allocation, VirtualBuffer] = {}
        self._arenas: list[VirtualArena] = []
        self._random = np.random.default_rng(seed)
        self._noise: list[float] = []
        self.compute = self._host.add_stream("compute")

    def allocate(self, nbytes: int, name: str) -> VirtualBuffer:
        self._host.count_operation()
        if nbytes <= 0:
            raise ValueError(f"{name}: {nbytes} bytes asked for, at least 1 is needed")
        self._use(nbytes, name)
        allocation = Allocation(name, nbytes, True, self._host, self.ghost)
        buffer = self._allocated[allocation] = VirtualBuffer(allocation, 0, nbytes, name)
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Works on a lost device, too."""
        own = self._own(buffer)
        allocation = own.allocation
        if not own.on_device:
            raise TypeError(f"{own.name} is an arena's memory: close the arena")
        if own.nbytes != allocation.nbytes:
            raise ValueError(f"{own.name} is a part: only {allocation.name} as a whole can be freed")
        allocation.release(own)
        del self._allocated[allocation]
        self.used -= own.nbytes

    def reserve(self, nbytes: int, name: str) -> None:
        """Giving back works on a lost device, too."""
        if nbytes > 0:
            self._host.count_operation()
        elif -nbytes > self.used:
            raise ValueError(f"{name}: {-nbytes} bytes given back, and only {self.used} are used")
        self._use(nbytes, name)

    def _use(self, nbytes: int, name: str) -> None:
        if nbytes > 0 and self.used + nbytes > self.budget:
            left = max(self.budget - self.used, 0)
            raise OutOfDeviceMemoryError(
                f"{name}: {nbytes} bytes asked for, {left} left of {self.budget} on {self.name}"
            )
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def host_arena(self, nbytes: int) -> VirtualArena:
        self._host.count_operation()
        left = self.profile.host_memory_bytes - sum(arena.nbytes for arena in self._arenas)
        if nbytes > left:
            raise MemoryError(f"an arena of {nbytes} bytes: the host of {self.name} has {left} left")
        arena = VirtualArena(nbytes, self._host, self.ghost)
        self._arenas.append(arena)
        return arena

    def stream(self, name: str) -> VirtualStream:
        self._host.count_operation()
        return self._host.add_stream(name)

    def copy_in(self, device: Buffer, host: Buffer, stream: Stream) -> None:
        device, host = self._device_side(device), self._host_side(host)
        self._copy("h2d", "copy in", device, host, stream, device.name)

    def copy_out(self, host: Buffer, device: Buffer, stream: Stream) -> None:
        device, host = self._device_side(device), self._host_side(host)
        self._copy("d2h", "copy out", host, device, stream, device.name)

    def _copy(
        self, engine: str, what: str, target: VirtualBuffer, source: VirtualBuffer, stream: Stream, name: str
    ) -> None:
        if target.nbytes != source.nbytes:
            raise ValueError(f"{what}: {source.name} has {source.nbytes} bytes, {target.name} has {target.nbytes}")
        stream, mark = self._issue(stream, 1, what)
        source.allocation.read(source, stream.seen, mark)
        target.allocation.write(target, stream.seen, mark)
        self._take_time(engine, stream, self.profile.copy_seconds(target.nbytes), name)
        if not self.ghost:
            target.tensor.copy_(source.tensor)

    def launch(
        self,
        stream: Stream,
        function: Callable[..., None],
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        work: Work,
        name: str = "kernel",
    ) -> None:
        stream, mark = self._issue(stream, work.launches, name)
        buffers = [self._own(buffer) for buffer in (*reads, *writes)]
        for buffer in buffers[: len(reads)]:
            buffer.allocation.read(buffer, stream.seen, mark)
        for buffer in buffers[len(reads) :]:
            buffer.allocation.write(buffer, stream.seen, mark)
        self._take_time("compute", stream, self.profile.device_seconds(work), name)
        if not self.ghost:
            function(*[buffer.tensor for buffer in buffers])

    def run_host(self, function: Callable[[], None], work: Work, name: str = "experts") -> None:
        """Works on a lost device, too."""
        host = self._host
        start = host.time
        seconds = self.profile.host_seconds(work) * self._factor()
        host.time += seconds
        self.busy["host"] += seconds
        if host.spans is not None:
            host.spans.append(Span("host", name, start, host.time))
        if not self.ghost:
            function()

    def _issue(self, stream: Stream, calls: int, name: str) -> tuple[VirtualStream, Mark]:
        self._host.count_operation()
        if not isinstance(stream, VirtualStream) or stream.host is not self._host:
            raise TypeError(f"{name}: {stream!r} is no stream of {self.name}")
        self._host.time += calls * self.profile.launch_seconds
        return stream, stream.issue(name)

    def _take_time(self, engine: str, stream: VirtualStream, seconds: float, name: str) -> None:
        host = self._host
        seconds *= self._factor()
        start = max(stream.time, host.time, self._free_at[engine])
        stream.time = self._free_at[engine] = start + seconds
        self.busy[engine] += seconds
        if host.spans is not None:
            host.spans.append(Span(stream.name, name, start, stream.time))

    def _factor(self) -> float:
        """Noise with the mean 1."""
        jitter = self.profile.jitter
        if jitter == 0:
            return 1.0
        if not self._noise:
            self._noise = self._random.lognormal(-jitter * jitter / 2, jitter, 1024).tolist()
        return self._noise.pop()

    def _own(self, buffer: Buffer) -> VirtualBuffer:
        if not isinstance(buffer, VirtualBuffer) or buffer.allocation.host is not self._host:
            raise TypeError(f"{getattr(buffer, 'name', None) or type(buffer)} is no memory of {self.name}")
        return buffer

    def _device_side(self, buffer: Buffer) -> VirtualBuffer:
        own = self._own(buffer)
        if not own.on_device:
            raise TypeError(f"{own.name} is not on the device")
        return own

    def _host_side(self, buffer: Buffer) -> VirtualBuffer:
        if not isinstance(buffer, VirtualBuffer) or buffer.on_device or buffer.allocation.host is not self._host:
            what = getattr(buffer, "name", None) or type(buffer)
            raise TypeError(
                f"{what} is not in an arena of {self.name}: a copy would make the host wait, take() it there"
            )
        return buffer

    def now(self) -> float:
        return self._host.time

    def keep_timeline(self, on: bool) -> None:
        self._host.spans = [] if on else None

    def timeline(self) -> list[Span]:
        """Copies and kernels on the tracks of their streams; work of the host and its waiting ("wait") on "host"."""
        spans = self._host.spans
        if spans is None:
            return []
        self._host.spans = []
        return spans

    def fail_after(self, operations: int) -> None:
        """The device is lost after so many further operations (allocations, streams, copies, launches, what is done
        with events).

        Arena memory that it had not finished writing is poisoned. `free`, `reserve` of less, `run_host` and `close`
        work on.
        """
        self._host.add_fault(operations, self._lose)

    def shrink_budget(self, nbytes: int, operations: int = 0) -> None:
        """After so many further operations the budget is `nbytes`: nothing more can be had before less than that is
        used.
        """
        if nbytes < 0:
            raise ValueError(f"a budget of {nbytes} bytes: at least 0")
        self._host.add_fault(operations, lambda: setattr(self, "budget", nbytes))

    def _lose(self) -> None:
        for allocation in self._allocated:
            allocation.abandon()
        for arena in self._arenas:
            arena.abandon()
        self._host.stop(DeviceLostError, f"{self.name} does not answer any more: what was on it is lost")

    def close(self) -> None:
        if not self._host.stopped:
            for stream in self._host.streams:
                self._host.wait_for(stream.time, stream.seen)
        for arena in self._arenas:
            arena.close()
        for buffer in list(self._allocated.values()):
            self.free(buffer)
        self._host.stop(DeviceError, f"{self.name} is closed")
