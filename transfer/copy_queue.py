"""Copies of experts to the device: one stream, on demand before prefetch, in chunks so that one can get in between.

No thread: the host feeds the stream. A fetch is submitted as a whole, at once. Prefetches wait in a list, and `feed`
submits chunks of them only as far as the link's backlog stays short, so that an urgent fetch finds little before it.

On the accelerator's protocol: the first chunk waits for the destination's last reader (`Transfer.after`). Who reads the
record waits for `ready(key)`, unless it was among `arrivals()`: the compute stream is ordered behind these already.
"""

from collections import deque
from dataclasses import fields
from typing import Generic

from moe_offload.transfer.accelerator import Accelerator, DeviceLostError, Event
from moe_offload.transfer.copy_orders import Arrival, Cancelled, Chunk, CopyCounts, Key, Order, Transfer
from moe_offload.transfer.link_rate import LinkRate


class CopyQueue(Generic[Key]):
    """Copies over `accelerator`'s link. `bandwidth_guess`: GB/s until something was measured."""

    def __init__(
        self,
        accelerator: Accelerator,
        chunk_bytes: int = 4 << 20,
        *,
        bandwidth_guess: float = 10.0,
        name: str = "copy",
    ) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"chunks of {chunk_bytes} bytes; at least 1 is needed")
        self._accelerator, self._chunk_bytes = accelerator, chunk_bytes
        self._stream = accelerator.stream(name)
        self._rate = LinkRate(bandwidth_guess * 1e9)
        self._orders: dict[Key, Order[Key]] = {}  # until they are told as arrivals
        self._waiting: dict[Key, Order[Key]] = {}  # prefetches with something left
        self._flying: deque[Chunk[Key]] = deque()
        self._arrived: list[Order[Key]] = []
        self._submitted = self._passed = 0  # bytes ever
        self._last_end = 0.0  # when the last chunk that has passed did so
        self._numbers = 0
        self._counts = dict.fromkeys((f.name for f in fields(CopyCounts)), 0)

    # in

    def fetch(self, transfer: Transfer[Key]) -> None:
        """Copy now, behind what was submitted already. A prefetch of this key to the same destination is promoted."""
        known = self._orders.get(transfer.key)
        if known is not None:
            if known.on_demand or known.transfer.destination is not transfer.destination:
                raise ValueError(f"{transfer.key} is being copied already, to {known.transfer.destination.name}")
            self.promote(transfer.key)
            return
        order = self._enter(transfer, 0.0)
        order.on_demand = True
        self._counts["fetches"] += 1
        self._submit_rest(order)

    def prefetch(self, transfer: Transfer[Key], priority: float = 0.0) -> None:
        """Copy when the link has time for it: those of higher priority first, then in the order of coming."""
        order = self._enter(transfer, priority)
        self._counts["prefetches"] += 1
        self._waiting[transfer.key] = order

    def set_priority(self, key: Key, priority: float) -> None:
        """Of a prefetch; no effect once it is wholly submitted."""
        self._known(key).priority = priority

    def promote(self, key: Key) -> None:
        """Submit what is left of a prefetch at once: it is wanted now."""
        order = self._known(key)
        if order.on_demand:
            return
        order.on_demand = True
        self._counts["promotions"] += 1
        if self._waiting.pop(key, None) is not None:
            self._submit_rest(order)

    def feed(self, seconds: float) -> int:
        """Submit chunks of prefetches until the link has work for `seconds`; answers with their bytes.

        `seconds`: until the caller feeds again, or decides what is urgent. A prefetch whose destination is still read
        is passed over: the stream would stand still, with urgent copies behind it.
        """
        if not self._waiting:
            return 0
        self._collect()
        before = self._submitted
        for order in sorted(self._waiting.values(), key=lambda e: (-e.priority, e.number)):
            if not order.free:
                assert order.transfer.after is not None
                order.free = order.transfer.after.query()
            while order.free and order.left:
                if self._seconds(self._submitted) >= seconds:
                    return self._submitted - before
                self._submit(order)
            if not order.left:
                del self._waiting[order.transfer.key]
        return self._submitted - before

    def cancel(self, key: Key) -> Cancelled[Key] | None:
        """Call a copy off; None when that is too late: it is wholly submitted, as fetches are unless Ctrl-C came.

        Chunks may be on their way: see `Cancelled.passed`.
        """
        order = self._known(key)
        if not order.left:
            return None
        self._waiting.pop(key, None)
        del self._orders[key]
        self._counts["cancellations"] += 1
        self._counts["cancelled"] += order.done
        return Cancelled(key, order.event or order.transfer.after)

    def cancel_all(self) -> list[Cancelled[Key]]:
        """Call off every prefetch that is not wholly submitted."""
        cancelled = [self.cancel(key) for key in list(self._waiting)]
        return [one for one in cancelled if one is not None]

    # out

    def ready(self, key: Key) -> Event | None:
        """An event behind the whole record; None while something of it waits."""
        order = self._known(key)
        return None if order.left else order.event

    def arrivals(self) -> list[Arrival[Key]]:
        """The records that have arrived since the last call. They are forgotten: their keys may come again.

        The compute stream is ordered behind them.
        """
        self._collect()
        arrived, self._arrived = self._arrived, []
        found = []
        for order in arrived:
            assert order.event is not None
            del self._orders[order.transfer.key]
            found.append(Arrival(order.transfer.key, order.event))
        if found:
            self._accelerator.compute.wait(found[-1].event)  # passed, so nobody waits
        return found

    def ready_in(self, key: Key) -> float:
        """Seconds until the record is there, as far as one can tell; of a waiting one, if it were promoted now."""
        self._collect()
        order = self._known(key)
        return self._seconds(self._submitted + order.left if order.left else order.end)

    def backlog(self) -> float:
        """Seconds until the link is through with what was submitted, as far as one can tell."""
        self._collect()
        return self._seconds(self._submitted)

    @property
    def bandwidth(self) -> float:
        """GB/s (10^9 bytes) of the last copies, or the guess."""
        return self._rate.value / 1e9

    @property
    def measured(self) -> bool:
        """Whether `bandwidth` is more than the guess."""
        return self._rate.samples > 0

    @property
    def waiting(self) -> list[Key]:
        """Prefetches that are not wholly submitted."""
        return list(self._waiting)

    def counts(self) -> CopyCounts:
        """What was counted so far."""
        return CopyCounts(**self._counts)

    def __contains__(self, key: Key) -> bool:
        return key in self._orders

    def close(self) -> None:
        """Call off what waits and wait for the rest. Harmless when done twice, or when the device is lost."""
        self.cancel_all()
        try:
            self._stream.synchronize()
        except DeviceLostError:
            pass  # then nothing is on its way either
        self._orders.clear()
        self._flying.clear()
        self._arrived.clear()

    def _known(self, key: Key) -> Order[Key]:
        try:
            return self._orders[key]
        except KeyError:
            raise KeyError(f"{key} is not being copied: it was not asked for, has arrived, or was cancelled") from None

    def _enter(self, transfer: Transfer[Key], priority: float) -> Order[Key]:
        key, source, destination = transfer.key, transfer.source, transfer.destination
        if key in self._orders:
            raise ValueError(f"{key} is being copied already, to {self._orders[key].transfer.destination.name}")
        if source.nbytes != destination.nbytes or source.nbytes < 1:
            raise ValueError(f"{source.name} has {source.nbytes} bytes, {destination.name} {destination.nbytes}")
        if source.on_device or not destination.on_device:
            raise ValueError(f"{source.name} to {destination.name} is no copy from the host to the device")
        self._numbers += 1
        order = self._orders[key] = Order(transfer, self._numbers, self._chunk_bytes, priority)
        return order

    def _submit_rest(self, order: Order[Key]) -> None:
        self._collect()
        while order.left:
            self._submit(order)

    def _submit(self, order: Order[Key]) -> None:
        """Submit the next chunk."""
        stream, transfer = self._stream, order.transfer
        at, nbytes = order.done, min(order.part, order.left)
        waits = at == 0 and transfer.after is not None
        if waits:
            self._wait_for_reader(order)
        # where the stream stands still before the chunk, the end of the last one is not when this one begins
        pauses = not self._flying or (waits and not order.free)
        begin = stream.record(timed=True) if pauses else None
        whole = nbytes == transfer.source.nbytes
        source = transfer.source if whole else transfer.source.part(at, nbytes)
        destination = transfer.destination if whole else transfer.destination.part(at, nbytes)
        self._accelerator.copy_in(destination, source, stream)
        order.event = stream.record(timed=True)
        order.done += nbytes
        self._submitted += nbytes
        order.end = self._submitted
        self._counts["on_demand" if order.on_demand else "prefetched"] += nbytes
        self._flying.append(Chunk(order, begin, order.event, nbytes, self._accelerator.now()))

    def _wait_for_reader(self, order: Order[Key]) -> None:
        """Let the copy wait until the destination's last reader is through."""
        assert order.transfer.after is not None
        self._stream.wait(order.transfer.after)

    def _collect(self) -> None:
        """Take note of the chunks that have passed."""
        while self._flying and self._flying[0].end.query():
            chunk = self._flying.popleft()
            end = chunk.end.time()
            self._rate.add(chunk.nbytes, end - (self._last_end if chunk.begin is None else chunk.begin.time()))
            self._last_end = end
            self._passed += chunk.nbytes
            order = chunk.order
            if not order.left and chunk.end is order.event:
                self._arrived.append(order)

    def _seconds(self, position: int) -> float:
        """Until the link is through with the first `position` of all bytes."""
        left = position - self._passed
        if left <= 0:
            return 0.0
        rate = self._rate.value
        seconds = left / rate
        if self._flying:
            head = self._flying[0]
            begun = self._accelerator.now() - max(self._last_end, head.issued)
            seconds -= min(max(begun, 0.0), head.nbytes / rate)
        return max(seconds, 0.0)
