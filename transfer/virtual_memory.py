"""Memory of the virtual accelerator, and who touched it: the race detector.

An access leaves a mark (stream, count) on the bytes, and whoever comes next must have seen it (`virtual_host.py` tells
what that means): a reader the last write, a writer also all reads since then. So a missing wait is an error even when
the order of this run happens to give right numbers.

An `Allocation` keeps its bytes as segments that were touched alike. Accesses split segments and writes join them again,
so there are about as many as there are parts in use, and the usual access finds its segment with one look into a
dictionary.
"""

from bisect import bisect_right, insort

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Buffer, DeviceError, HostArena
from moe_offload.transfer.virtual_host import Mark, VirtualHost

ALIGNMENT = 4096
# Not counted, as whatever comes later is ordered after it: everybody has seen count 0, of whichever stream is the last.
_HOST: Mark = (-1, 0, "the host", "")


class RaceError(DeviceError):
    """Operations that touch the same bytes in no order, at least one of them writing; a read of bytes that nobody
    wrote; a use of memory that was given back. A mistake of the caller: a real device would give wrong numbers now and
    then.
    """


class _Segment:
    """Bytes up to `end`, where the next segment begins: the last write, and the last read of every stream since."""

    __slots__ = ("end", "write", "reads")

    def __init__(self, end: int, write: Mark | None, reads: dict[int, Mark]) -> None:
        self.end, self.write, self.reads = end, write, reads


class Allocation:
    """`nbytes` bytes that were taken at once. `tensor` is their data; None in a ghost, and after `release`."""

    __slots__ = ("name", "nbytes", "on_device", "host", "live", "tensor", "_starts", "_segments")

    def __init__(self, name: str, nbytes: int, on_device: bool, host: VirtualHost, ghost: bool) -> None:
        self.name, self.nbytes, self.on_device, self.host = name, nbytes, on_device, host
        self.live = True
        self.tensor: torch.Tensor | None = None if ghost else torch.from_numpy(_poisoned(nbytes))
        self._starts = [0]
        self._segments = {0: _Segment(nbytes, None, {})}

    def read(self, part: "VirtualBuffer", seen: list[int], mark: Mark) -> None:
        """Somebody who has seen `seen` reads `part`."""
        segment = self._segments.get(part.start)
        if segment is not None and segment.end == part.end and self.live:  # the usual case, quickly
            write = segment.write
            if write is not None and seen[write[0]] >= write[1]:
                segment.reads[mark[0]] = mark
                return
        for segment in self._cover(part, mark):
            write = segment.write
            if write is None:
                raise RaceError(f"{part.name}: {_who(mark)} reads bytes that nobody has written")
            if seen[write[0]] < write[1]:
                raise _unordered(part, "read", mark, "write", write)
            segment.reads[mark[0]] = mark

    def write(self, part: "VirtualBuffer", seen: list[int], mark: Mark) -> None:
        """Somebody who has seen `seen` writes all of `part`."""
        segments = self._cover(part, mark)
        for segment in segments:
            write = segment.write
            if write is not None and seen[write[0]] < write[1]:
                raise _unordered(part, "write", mark, "write", write)
            for read in segment.reads.values():
                if seen[read[0]] < read[1]:
                    raise _unordered(part, "write", mark, "read", read)
        if len(segments) > 1:
            self._join_segments(part)
        segments[0].end, segments[0].write = part.end, mark
        segments[0].reads.clear()

    def release(self, whole: "VirtualBuffer") -> None:
        """Give the memory back: a race where somebody may still use it."""
        self.write(whole, self.host.seen, _HOST)
        self.live, self.tensor = False, None

    def abandon(self) -> None:
        """The device is lost: nothing is in flight any more, and what it had not finished writing is garbage."""
        seen = self.host.seen
        for start, segment in self._segments.items():
            segment.reads.clear()
            if segment.write is not None and seen[segment.write[0]] < segment.write[1]:
                segment.write = None
                if self.tensor is not None:
                    self.tensor[start : segment.end].fill_(0xFF)

    def _cover(self, part: "VirtualBuffer", mark: Mark) -> list[_Segment]:
        """The segments that make up `part`, split where it begins and ends."""
        if not self.live:
            raise RaceError(f"{part.name}: {_who(mark)} uses memory that was given back")
        end = part.end
        segment = self._segments.get(part.start)
        if segment is None:
            segment = self._split(part.start)
        if segment.end == end:
            return [segment]
        found = []
        while segment.end < end:
            found.append(segment)
            segment = self._segments[segment.end]
        if segment.end > end:
            self._split(end)
        found.append(segment)
        return found

    def _split(self, at: int) -> _Segment:
        """Split the segment around `at`; answers with the half that begins there."""
        segment = self._segments[self._starts[bisect_right(self._starts, at) - 1]]
        rest = self._segments[at] = _Segment(segment.end, segment.write, dict(segment.reads))
        segment.end = at
        insort(self._starts, at)
        return rest

    def _join_segments(self, part: "VirtualBuffer") -> None:
        first = bisect_right(self._starts, part.start)
        last = bisect_right(self._starts, part.end - 1)
        for start in self._starts[first:last]:
            del self._segments[start]
        del self._starts[first:last]


