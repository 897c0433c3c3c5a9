"""Memory of the virtual accelerator, and who touched it: vector clocks by byte range.

Every stream counts its operations. `seen[i]` of a participant (a stream, the host) says up to which operation of stream i it is
ordered after it; waiting for an event takes over what the event's stream had seen. An access leaves a mark (stream, count, ...)
on the bytes, and whoever comes next must have seen it: a reader the last write, a writer also all reads since then. So a missing
wait is an error even when the order of this run happens to give right numbers.

The host needs no marks: whatever it did lies before everything that it puts on a stream later.

An `Allocation` keeps its bytes as segments that were touched alike. Accesses split segments, writes join them again, so there
are about as many as there are parts in use, and the usual access finds its segment with one look into a dictionary.
"""

from bisect import bisect_right, insort

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Buffer, DeviceError, HostArena

ALIGNMENT = 4096

# stream's number, its count, the operation's name, the stream's name
Mark = tuple[int, int, str, str]
HOST: Mark = (0, 0, "the host", "host")  # count 0 of stream 0: seen by everybody


class RaceError(DeviceError):
    """Two operations touch the same bytes, at least one writes, and nothing orders them; or bytes are read that nobody wrote,
    or touched after they were given back. A bug of the caller: on a real device it gives wrong numbers now and then.
    """


class _Segment:
    __slots__ = ("end", "write", "reads")

    def __init__(self, end: int, write: Mark | None, reads: dict[int, Mark]) -> None:
        self.end, self.write, self.reads = end, write, reads


def poisoned(nbytes: int) -> NDArray[np.uint8]:
    """Aligned bytes of 0xFF, which is NaN in every floating-point type."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    data = raw[start : start + nbytes]
    data.fill(0xFF)
    return data


class Allocation:
    """`nbytes` bytes on the device or in an arena; without data in a ghost."""

    __slots__ = ("name", "nbytes", "on_device", "owner", "live", "tensor", "_starts", "_segments")

    def __init__(self, name: str, nbytes: int, on_device: bool, owner: "HostClock", ghost: bool) -> None:
        self.name, self.nbytes, self.on_device, self.owner = name, nbytes, on_device, owner
        self.live = True
        self.tensor: torch.Tensor | None = None if ghost else torch.from_numpy(poisoned(nbytes))
        self._starts = [0]
        self._segments = {0: _Segment(nbytes, None, {})}

    def read(self, buffer: "VirtualBuffer", seen: list[int], mark: Mark) -> None:
        """Check a read of `buffer`'s bytes by somebody who has seen `seen`, and leave `mark`."""
        start, end = buffer.start, buffer.end
        segment = self._segments.get(start)
        if segment is not None and segment.end == end and self.live:
            write = segment.write
            if write is not None and seen[write[0]] >= write[1]:
                segment.reads[mark[0]] = mark
                return
        for segment in self._cover(buffer, mark):
            if segment.write is None:
                raise RaceError(f"{buffer.name}: {_who(mark)} reads bytes that nobody has written")
            if seen[segment.write[0]] < segment.write[1]:
                raise _unordered(buffer, mark, "read", segment.write, "write")
            segment.reads[mark[0]] = mark

    def write(self, buffer: "VirtualBuffer", seen: list[int], mark: Mark) -> None:
        """The same for a write."""
        segments = self._cover(buffer, mark)
        for segment in segments:
            if segment.write is not None and seen[segment.write[0]] < segment.write[1]:
                raise _unordered(buffer, mark, "write", segment.write, "write")
            for read in segment.reads.values():
                if seen[read[0]] < read[1]:
                    raise _unordered(buffer, mark, "write", read, "read")
        first = segments[0]
        if len(segments) > 1:
            self._join(buffer)
            first.end = buffer.end
        first.write = mark
        if first.reads:
            first.reads = {}

    def release(self, buffer: "VirtualBuffer", seen: list[int]) -> None:
        """Give the memory back; a race where somebody may still use it."""
        self.write(buffer, seen, HOST)
        self.live, self.tensor = False, None

    def forget_writes_after(self, seen: list[int]) -> None:
        """The device is lost: what it had not finished is garbage, and nobody reads or writes any more."""
        for start, segment in self._segments.items():
            segment.reads = {}
            if segment.write is not None and seen[segment.write[0]] < segment.write[1]:
                segment.write = None
                if self.tensor is not None:
                    self.tensor[start : segment.end].fill_(0xFF)

    def _cover(self, buffer: "VirtualBuffer", mark: Mark) -> list[_Segment]:
        """The segments that make up the buffer's bytes, split where it begins and ends."""
        if not self.live:
            raise RaceError(f"{buffer.name}: {_who(mark)} uses memory that was given back")
        start, end = buffer.start, buffer.end
        segment = self._segments.get(start)
        if segment is None:
            segment = self._split(start)
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
        """Split the segment around `at`; answers with the part that begins there."""
        segment = self._segments[self._starts[bisect_right(self._starts, at) - 1]]
        rest = _Segment(segment.end, segment.write, dict(segment.reads))
        segment.end = at
        self._segments[at] = rest
        insort(self._starts, at)
        return rest

    def _join(self, buffer: "VirtualBuffer") -> None:
        first = bisect_right(self._starts, buffer.start)
        last = bisect_right(self._starts, buffer.end - 1)
        for start in self._starts[first:last]:
            del self._segments[start]
        del self._starts[first:last]


