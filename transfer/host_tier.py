"""The host tier's bookkeeping: which record lies in which piece of page-locked memory, and which may go. No threads.

    absent --reserve--> QUEUED ----> LOADING ----> HERE
                           |            |            |
                           +-- drop ----+------------+--> GONE (its slot is free again)

A record may be dropped when nobody holds or awaits it, and its slot is written again only after the copies that read
it: their events come with `release`. An event that has passed is still synchronised with, which is what orders the
host behind it.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Buffer, DeviceError, Event, HostArena
from moe_offload.transfer.store_counters import StoreCounters

Key = tuple[int, int]  # layer, expert
SLAB = 1 << 30  # bytes of an arena: large registrations fail where smaller ones work
_EMPTY: NDArray[np.uint8] = np.empty(0, np.uint8)
_MOST_EVENTS = 8  # of one record, before those that have passed are forgotten


class State(Enum):
    QUEUED = "queued"
    LOADING = "loading"
    HERE = "here"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class HostRecord:
    """A record with a slot.

    holds: how often it is held. claims: the calls that await it, a token each. predicted: the last prediction for its
    layer named it, and nobody asked for it since. ahead: its reading began on a prediction, and nobody used it since.
    loader: the thread that reads it while it is LOADING. error: why it is GONE, if it could not be read.
    """

    key: Key
    slot: Buffer
    buffer: Buffer  # the record: the slot's first bytes
    view: NDArray[np.uint8]  # to be written; empty when that is over
    address: int
    predicted: bool
    state: State = State.QUEUED
    holds: int = 0
    claims: set[object] = field(default_factory=set)
    ahead: bool = False
    loader: int = 0
    error: Exception | None = None
    after: list[Event] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.holds and not self.claims and self.state in (State.QUEUED, State.HERE)

    def settle(self, *, wait: bool) -> bool:
        """Whether all copies from it are over; with `wait`, when they are."""
        try:
            if not wait and not all(event.query() for event in self.after):
                return False
            for event in self.after:
                event.synchronize()
        except DeviceError:  # the device is lost, or closed: nothing reads it any more
            pass
        self.after.clear()
        return True

    def remember(self, event: Event) -> None:
        """Do not reuse the slot before `event`."""
        if len(self.after) >= _MOST_EVENTS:
            self.settle(wait=False)
        self.after.append(event)


class HostTier:
    """`capacity` slots of `slot_bytes`; `records` in the order of their last use or prediction.

    addresses: of the records that are here, by layer [E]; 0 for others.
    """

    def __init__(
        self, arena_factory: Callable[[int], HostArena], slot_bytes: int, capacity: int, layers: dict[int, int]
    ) -> None:
        self.slot_bytes, self.capacity = slot_bytes, capacity
        self.records: OrderedDict[Key, HostRecord] = OrderedDict()
        self.addresses = {layer: np.zeros(experts, np.int64) for layer, experts in layers.items()}
        self.counters = StoreCounters()
        self._predicted: dict[int, list[HostRecord]] = {}
        self._arenas: list[HostArena] = []
        self._slots: list[Buffer] = []
        per_slab = max(1, SLAB // slot_bytes)
        try:
            for first in range(0, capacity, per_slab):
                count = min(per_slab, capacity - first)
                arena = arena_factory(count * slot_bytes)
                self._arenas.append(arena)
                self._slots += [arena.take(slot_bytes, f"host record {first + n}") for n in range(count)]
        except BaseException:
            self.close()
            raise
        self._free = self._slots[::-1]

    def reserve(self, key: Key, nbytes: int, *, predicted: bool) -> HostRecord | None:
        """A slot for `key`, which has none; None when there is none to be had now.

        A prediction takes a free slot, or that of a record that is not predicted itself; it waits for no copy.
        """
        self._find_lost_slots()
        if not self._free:
            victim = self._victim(predicted)
            if victim is None:
                return None
            victim.settle(wait=True)
            self.drop(victim)
        slot = self._free[-1]
        buffer = slot if nbytes == slot.nbytes else slot.part(0, nbytes)
        view = buffer.host(write=True)
        record = HostRecord(key, slot, buffer, view, int(view.ctypes.data), predicted)
        self._free.pop()
        self.records[key] = record
        return record

    def _victim(self, predicted: bool) -> HostRecord | None:
        """What was not used (or predicted) for longest; where all is being copied, that is to be waited for."""
        busy = None
        for record in self.records.values():
            if not record.idle or (predicted and record.predicted):
                continue
            if record.settle(wait=False):
                return record
            busy = busy or record
        return None if predicted else busy

    def arrived(self, record: HostRecord) -> None:
        """Its bytes are all there."""
        layer, expert = record.key
        self.addresses[layer][expert] = record.address
        record.view = _EMPTY
        record.state = State.HERE

    def requeue(self, record: HostRecord) -> None:
        """Its bytes are not all there, and someone else is to read them."""
        layer, expert = record.key
        self.addresses[layer][expert] = 0
        record.ahead = False
        record.state = State.QUEUED

    def drop(self, record: HostRecord) -> None:
        """Take its slot away."""
        layer, expert = record.key
        self.addresses[layer][expert] = 0
        if record.state is State.HERE:
            self.counters.evictions += 1
            self.counters.ahead_wasted += record.ahead
        record.state = State.GONE
        record.view = _EMPTY  # an error's traceback may keep the record
        del self.records[record.key]
        self._free.append(record.slot)

    def use(self, record: HostRecord) -> None:
        """Somebody asked for it, and it is here."""
        self.records.move_to_end(record.key)
        record.predicted = False
        self.counters.ahead_used += record.ahead
        record.ahead = False

    def unclaim(self, record: HostRecord, token: object) -> None:
        """The call of `token` awaits it no more."""
        record.claims.discard(token)
        if record.state is State.QUEUED and not record.claims:
            self.drop(record)  # nobody is left who wants it

    def predict(self, record: HostRecord) -> None:
        record.predicted = True
        self._predicted.setdefault(record.key[0], []).append(record)

    def replace_predictions(self, keys: Collection[Key]) -> None:
        """What was predicted for the layers of `keys` is so no longer, but for `keys` themselves."""
        for layer in {layer for layer, _ in keys}:
            for record in self._predicted.pop(layer, ()):
                if record.key not in keys:
                    record.predicted = False
                    if record.state is State.QUEUED and not record.claims:
                        self.drop(record)

    def may_come_free(self, token: object) -> bool:
        """Whether a slot comes free without a `release` and without the call of `token` going on."""
        return any(
            (record.claims or record.state is State.LOADING) and token not in record.claims
            for record in self.records.values()
        )

    def _find_lost_slots(self) -> None:
        """Ctrl-C between two lines above may leave a slot in neither place, never in both."""
        if len(self._free) + len(self.records) != self.capacity:
            used = {id(record.slot) for record in self.records.values()}
            self._free = [slot for slot in self._slots if id(slot) not in used]

    def check_integrity(self) -> None:
        self._find_lost_slots()
        used = [id(record.slot) for record in self.records.values()]
        free = [id(slot) for slot in self._free]
        assert sorted(used + free) == sorted(id(slot) for slot in self._slots), "a slot is lost, or used twice"
        assert len(self._slots) == self.capacity
        here = {record.key: record.address for record in self.records.values() if record.state is State.HERE}
        told = {
            (layer, int(expert)): int(table[expert])
            for layer, table in self.addresses.items()
            for expert in np.flatnonzero(table)
        }
        assert told == here, "addresses of records that are not here"
        for key, record in self.records.items():
            assert record.key == key and record.holds >= 0 and record.state is not State.GONE, record
            assert not record.ahead or record.state in (State.LOADING, State.HERE), record
            assert not record.holds or record.state is State.HERE, record

    def close(self) -> None:
        """Wait for the copies and give the memory back. Harmless when done twice."""
        for record in self.records.values():
            record.settle(wait=True)
            record.state = State.GONE
        self.records.clear()
        self._predicted.clear()
        for table in self.addresses.values():
            table[:] = 0
        self._free, self._slots, self.capacity = [], [], 0
        while self._arenas:
            self._arenas[-1].close()
            self._arenas.pop()
