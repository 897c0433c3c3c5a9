"""Streams and events of CUDA, and their times on the host's clock.

An event's time is its distance to a base event whose moment on the host's clock is known. CUDA gives distances as f32
milliseconds, so a base serves for some seconds only; the next is taken on a stream of its own, where nothing delays it.
"""

import time
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from moe_offload.transfer.accelerator import DeviceError, Event, Stream
from moe_offload.transfer.cuda_errors import Health

_BASE_SECONDS = 8.0  # 8192 ms: half a microsecond is what f32 still tells
_Waits = list[tuple[float, float]]


class _Base(NamedTuple):
    event: torch.cuda.Event
    seconds: float


class CudaRuntime:
    """What streams and events of one device share."""

    def __init__(self, index: int, health: Health) -> None:
        self.device, self.health = torch.device("cuda", index), health
        self.waits: _Waits | None = None  # of the host, while they are written down
        self._free: tuple[list[torch.cuda.Event], list[torch.cuda.Event]] = ([], [])
        with health:
            self._clock = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.tie()

    def tie(self) -> None:
        """Take a new base: the closest of three looks at both clocks."""
        best = float("inf")
        with self.health:
            for _ in range(3):
                event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                before = time.perf_counter()
                event.record(self._clock)
                event.synchronize()
                after = time.perf_counter()
                if after - before < best:
                    best = after - before
                    self._base = _Base(event, (before + after) / 2)

    def base(self) -> _Base:
        """The base for an event that is recorded now."""
        if time.perf_counter() - self._base.seconds > _BASE_SECONDS:
            self.tie()
        return self._base

    def take(self, timed: bool) -> torch.cuda.Event:
        """An event to record. Used ones serve again: whoever was told to wait for one waits for what it stood for
        then.
        """
        if self._free[timed]:
            return self._free[timed].pop()
        return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]

    def give_back(self, event: torch.cuda.Event, timed: bool) -> None:
        """`event` has no user any more."""
        self._free[timed].append(event)


class CudaEvent(Event):
    """A recorded event; it goes back to the pool with its last reference."""

    __slots__ = ("runtime", "raw", "_base")

    def __init__(self, runtime: CudaRuntime, raw: torch.cuda.Event, base: _Base | None) -> None:
        self.runtime, self.raw, self._base = runtime, raw, base

    def query(self) -> bool:
        with self.runtime.health:
            return bool(self.raw.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        waits = self.runtime.waits
        start = time.perf_counter()
        with self.runtime.health:
            self.raw.synchronize()
        if waits is not None:
            waits.append((start, time.perf_counter()))

    def time(self) -> float:
        if self._base is None:
            raise DeviceError("this event has no time: record it with timed=True")
        if not self.query():
            raise DeviceError("the stream has not passed this event: synchronise with it first")
        with self.runtime.health:
            return self._base.seconds + float(self._base.event.elapsed_time(self.raw)) / 1000

    def __del__(self) -> None:
        self.runtime.give_back(self.raw, self._base is not None)


class CudaStream(Stream):
    """A stream of torch; without `raw` the one that is torch's current stream whenever it is used."""

    __slots__ = ("name", "runtime", "_raw")

    def __init__(self, runtime: CudaRuntime, name: str, raw: torch.cuda.Stream | None) -> None:
        self.runtime, self.name, self._raw = runtime, name, raw

    @property
    def raw(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.runtime.device) if self._raw is None else self._raw

    def entered(self) -> AbstractContextManager[object]:
        """Within it, torch's work is this stream's, and so are our kernels."""
        return torch.cuda.device(self.runtime.device) if self._raw is None else torch.cuda.stream(self._raw)

    def wait(self, event: Event) -> None:
        if not isinstance(event, CudaEvent) or event.runtime is not self.runtime:
            raise TypeError(f"{self.name} cannot wait for {event!r}: it is no event of this accelerator")
        with self.runtime.health:
            self.raw.wait_event(event.raw)

    def record(self, *, timed: bool = False) -> CudaEvent:
        with self.runtime.health:
            base = self.runtime.base() if timed else None
            raw = self.runtime.take(timed)
            raw.record(self.raw)
        return CudaEvent(self.runtime, raw, base)
