"""A page-locked host arena: exactly its size, locked once, in segments.

torch's `pin_memory()` rounds every tensor up to a power of two, which doubles a model in the worst case, and locks page
by page when it is least wanted. Here one anonymous mapping is faulted in by several threads and locked in segments of
at most 1 GiB (single registrations of very many bytes fail where segments succeed). No buffer reaches over the end of a
segment: a copy across two registrations is nothing that CUDA promises. What is left of a segment behind its last buffer
is lost.

The allocator of torch does not know this memory and delays nothing for copies in flight; `close` waits for them.
"""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Buffer, DeviceError, HostArena
from moe_offload.transfer.page_locker import PageLocker

ALIGNMENT = 4096
SEGMENT = 1 << 30


class PinnedBuffer(Buffer):
    """Bytes of an arena from byte `start` on."""

    __slots__ = ("arena", "start", "name", "nbytes", "_tensor", "_seen")
    on_device = False

    def __init__(self, arena: "PinnedArena", start: int, nbytes: int, name: str) -> None:
        self.arena, self.start, self.nbytes, self.name = arena, start, nbytes, name
        self._tensor: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None

    def part(self, offset: int, nbytes: int) -> "PinnedBuffer":
        if offset < 0 or nbytes <= 0 or offset + nbytes > self.nbytes:
            raise IndexError(f"{self.name}: {nbytes} bytes from byte {offset} on are not in its {self.nbytes} bytes")
        return PinnedBuffer(self.arena, self.start + offset, nbytes, f"{self.name}[{offset}:{offset + nbytes}]")

    def host(self, *, write: bool = False) -> NDArray[np.uint8]:
        return self.arena.array(self.start, self.nbytes)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as the host sees them, for copies."""
        if self._tensor is None or self.arena.closed:
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside of it
                self._tensor = torch.from_numpy(self.arena.array(self.start, self.nbytes))
        return self._tensor

    @property
    def seen(self) -> torch.Tensor:
        """The bytes as the device sees them, for kernels."""
        if self._seen is None or self.arena.closed:
            with torch.inference_mode(False):
                self._seen = self.arena.view(self.start, self.nbytes)
        return self._seen


class PinnedArena(HostArena):
    """`nbytes` bytes locked by `locker`. Raises MemoryError when there are not as many, and then none is kept."""

    def __init__(self, nbytes: int, locker: PageLocker, *, segment: int = SEGMENT, threads: int | None = None) -> None:
        if nbytes <= 0:
            raise ValueError(f"an arena of {nbytes} bytes: at least 1 is needed")
        if segment <= 0 or segment % ALIGNMENT:
            raise ValueError(f"segments of {segment} bytes: a multiple of {ALIGNMENT} is needed")
        self.nbytes, self.closed = nbytes, False
        self._locker, self._segment, self._next = locker, segment, 0
        self._locked: list[int] = []
        self._views: dict[int, torch.Tensor] = {}  # of whole segments, on the device
        try:
            # private: shared anonymous memory gets no huge pages
            self._map = mmap.mmap(-1, _round_up(nbytes, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(
                f"an arena of {nbytes} bytes: the system has no room for it ({error.strerror})"
            ) from error
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a child would take over pages that the device writes
            if hasattr(mmap, advice):
                with suppress(OSError):
                    self._map.madvise(getattr(mmap, advice))
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        try:
            _fault_in(self._bytes, threads or min(8, len(os.sched_getaffinity(0))))
            self._lock()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        address, size = int(self._bytes.ctypes.data), self._bytes.size
        for start in range(0, size, self._segment):
            why = self._locker.lock(address + start, min(self._segment, size - start))
            if why is not None:
                raise MemoryError(
                    f"the system locks {start} of {self.nbytes} bytes of host memory, then says {why}: "
                    f"ask for at most {start}"
                )
            self._locked.append(address + start)

    def take(self, nbytes: int, name: str) -> PinnedBuffer:
        if self.closed:
            raise DeviceError(f"{name}: the arena is closed")
        if nbytes <= 0:
            raise ValueError(f"{name}: {nbytes} bytes asked for, at least 1 is needed")
        if nbytes > self._segment:
            raise MemoryError(f"{name}: {nbytes} bytes asked for, a buffer has at most {self._segment}")
        start = _round_up(self._next, ALIGNMENT)
        if start // self._segment != (start + nbytes - 1) // self._segment:
            start = _round_up(start, self._segment)
        if start + nbytes > self.nbytes:
            free = max(self.nbytes - start, 0)
            raise MemoryError(f"{name}: {nbytes} bytes asked for, {free} left of an arena of {self.nbytes}")
        self._next = start + nbytes
        return PinnedBuffer(self, start, nbytes, name)

    def array(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Some of the bytes."""
        if self.closed:
            raise DeviceError("the arena is closed")
        return self._bytes[start : start + nbytes]

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of the bytes as the device sees them. Every segment is asked for once: it takes longer than a launch."""
        array = self.array(start, nbytes)
        first = start - start % self._segment
        whole = self._views.get(first)
        if whole is None:
            size = min(self._segment, self._bytes.size - first)
            whole = self._views[first] = self._locker.view(int(array.ctypes.data) - (start - first), size)
        return whole[start - first : start - first + nbytes]

    def close(self) -> None:
        """Arrays that somebody still holds read zeros from then on."""
        if self.closed:
            return
        self.closed = True
        # A refusal is that of a lost device, which is through with everything; its context takes the locks along.
        if self._locked:
            self._locker.wait()
        kept = [why for address in self._locked if (why := self._locker.unlock(address)) is not None]
        self._locked.clear()
        self._views.clear()
        self._bytes = np.empty(0, np.uint8)
        if not kept:
            self._map.madvise(mmap.MADV_DONTNEED)  # the memory goes back even where an array keeps the mapping
        with suppress(BufferError):
            self._map.close()


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _fault_in(data: NDArray[np.uint8], threads: int) -> None:
    """Touch every page: the kernel clears pages at a few GB/s per thread, and locking would do it with one."""
    share = _round_up(-(-data.size // threads), ALIGNMENT)

    def touch(start: int) -> None:
        data[start : start + share : ALIGNMENT] = 0

    with ThreadPoolExecutor(threads, thread_name_prefix="fault-in") as pool:
        list(pool.map(touch, range(0, data.size, share)))
