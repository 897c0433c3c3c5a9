"""The virtual accelerator: real numbers, modelled time, a hard budget, and every race is an error.

Operations run at once, in the order in which they are issued: one legal schedule out of many. Their data is real (torch tensors
of the host), their time is computed from a `ServerProfile`, and `virtual_memory.py` checks every access. No threads, no sleeping:
a run gives the same times again.

Time: the host has a clock, every stream has one. A call costs the host `launch_seconds` per launch or copy. An operation starts
when the host has issued it, its stream is through with what came before and with the events it waits for, and the engine it needs
is free: one for copies in, one for copies out, one for kernels, each in the order of submission over all streams, as on a card
without concurrent kernels. Bytes over mapped memory (`Work.link_bytes`) take the link's time, but do not contend with copies.

With `ghost=True` nothing has data and functions are not called; times, budgets and checks stay. It is for simulations of models
that do not fit this machine.

A device that fails or has less memory than thought: `fail_after`, `shrink_budget`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moe_offload.transfer.accelerator import (
    Accelerator,
    Buffer,
    DeviceError,
    DeviceLostError,
    Event,
    OutOfDeviceMemoryError,
    Span,
    Stream,
    Work,
)
from moe_offload.transfer.server_profile import ServerProfile
from moe_offload.transfer.virtual_memory import (
    Allocation,
    HostClock,
    Mark,
    RaceError,
    VirtualArena,
    VirtualBuffer,
    join,
)

__all__ = ["RaceError", "VirtualAccelerator", "VirtualEvent", "VirtualStream"]

_QUERY_SECONDS = 0.5e-6  # so that a loop which polls an event ends


class VirtualEvent(Event):
    """What the stream had seen and when it was through."""

    __slots__ = ("_owner", "_at", "_timed", "seen")

    def __init__(self, owner: "VirtualAccelerator", at: float, seen: tuple[int, ...], timed: bool) -> None:
        self._owner, self._at, self.seen, self._timed = owner, at, seen, timed

    def query(self) -> bool:
        self._owner.count_operation()
        clock = self._owner.clock
        clock.time += _QUERY_SECONDS
        return clock.time >= self._at

    def synchronize(self) -> None:
        self._owner.count_operation()
        self._owner.host_waits(self._at, self.seen)

    def time(self) -> float:
        if not self._timed:
            raise DeviceError("this event has no time: record it with timed=True")
        if self._owner.clock.time < self._at:
            raise DeviceError("the stream has not passed this event: synchronise with it first")
        return self._at


class VirtualStream(Stream):
    """A clock, and what is ordered before the next operation. `number` is its place in vector clocks."""

    __slots__ = ("name", "number", "owner", "time", "seen", "version")

    def __init__(self, owner: "VirtualAccelerator", number: int, name: str) -> None:
        self.owner, self.number, self.name = owner, number, name
        self.time = 0.0
        self.seen = [0] * (number + 1)
        self.version = -1  # of the host's clock, when last joined

    def wait(self, event: Event) -> None:
        self.owner.count_operation()
        if not isinstance(event, VirtualEvent) or event._owner is not self.owner:
            raise TypeError(f"{self.name} cannot wait for {event!r}: it is no event of this accelerator")
        if event._at > self.time:
            self.time = event._at
        join(self.seen, event.seen)

    def record(self, *, timed: bool = False) -> VirtualEvent:
        self.owner.count_operation()
        return VirtualEvent(self.owner, max(self.time, self.owner.clock.time), tuple(self.seen), timed)


class VirtualAccelerator(Accelerator):
    """A server as `profile` describes it. `budget` is at most the card's memory (None: all of it)."""

    simulated = True

    def __init__(
        self, profile: ServerProfile, budget: int | None = None, *, ghost: bool = False, seed: int = 0
    ) -> None:
        budget = profile.memory_bytes if budget is None else budget
        if not 0 <= budget <= profile.memory_bytes:
            raise ValueError(f"a budget of {budget} bytes: {profile.name} has 0 to {profile.memory_bytes}")
        self.name = f"virtual {profile.name}"
        self.profile, self.ghost, self.budget = profile, ghost, budget
        self.used = self.peak = 0
        self.clock = HostClock()
        # seconds of copies in and out, kernels, and CPU work
        self.busy = {"h2d": 0.0, "d2h": 0.0, "compute": 0.0, "host": 0.0}
        self._free_at = {"h2d": 0.0, "d2h": 0.0, "compute": 0.0}
        self._streams: list[VirtualStream] = []
        self._arenas: list[VirtualArena] = []
        self._allocated: dict[Allocation, VirtualBuffer] = {}
        self._random = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._spans: list[Span] | None = None
        self._gone: str | None = None  # why nothing works any more
        self._alarms: list[tuple[int, Callable[[], None]]] = []
        self._operations = 0
        self._alarm = -1  # the operation before which the next alarm goes off
        self.compute = self.stream("compute")

    # memory

    def allocate(self, nbytes: int, name: str) -> VirtualBuffer:
        self.count_operation()
        if nbytes <= 0:
            raise ValueError(f"{name}: {nbytes} bytes asked for, at least 1 is needed")
        self._use(nbytes, name)
        allocation = Allocation(name, nbytes, True, self.clock, self.ghost)
        buffer = VirtualBuffer(allocation, 0, nbytes, name)
        self._allocated[allocation] = buffer
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Works on a lost device, too."""
        if not isinstance(buffer, VirtualBuffer) or not buffer.on_device:
            raise TypeError(f"{buffer!r} is no device memory of this accelerator")
        allocation = buffer.allocation
        if buffer.nbytes != allocation.nbytes:
            raise ValueError(f"{buffer.name} is a part of {allocation.name}: only the whole can be freed")
        allocation.release(buffer, self.clock.seen)
        del self._allocated[allocation]
        self.used -= buffer.nbytes

    def reserve(self, nbytes: int, name: str) -> None:
        if nbytes > 0:
            self.count_operation()
        elif -nbytes > self.used:
            raise ValueError(f"{name}: {-nbytes} bytes given back, {self.used} are used")
        self._use(nbytes, name)

    def _use(self, nbytes: int, name: str) -> None:
        if nbytes > 0 and self.used + nbytes > self.budget:
            raise OutOfDeviceMemoryError(
                f"{name}: {nbytes} bytes asked for, {max(self.budget - self.used, 0)} left of {self.budget} on {self.name}"
            )
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def host_arena(self, nbytes: int) -> VirtualArena:
        self.count_operation()
        if nbytes > self.profile.host_memory_bytes:
            raise MemoryError(f"an arena of {nbytes} bytes: {self.name} has {self.profile.host_memory_bytes}")
        arena = VirtualArena(nbytes, self.clock, self.ghost)
        self._arenas.append(arena)
        return arena

    # work

    def stream(self, name: str) -> VirtualStream:
        self.count_operation()
        stream = VirtualStream(self, len(self._streams), name)
        self._streams.append(stream)
        for other in self._streams[:-1]:
            other.seen.append(0)
        self.clock.seen.append(0)
        return stream

    def copy_in(self, device: Buffer, host: Buffer, stream: Stream) -> None:
        self._copy("h2d", device, host, stream)

    def copy_out(self, host: Buffer, device: Buffer, stream: Stream) -> None:
        self._copy("d2h", host, device, stream)

    def _copy(self, engine: str, target: Buffer, source: Buffer, stream: Stream) -> None:
        device, host = (target, source) if engine == "h2d" else (source, target)
        if not isinstance(host, VirtualBuffer) or host.on_device or host.allocation.owner is not self.clock:
            what = getattr(host, "name", None) or type(host).__name__
            raise TypeError(f"{what} is not in an arena of this accelerator, and a copy of it would make the host wait")
        if target.nbytes != source.nbytes:
            raise ValueError(f"{source.name} has {source.nbytes} bytes, {target.name} {target.nbytes}: not a copy")
        if not device.on_device:
            raise TypeError(f"{device.name} is not on the device")
        stream, mark = self._issue(stream, 1, "copy in" if engine == "h2d" else "copy out")
        self._read(source, stream, mark)
        self._write(target, stream, mark)
        self._run(
            engine, stream, self.profile.copy_seconds(target.nbytes), target.name if engine == "h2d" else source.name
        )
        if not self.ghost:
            target.tensor.copy_(source.tensor)  # type: ignore[attr-defined]

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
        for buffer in reads:
            self._read(buffer, stream, mark)
        for buffer in writes:
            self._write(buffer, stream, mark)
        self._run("compute", stream, self.profile.device_seconds(work), name)
        if not self.ghost:
            function(*[buffer.tensor for buffer in (*reads, *writes)])  # type: ignore[attr-defined]

    def run_host(self, function: Callable[[], None], work: Work, name: str = "experts") -> None:
        """Works on a lost device, too."""
        start = self.clock.time
        seconds = self.profile.host_seconds(work) * self._factor()
        self.clock.time = start + seconds
        self.busy["host"] += seconds
        if self._spans is not None:
            self._spans.append(Span("host", name, start, self.clock.time))
        if not self.ghost:
            function()

    def _issue(self, stream: Stream, calls: int, name: str) -> tuple[VirtualStream, Mark]:
        """The host issues an operation: it is ordered after everything that the host knows to be done."""
        self.count_operation()
        if not isinstance(stream, VirtualStream) or stream.owner is not self:
            raise TypeError(f"{stream!r} is no stream of this accelerator")
        clock = self.clock
        clock.time += calls * self.profile.launch_seconds
        if stream.version != clock.version:
            join(stream.seen, clock.seen)
            stream.version = clock.version
        number = stream.number
        count = stream.seen[number] + 1
        stream.seen[number] = count
        return stream, (number, count, name, stream.name)

    def _read(self, buffer: Buffer, stream: VirtualStream, mark: Mark) -> None:
        allocation = self._allocation(buffer)
        allocation.read(buffer, stream.seen, mark)  # type: ignore[arg-type]

    def _write(self, buffer: Buffer, stream: VirtualStream, mark: Mark) -> None:
        allocation = self._allocation(buffer)
        allocation.write(buffer, stream.seen, mark)  # type: ignore[arg-type]

    def _allocation(self, buffer: Buffer) -> Allocation:
        if not isinstance(buffer, VirtualBuffer) or buffer.allocation.owner is not self.clock:
            raise TypeError(f"{getattr(buffer, 'name', buffer)!r} is no memory of this accelerator")
        return buffer.allocation

    def _run(self, engine: str, stream: VirtualStream, seconds: float, name: str) -> None:
        seconds *= self._factor()
        start = max(stream.time, self.clock.time, self._free_at[engine])
        stream.time = self._free_at[engine] = start + seconds
        self.busy[engine] += seconds
        if self._spans is not None:
            self._spans.append(Span(stream.name, name, start, stream.time))

    def _factor(self) -> float:
        """Noise: around 1."""
        jitter = self.profile.jitter
        if jitter == 0:
            return 1.0
        if not self._factors:
            self._factors = self._random.lognormal(-jitter * jitter / 2, jitter, 1024).tolist()
        return self._factors.pop()

    # time

    def now(self) -> float:
        return self.clock.time

    def host_waits(self, until: float, seen: tuple[int, ...]) -> None:
        """The host is ordered after `seen`, which is over at `until`."""
        clock = self.clock
        if self._spans is not None and until > clock.time:
            self._spans.append(Span("host", "wait", clock.time, until))
        clock.time = max(clock.time, until) + self.profile.wait_seconds
        clock.join(seen)

    def keep_timeline(self, on: bool) -> None:
        self._spans = [] if on else None

    def timeline(self) -> list[Span]:
        if self._spans is None:
            return []
        spans, self._spans = self._spans, []
        return spans

    # what may go wrong

    def fail_after(self, operations: int) -> None:
        """The device is lost after so many further operations.

        Memory that it was writing in arenas is poisoned, as nobody knows how far it came. `free`, giving back a reservation, `run_host`
        and `close` go on working.
        """
        self._at_operation(operations, self._lose)

    def shrink_budget(self, nbytes: int, operations: int = 0) -> None:
        """The budget is `nbytes` after so many further operations: from then on nothing more can be had until less is used."""

        def shrink() -> None:
            self.budget = nbytes

        self._at_operation(operations, shrink)

    def count_operation(self) -> None:
        """Every operation begins with this. Raises DeviceLostError when there is no device."""
        if self._operations == self._alarm:
            self._ring()
        self._operations += 1

    def _at_operation(self, operations: int, alarm: Callable[[], None]) -> None:
        self._alarms.append((self._operations + operations, alarm))
        self._alarm = min(at for at, _ in self._alarms)

    def _ring(self) -> None:
        due = [alarm for at, alarm in self._alarms if at == self._operations]
        self._alarms = [(at, alarm) for at, alarm in self._alarms if at != self._operations]
        self._alarm = min((at for at, _ in self._alarms), default=-1)
        for alarm in due:
            alarm()
        if self._gone is not None:
            self._alarm = self._operations  # every time
            raise DeviceLostError(self._gone)

    def _lose(self) -> None:
        self._gone = f"{self.name} does not answer any more: its memory is lost"
        for arena in self._arenas:
            arena.lose_device()
        for allocation in self._allocated:
            allocation.forget_writes_after(self.clock.seen)

    def close(self) -> None:
        if self._gone is None:
            for stream in self._streams:
                self.host_waits(stream.time, tuple(stream.seen))
        for arena in self._arenas:
            arena.close()
        for buffer in list(self._allocated.values()):
            self.free(buffer)
        self._gone = f"{self.name} is closed"
        self._alarms, self._alarm = [], self._operations