def _who(mark: Mark) -> str:
    return mark[2] if mark is HOST else f"{mark[2]} on {mark[3]}"


def _unordered(buffer: "VirtualBuffer", mark: Mark, verb: str, other: Mark, done: str) -> RaceError:
    mend = "synchronise with" if mark is HOST else f"make {mark[3]} wait for"
    return RaceError(
        f"{buffer.name}: the {verb} by {_who(mark)} is not ordered after the {done} by {_who(other)}: "
        f"{mend} an event recorded behind it"
    )


class HostClock:
    """The host as a participant: what it has seen, and what time it is there."""

    __slots__ = ("seen", "time", "version", "lost")

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.time = 0.0
        self.version = 0  # counts the changes of `seen`
        self.lost = False

    def join(self, seen: tuple[int, ...]) -> None:
        """Be ordered after whatever `seen` is ordered after."""
        join(self.seen, seen)
        self.version += 1


def join(seen: list[int], other: tuple[int, ...] | list[int]) -> None:
    """See what `other` has seen, too. `other` may be of a time with fewer streams."""
    for index, count in enumerate(other):
        if count > seen[index]:
            seen[index] = count


class VirtualBuffer(Buffer):
    """Bytes `start` to `end` of an allocation."""

    __slots__ = ("allocation", "start", "end", "name", "nbytes", "on_device", "_tensor")

    def __init__(self, allocation: Allocation, start: int, nbytes: int, name: str) -> None:
        self.allocation, self.start, self.end = allocation, start, start + nbytes
        self.name, self.nbytes, self.on_device = name, nbytes, allocation.on_device
        self._tensor: torch.Tensor | None = None

    def part(self, offset: int, nbytes: int) -> "VirtualBuffer":
        if offset < 0 or nbytes <= 0 or offset + nbytes > self.nbytes:
            raise IndexError(f"{self.name}: {nbytes} bytes from byte {offset} on are not in its {self.nbytes} bytes")
        name = f"{self.name}[{offset}:{offset + nbytes}]"
        return VirtualBuffer(self.allocation, self.start + offset, nbytes, name)

    def host(self, *, write: bool = False) -> NDArray[np.uint8]:
        """In a ghost zeros that cannot be written; the access counts all the same."""
        if self.on_device:
            raise TypeError(f"{self.name} is device memory: the host cannot reach it, copy it out")
        seen = self.allocation.owner.seen
        if write:
            self.allocation.write(self, seen, HOST)
        else:
            self.allocation.read(self, seen, HOST)
        if self.allocation.tensor is None:
            return np.broadcast_to(np.uint8(0), self.nbytes)
        return self.tensor.numpy()

    @property
    def tensor(self) -> torch.Tensor:
        """The data, unchecked."""
        if self._tensor is None:
            assert self.allocation.tensor is not None
            self._tensor = self.allocation.tensor[self.start : self.end]
        return self._tensor


class VirtualArena(HostArena):
    """Page-locked memory, as far as anybody can tell. Every `take` is an allocation of its own."""

    def __init__(self, nbytes: int, owner: HostClock, ghost: bool) -> None:
        self.nbytes = nbytes
        self._owner, self._ghost = owner, ghost
        self._taken: list[VirtualBuffer] = []
        self._next = 0
        self._closed = False

    def take(self, nbytes: int, name: str) -> VirtualBuffer:
        start = -(-self._next // ALIGNMENT) * ALIGNMENT
        if self._closed:
            raise DeviceError(f"{name}: the arena is closed")
        if nbytes <= 0:
            raise ValueError(f"{name}: {nbytes} bytes asked for, at least 1 is needed")
        if start + nbytes > self.nbytes:
            free = max(self.nbytes - start, 0)
            raise MemoryError(f"{name}: {nbytes} bytes asked for, {free} left of an arena of {self.nbytes}")
        self._next = start + nbytes
        buffer = VirtualBuffer(Allocation(name, nbytes, False, self._owner, self._ghost), 0, nbytes, name)
        self._taken.append(buffer)
        return buffer

    def lose_device(self) -> None:
        """What the device was writing here is garbage; what it was reading is the host's again."""
        for buffer in self._taken:
            buffer.allocation.forget_writes_after(self._owner.seen)

    def close(self) -> None:
        if self._closed:
            return
        for buffer in self._taken:
            buffer.allocation.release(buffer, self._owner.seen)
        self._closed = True
