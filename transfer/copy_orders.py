"""What a copy queue is told, what it tells, and what it keeps of a copy under way."""

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

from moe_offload.transfer.accelerator import Buffer, Event

Key = TypeVar("Key", bound=Hashable)

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Transfer(Generic[Key]):
    """A record of host memory and where it goes. after: behind the destination's last use; None: nobody uses it."""

    key: Key
    source: Buffer
    destination: Buffer
    after: Event | None = None


class Arrival(NamedTuple, Generic[Key]):
    """A record that has arrived. event: behind its copy, for whoever is not on the compute stream, such as the host."""

    key: Key
    event: Event


class Cancelled(NamedTuple, Generic[Key]):
    """A prefetch that was called off. passed: the destination may be used again behind it; None: at once."""

    key: Key
    passed: Event | None


@dataclass(frozen=True, slots=True)
class CopyCounts:
    """Totals; the difference of two is what came between.

    on_demand, prefetched: bytes submitted for each; what a promoted prefetch had left counts as on demand. cancelled:
    those of the prefetched bytes that were submitted for nothing.
    """

    fetches: int = 0
    prefetches: int = 0
    promotions: int = 0
    cancellations: int = 0
    on_demand: int = 0
    prefetched: int = 0
    cancelled: int = 0

    def __sub__(self, other: "CopyCounts") -> "CopyCounts":
        return CopyCounts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Order(Generic[Key]):
    """A transfer under way: what the queue knows of it."""

    __slots__ = ("done", "end", "event", "free", "number", "on_demand", "part", "priority", "transfer")

    def __init__(self, transfer: Transfer[Key], number: int, chunk_bytes: int, priority: float) -> None:
        self.transfer, self.number, self.priority = transfer, number, priority
        nbytes = transfer.source.nbytes
        even = -(-nbytes // -(-nbytes // chunk_bytes))  # equal chunks: a tiny one at the end would cost as a whole
        self.part = min(-(-even // _ALIGNMENT) * _ALIGNMENT, chunk_bytes)
        self.done = 0  # bytes submitted
        self.end = 0  # where the last of them lies among all bytes ever submitted
        self.event: Event | None = None  # behind them
        self.free = transfer.after is None  # the destination, as far as the host knows
        self.on_demand = False

    @property
    def left(self) -> int:
        """Bytes not submitted yet."""
        return self.transfer.source.nbytes - self.done


class Chunk(NamedTuple, Generic[Key]):
    """A part of a record on its way."""

    order: Order[Key]
    begin: Event | None  # None: begins when the chunk before it ends
    end: Event
    nbytes: int
    issued: float
