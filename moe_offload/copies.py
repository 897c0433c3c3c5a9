"""Copies of experts to the device under way: which slot each fills, and which record in host memory it holds.

From its begin to its end (arrived, or called off) a copy has a COMING slot and a held record. Both are given back in
one place, here; a copy that could not even begin leaves neither.
"""

from collections.abc import Iterator

from moe_offload.dispatch_parts import Parts
from moe_offload.transfer.accelerator import Buffer, Event
from moe_offload.transfer.copy_orders import Transfer
from moe_offload.transfer.expert_cache import COMING
from moe_offload.transfer.expert_store import HostMemoryFullError

Key = tuple[int, int]  # layer, expert


class Copies:
    """The copies of one model. `place` of the cache comes before, and gives the slot."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._slots: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._slots))

    def fetch(self, key: Key, slot: int) -> None:
        """Copy now."""
        self._parts.queue.fetch(self._transfer(key, slot))

    def prefetch(self, key: Key, slot: int, priority: float) -> None:
        """Copy when the link has time for it."""
        self._parts.queue.prefetch(self._transfer(key, slot), priority)

    def _transfer(self, key: Key, slot: int) -> Transfer[Key]:
        layer, expert = key
        try:
            record = self._hold(layer, expert)
        except BaseException:
            self._parts.cache.abandon(slot)
            raise
        self._slots[key] = slot
        size = self._parts.record_bytes[layer]
        return Transfer(
            key, record, self._parts.slots.part(slot, size), self._parts.slots.last_read(slot)
        )  # fmt: skip

    def _hold(self, layer: int, expert: int) -> Buffer:
        """The record, in host memory until its copy is over. Where all there are are held by copies, some end first."""
        while True:
            try:
                return self._parts.records.hold(layer, expert)
            except HostMemoryFullError:
                if not self._end_a_copy(layer):
                    raise

    def _end_a_copy(self, layer: int) -> bool:
        """Call off a copy for another layer that waits, or wait for one on its way; False where there is none."""
        queue = self._parts.queue
        for key in queue.waiting:
            if key[0] != layer:
                self.call_off(key)
                return True
        for key in self._slots:
            event = queue.ready(key)
            if event is not None:
                event.synchronize()
                self.note_arrivals()
                return True
        for key in self._slots:  # prefetched for this layer: wanted, or soon
            queue.promote(key)
            return True
        return False

    def event(self, key: Key) -> Event | None:
        """The event behind a copy that was submitted; None where it has arrived: the compute stream knows."""
        if key not in self._parts.queue:
            return None
        event = self._parts.queue.ready(key)
        assert event is not None
        return event

    def call_off(self, key: Key) -> None:
        """Cancel a copy on its way unless it is wholly submitted."""
        slot = self._slots[key]
        cancelled = self._parts.queue.cancel(key)
        if cancelled is None:
            return
        if cancelled.passed is not None:
            self._parts.slots.read_until(slot, cancelled.passed)
        self._parts.cache.abandon(slot)
        self._parts.records.release(*key, cancelled.passed)
        del self._slots[key]

    def note_arrivals(self) -> None:
        """Copies that are over: their slots are READY, their records free."""
        for key, event in self._parts.queue.arrivals():
            self._parts.cache.arrived(self._slots.pop(key))
            self._parts.records.release(*key, event)

    def cancel_all(self) -> None:
        """Call off what waits to be copied; what is on its way arrives."""
        for key in self:
            self.call_off(key)

    def drain(self) -> None:
        """Wait for all copies that are submitted."""
        for key in list(self._slots):
            event = self._parts.queue.ready(key)
            if event is not None:
                event.synchronize()
        self.note_arrivals()

    def mend(self) -> None:
        """An error or Ctrl-C came in between: what is on its way arrives, what was never begun is undone."""
        parts = self._parts
        for key in [key for key in self._slots if key not in parts.queue]:
            parts.records.release(*key)
            del self._slots[key]
        self.cancel_all()
        self.drain()
        parts.accelerator.compute.synchronize()
        for slot in range(parts.cache.slots):
            if parts.cache.state_of(slot) == COMING:
                parts.cache.abandon(slot)