class VirtualBuffer(Buffer):
    """Bytes `start` to `end` of an allocation."""

    __slots__ = ("allocation", "start", "end", "name", "nbytes", "on_device", "_tensor")

    def __init__(self, allocation: Allocation, start: int, nbytes: int, name: str) -> None:
        self.allocation, self.start, self.end = allocation, start, start + nbytes
        self.name, self.nbytes, self.on_device = name, nbytes, allocation.on_device
        self._tensor: torch.Tensor | None = None

    def part(self, offset: int, nbytes: int) -> "VirtualBuffer":
        """Ordering is that of the bytes: parts that do not overlap are independent of each other."""
        if offset < 0 or nbytes <= 0 or offset + nbytes > self.nbytes:
            raise IndexError(f"{self.name}: {nbytes} bytes from byte {offset} on are not in its {self.nbytes} bytes")
        return VirtualBuffer(self.allocation, self.start + offset, nbytes, f"{self.name}[{offset}:{offset + nbytes}]")

    def host(self, *, write: bool = False) -> NDArray[np.uint8]:
        """Without data (a ghost): zeros that cannot be written; the access counts all the same."""
        allocation = self.allocation
        if self.on_device:
            raise TypeError(f"{self.name} is device memory, which the host cannot reach: copy it out")
        if write:
            allocation.write(self, allocation.host.seen, _HOST)
        else:
            allocation.read(self, allocation.host.seen, _HOST)
        if allocation.tensor is None:
            return np.broadcast_to(np.uint8(0), self.nbytes)
        view: NDArray[np.uint8] = self.tensor.numpy()
        return view

    @property
    def tensor(self) -> torch.Tensor:
        """The data, without a check."""
        if self._tensor is None:
            assert self.allocation.tensor is not None
            self._tensor = self.allocation.tensor[self.start : self.end]
        return self._tensor


class VirtualArena(HostArena):
    """Page-locked memory, as far as anybody can tell. Every `take` is an allocation."""

    def __init__(self, nbytes: int, host: VirtualHost, ghost: bool) -> None:
        self.nbytes = nbytes
        self._host, self._ghost = host, ghost
        self._taken: list[VirtualBuffer] = []
        self._next = 0

    def take(self, nbytes: int, name: str) -> VirtualBuffer:
        start = -(-self._next // ALIGNMENT) * ALIGNMENT
        if nbytes <= 0:
            raise ValueError(f"{name}: {nbytes} bytes asked for, at least 1 is needed")
        if start + nbytes > self.nbytes:
            free = max(self.nbytes - start, 0)
            raise MemoryError(f"{name}: {nbytes} bytes asked for, {free} left of an arena of {self.nbytes}")
        self._next = start + nbytes
        buffer = VirtualBuffer(Allocation(name, nbytes, False, self._host, self._ghost), 0, nbytes, name)
        self._taken.append(buffer)
        return buffer

    def abandon(self) -> None:
        """The device is lost."""
        for buffer in self._taken:
            buffer.allocation.abandon()

    def close(self) -> None:
        for buffer in self._taken:
            if buffer.allocation.live:
                buffer.allocation.release(buffer)
        self._taken.clear()  # they keep their bytes as long as somebody has them
        self.nbytes = 0


def _poisoned(nbytes: int) -> NDArray[np.uint8]:
    """Aligned bytes of 0xFF, which is NaN in every floating-point type."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    data = raw[start : start + nbytes]
    data.fill(0xFF)
    return data


def _who(mark: Mark) -> str:
    return mark[2] if mark is _HOST else f"{mark[2]} on {mark[3]}"


def _unordered(part: VirtualBuffer, verb: str, mark: Mark, other_verb: str, other: Mark) -> RaceError:
    mend = "synchronise with" if mark is _HOST else f"let {mark[3]} wait for"
    return RaceError(
        f"{part.name}: the {verb} by {_who(mark)} is not ordered after the {other_verb} by {_who(other)}: "
        f"{mend} an event recorded behind that"
    )
