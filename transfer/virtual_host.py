"""The virtual accelerator's host, streams and events: clocks of two kinds.

Time: the host has a clock and every stream has one, in seconds.

Order: every stream counts its operations, and `seen[i]` of a participant (a stream or the host) says up to which
operation of stream i it is ordered after that stream. Waiting for an event takes over what the event's stream had seen;
whatever the host puts on a stream is ordered after all that the host has seen. The host itself is not counted: what it
did lies before everything that it issues later.
"""

from collections.abc import Callable, Sequence

from moe_offload.transfer.accelerator import DeviceError, Event, Span, Stream

QUERY_SECONDS = 0.5e-6  # so that a loop which polls an event ends

# stream's number, its count, the operation's name, the stream's name
Mark = tuple[int, int, str, str]


class VirtualHost:
    """Who issues operations: its clock, what it is ordered after, and faults that wait for their operation."""

    def __init__(self, wait_seconds: float) -> None:
        self.time = 0.0
        self.seen: list[int] = []
        self.version = 0  # counts the changes of `seen`
        self.spans: list[Span] | None = None
        self.streams: list[VirtualStream] = []
        self._wait_seconds = wait_seconds
        self._operations = 0
        self._faults: list[tuple[int, Callable[[], None]]] = []
        self._next_fault = -1
        self._stopped: tuple[type[DeviceError], str] | None = None

    def add_stream(self, name: str) -> "VirtualStream":
        """A stream, known to all others."""
        for stream in self.streams:
            stream.seen.append(0)
        self.seen.append(0)
        self.streams.append(VirtualStream(self, len(self.streams), name))
        return self.streams[-1]

    def wait_for(self, time: float, seen: Sequence[int]) -> None:
        """Wait until `time`, and be ordered after `seen`."""
        if self.spans is not None and time > self.time:
            self.spans.append(Span("host", "wait", self.time, time))
        self.time = max(self.time, time) + self._wait_seconds
        _join(self.seen, seen)
        self.version += 1

    def count_operation(self) -> None:
        """Every operation begins with this. Faults happen, and where there is no device any more, it raises."""
        if self._operations == self._next_fault:
            self._let_faults_happen()
        self._operations += 1

    def add_fault(self, operations: int, fault: Callable[[], None]) -> None:
        """`fault` happens after so many further operations."""
        if operations < 0:
            raise ValueError(f"after {operations} operations: at least 0")
        if operations == 0:
            fault()
            return
        self._faults.append((self._operations + operations, fault))
        self._next_fault = min(at for at, _ in self._faults)

    def stop(self, error: type[DeviceError], message: str) -> None:
        """From now on every operation raises this."""
        self._stopped = (error, message)
        self._next_fault = self._operations

    @property
    def stopped(self) -> bool:
        return self._stopped is not None

    def _let_faults_happen(self) -> None:
        due = [fault for at, fault in self._faults if at == self._operations]
        self._faults = [entry for entry in self._faults if entry[0] != self._operations]
        self._next_fault = min((at for at, _ in self._faults), default=-1)
        for fault in due:
            fault()
        if self._stopped is not None:
            error, message = self._stopped
            self._next_fault = self._operations
            raise error(message)


class VirtualEvent(Event):
    """What a stream had seen at a point, and when it was there."""

    __slots__ = ("at", "seen", "host", "_timed")

    def __init__(self, host: VirtualHost, at: float, seen: tuple[int, ...], timed: bool) -> None:
        self.host, self.at, self.seen, self._timed = host, at, seen, timed

    def query(self) -> bool:
        self.host.count_operation()
        self.host.time += QUERY_SECONDS
        return self.host.time >= self.at

    def synchronize(self) -> None:
        self.host.count_operation()
        self.host.wait_for(self.at, self.seen)

    def time(self) -> float:
        if not self._timed:
            raise DeviceError("this event has no time: record it with timed=True")
        if self.host.time < self.at:
            raise DeviceError("the stream has not passed this event yet: synchronise with it first")
        return self.at


class VirtualStream(Stream):
    """`number` is its place in `seen`."""

    __slots__ = ("name", "number", "time", "seen", "host", "_version")

    def __init__(self, host: VirtualHost, number: int, name: str) -> None:
        self.host, self.number, self.name = host, number, name
        self.time = 0.0
        self.seen = [0] * (number + 1)
        self._version = -1  # of the host, when last joined

    def wait(self, event: Event) -> None:
        self.host.count_operation()
        if not isinstance(event, VirtualEvent) or event.host is not self.host:
            raise TypeError(f"{self.name} cannot wait for {event!r}: it is no event of this accelerator")
        if event.at > self.time:
            self.time = event.at
        _join(self.seen, event.seen)

    def record(self, *, timed: bool = False) -> VirtualEvent:
        self.host.count_operation()
        return VirtualEvent(self.host, max(self.time, self.host.time), tuple(self.seen), timed)

    def issue(self, name: str) -> Mark:
        """The next operation, which the host puts on the stream now."""
        seen, host = self.seen, self.host
        if self._version != host.version:
            _join(seen, host.seen)
            self._version = host.version
        count = seen[self.number] + 1
        seen[self.number] = count
        return self.number, count, name, self.name


def _join(seen: list[int], other: Sequence[int]) -> None:
    """See what `other` has seen, too, which may be of a time with fewer streams."""
    for number, count in enumerate(other):
        if count > seen[number]:
            seen[number] = count
