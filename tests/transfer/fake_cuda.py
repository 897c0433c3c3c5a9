"""torch.cuda as far as the accelerator uses it, without a card: what is put on a stream runs when somebody waits.

So a copy that nobody waits for does not happen, and a kernel that does not wait for a copy sees the old bytes. Every
operation takes a millisecond of the device's clock.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class DeviceTensor(torch.Tensor):
    """Memory of the device: a copy from or to it goes on the current stream."""

    card: "FakeCuda"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        assert kwargs == {"non_blocking": True}, "a copy that makes the host wait"
        target, source = args
        cls.card.log.append("copy")
        cls.card.put(lambda: _plain(target).copy_(_plain(source)))
        return target


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


class FakeStream:
    def __init__(self, cuda: "FakeCuda", handle: int, name: str) -> None:
        self.cuda, self.cuda_stream, self.name = cuda, handle, name
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.device_index = 0

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.cuda_stream

    def run_to(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()
            self.cuda.milliseconds += 1.0

    def wait_event(self, event: "FakeEvent") -> None:
        self.cuda.check()
        assert event.stream is not None
        stream, position = event.stream, event.position  # as they are now: the event may be recorded again
        self.queue.append(lambda: stream.run_to(position))

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.log.append(f"synchronize {self.name}")
        self.run_to(len(self.queue))


class FakeEvent:
    def __init__(self, cuda: "FakeCuda", enable_timing: bool = False) -> None:
        self.cuda, self.enable_timing = cuda, enable_timing
        self.stream: FakeStream | None = None
        self.position = 0
        self.at = 0.0
        cuda.events += 1

    def record(self, stream: FakeStream) -> None:
        self.cuda.check()
        self.stream = stream
        stream.queue.append(self._pass)
        self.position = len(stream.queue)

    def _pass(self) -> None:
        self.at = self.cuda.milliseconds

    def query(self) -> bool:
        self.cuda.check()
        assert self.stream is not None
        return self.stream.done >= self.position

    def synchronize(self) -> None:
        self.cuda.check()
        assert self.stream is not None
        self.stream.run_to(self.position)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.enable_timing and end.enable_timing
        return end.at - self.at


class FakeCuda:
    """Card 0. `failure`: the error that every call raises from now on."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failure: str | None = None
        self.room: int | None = None  # what the allocator has; None: enough
        self.free, self.total, self.reserved, self.allocated = 10 << 30, 11 << 30, 0, 0
        self.milliseconds = 0.0
        self.events = 0
        self.streams = [FakeStream(self, 0, "default")]
        self.current = self.streams[0]

    def check(self) -> None:
        if self.failure is not None:
            raise RuntimeError(self.failure)

    def put(self, operation: Callable[[], object]) -> None:
        """On the current stream, as a kernel does."""
        self.check()
        self.current.queue.append(operation)

    # torch.cuda

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        self.check()
        self.streams.append(FakeStream(self, 7000 + len(self.streams), f"stream {len(self.streams)}"))
        return self.streams[-1]

    def Event(self, enable_timing: bool = False) -> FakeEvent:  # noqa: N802
        return FakeEvent(self, enable_timing)

    def current_stream(self, device: torch.device) -> FakeStream:
        assert device == torch.device("cuda", 0)
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.log.append(f"device {device.index}")
        yield

    def get_device_name(self, index: int) -> str:
        return "NVIDIA GeForce GTX 1080 Ti"

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.check()
        return self.free, self.total

    def memory_reserved(self, index: int) -> int:
        return self.reserved

    def memory_allocated(self, index: int) -> int:
        return self.allocated

    def synchronize(self, device: torch.device) -> None:
        self.check()
        self.log.append("synchronize device")
        for stream in self.streams:
            stream.run_to(len(stream.queue))

    def empty_cache(self) -> None:
        self.log.append("empty cache")


class FakeLocker:
    """A `PageLocker` that locks nothing."""

    cuda: FakeCuda

    def __init__(self, index: int) -> None:
        self.locked: set[int] = set()

    def lock(self, address: int, nbytes: int) -> str | None:
        self.locked.add(address)
        return None

    def unlock(self, address: int) -> str | None:
        self.locked.remove(address)
        self.cuda.log.append("unlock")
        return None

    def wait(self) -> str | None:
        self.cuda.log.append("wait before unlocking")
        return self.cuda.failure

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        self.cuda.check()
        data = memoryview((ctypes.c_uint8 * nbytes).from_address(address))
        return torch.from_numpy(np.frombuffer(data, np.uint8)).as_subclass(DeviceTensor)


def fake_torch(cuda: FakeCuda) -> SimpleNamespace:
    """What stands for `torch` in the accelerator's modules."""

    def empty(nbytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cuda", 0) and dtype == torch.uint8
        cuda.check()
        if cuda.room is not None and nbytes > cuda.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.\nSee documentation")
        cuda.log.append("empty")
        return torch.empty(nbytes, dtype=dtype).as_subclass(DeviceTensor)

    return SimpleNamespace(
        cuda=cuda, empty=empty, device=torch.device, uint8=torch.uint8, inference_mode=torch.inference_mode
    )
