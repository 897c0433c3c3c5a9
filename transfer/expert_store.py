"""The tiers of expert weights below the device: disk, and page-locked host memory with a byte budget.

One expert is one contiguous record: one read from the disk, one copy to the device. All slots have one size.

- `hold` makes sure that a record is here, reading it when it is not, and keeps it here until `release`. Who copies a
  record to the device releases it with the event behind the copy: the slot is not written before that.
- `get` is hold and release at once: its bytes may go with the next call that needs room.
- `read_ahead` names what is predicted. Threads of the store read it in the background as far as there is room; what is
  held does not go for it, nor what is predicted itself. A prediction for a layer replaces the one before.
- Nothing is read twice at once: a second call waits for the first, or takes over what waits in the queue. A record is
  here when it is complete; an error of a read reaches all that wait for it, and the next call tries again.

Any thread may call. The store's own threads touch bytes alone, and the accelerator (arenas, events) is used by the
thread that calls: where the accelerator is not thread-safe, that is its thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Buffer, Event, HostArena
from moe_offload.transfer.host_tier import HostRecord, HostTier, Key, State
from moe_offload.transfer.record_source import RecordSource

_ALIGNED = 4096
_CLOSED = "the expert store is closed"


class HostMemoryFullError(MemoryError):
    """Every record in host memory is held, and another is asked for."""


@dataclass(slots=True)
class StoreCounters:
    """What happened so far.

    hits: records that were here when asked for. loads: reads that were completed, on demand or ahead; `loaded_bytes`
    and `load_seconds` are theirs, the seconds summed over threads. waited_seconds: of calls that asked for a record
    that was not here. ahead_loads: loads on a prediction; `ahead_used` were asked for, `ahead_wasted` evicted before.
    evictions: records that made room for others. failed: reads that ended in an error.
    """

    hits: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    waited_seconds: float = 0.0
    ahead_loads: int = 0
    ahead_used: int = 0
    ahead_wasted: int = 0
    evictions: int = 0
    failed: int = 0


class ExpertStore:
    """Records of `layers` from `source`, in at most `budget` bytes of host memory (None: as many as there are).

    least: records that a caller will hold at once. readers: threads that read.

    Raises ValueError when the budget has no room for `least` records, MemoryError when the system refuses the memory.
    """

    def __init__(
        self,
        source: RecordSource,
        arena_factory: Callable[[int], HostArena],
        layers: Sequence[int],
        budget: int | None = None,
        *,
        least: int = 1,
        readers: int = 2,
    ) -> None:
        self._source = source
        self._sizes = {layer: source.record_bytes(layer) for layer in layers}
        experts = source.num_experts
        if not self._sizes or experts < 1 or least < 1 or readers < 1:
            raise ValueError(
                f"a store needs layers, experts, least and readers, got {len(layers)}, {experts}, {least}, {readers}"
            )
        self.slot_bytes = -(-max(self._sizes.values()) // _ALIGNED) * _ALIGNED
        total = experts * len(self._sizes)
        capacity = total if budget is None else max(0, min(total, budget // self.slot_bytes))
        needed = min(least, total)
        if capacity < needed:
            raise ValueError(
                f"{budget} bytes of host memory hold {capacity} experts of {self.slot_bytes} bytes, and {needed} are"
                f" needed at once: give at least {needed * self.slot_bytes} bytes"
            )
        self._tier = HostTier(arena_factory, self.slot_bytes, capacity, dict.fromkeys(self._sizes, experts))
        self.capacity = capacity
        self._changed = threading.Condition()  # guards all below, the tier and the counters
        self._claiming = threading.Lock()  # taken before: only one call at a time waits for slots while it has some
        self._queue: deque[HostRecord] = deque()
        self._predicted: dict[int, list[HostRecord]] = {}
        self._counters = StoreCounters()
        self._closed = False
        self._most_readers = readers
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="expert-store")

    def get(self, layer: int, expert: int) -> Buffer:
        """The record, in host memory until room is needed."""
        return self._obtain(layer, (expert,), 0)[0].buffer

    def hold(self, layer: int, expert: int) -> Buffer:
        """The record, in host memory until `release`."""
        return self._obtain(layer, (expert,), 1)[0].buffer

    def hold_all(self, layer: int, experts: Collection[int]) -> list[Buffer]:
        """As `hold` for each of `experts`, with reads at the same time. All or, on an error, none."""
        return [record.buffer for record in self._obtain(layer, experts, 1)]

    def hold_if_here(self, layer: int, expert: int) -> Buffer | None:
        """As `hold`, but reads and waits for nothing: None when the record is not here."""
        with self._changed:
            self._check(layer, expert)
            record = self._tier.records.get((layer, expert))
            if record is None or record.state is not State.HERE:
                return None
            self._use(record)
            record.holds += 1
            return record.buffer

    def release(self, layer: int, expert: int, after: Event | None = None) -> None:
        """Undo one `hold`. after: the event behind the last copy that reads the record."""
        with self._changed:
            if self._closed:
                return
            record = self._tier.records.get((layer, expert))
            if record is None or not record.holds:
                raise ValueError(f"expert {expert} of layer {layer} is released and was not held")
            if after is not None:
                record.remember(after)
            record.holds -= 1
            self._changed.notify_all()

    @contextmanager
    def held(self, layer: int, experts: Collection[int]) -> Iterator[list[Buffer]]:
        """`hold_all`, and `release` behind it."""
        buffers = self.hold_all(layer, experts)
        try:
            yield buffers
        finally:
            for expert in experts:
                self.release(layer, expert)

    def is_here(self, layer: int) -> NDArray[np.bool_]:
        """[E]: which records are in host memory, complete."""
        here: NDArray[np.bool_] = self._tier.addresses[layer] != 0
        return here

    def addresses(self, layer: int) -> NDArray[np.int64]:
        """[E]: addresses of the first bytes of the records that are here, 0 for others."""
        return self._tier.addresses[layer].copy()

    def address(self, layer: int, expert: int) -> int:
        """Address of a record's first byte. LookupError when it is not here."""
        address = int(self._tier.addresses[layer][expert])
        if not address:
            raise LookupError(f"expert {expert} of layer {layer} is not in host memory: hold it first")
        return address

    def read_ahead(self, keys: Iterable[Key]) -> int:
        """Read these (layer, expert) in the background, the likeliest first; how many were queued."""
        queued: list[HostRecord] = []
        wanted = list(dict.fromkeys(keys))
        with self._changed:
            for key in wanted:
                self._check(*key)
            self._forget_predictions({layer for layer, _ in wanted}, set(wanted))
            for key in wanted:
                if key in self._tier.records:
                    self._predict(self._tier.records[key])
            for key in wanted:
                if key in self._tier.records:
                    continue
                record = self._tier.reserve(key, self._sizes[key[0]], predicted=True)
                if record is None:
                    break
                self._predict(record)
                self._queue.append(record)
                queued.append(record)
            for key in reversed(wanted):  # the likeliest is to stay longest
                if key in self._tier.records:
                    self._tier.records.move_to_end(key)
        for record in queued:
            self._source.will_need(*record.key)
        self._start_readers(len(queued))
        return len(queued)

    @property
    def counters(self) -> StoreCounters:
        """As they are now."""
        with self._changed:
            return replace(self._counters, evictions=self._tier.evictions, ahead_wasted=self._tier.wasted)

    def check_integrity(self) -> None:
        """AssertionError when the bookkeeping contradicts itself."""
        with self._changed:
            self._tier.check_integrity()
            queued = {id(record) for record in self._queue}
            for record in self._tier.records.values():
                assert record.state is not State.QUEUED or record.claims or id(record) in queued, f"forgotten: {record}"

    def close(self) -> None:
        """Stop and join the threads, wait for copies, give the memory back. Harmless when done twice."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._readers.shutdown(cancel_futures=True)
        with self._changed:  # calls of other threads may be reading still
            self._changed.wait_for(
                lambda: not any(record.state is State.LOADING for record in self._tier.records.values())
            )
            self._tier.close()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, layer: int, expert: int) -> None:
        if self._closed:
            raise ValueError(_CLOSED)
        if layer not in self._sizes or not 0 <= expert < len(self._tier.addresses[layer]):
            experts = self._source.num_experts
            raise IndexError(f"expert {expert} of layer {layer}: there are {experts} in layers {sorted(self._sizes)}")

    def _obtain(self, layer: int, experts: Collection[int], holds: int) -> list[HostRecord]:
        """Bring all here and hold each `holds` times."""
        with self._changed:
            for expert in experts:
                self._check(layer, expert)
            found = [self._tier.records.get((layer, expert)) for expert in experts]
            here = [record for record in found if record is not None and record.state is State.HERE]
            if len(here) == len(found):
                self._counters.hits += len(here)
                for record in here:
                    self._use(record)
                    record.holds += holds
                return here
        started = time.perf_counter()
        token = object()
        claimed: list[HostRecord] = []
        try:
            self._claim(layer, experts, token, claimed)
            for record in claimed:
                self._await(record)
            with self._changed:
                for record in claimed:
                    self._use(record)
                    record.holds += holds
            return claimed
        finally:
            with self._changed:
                self._counters.waited_seconds += time.perf_counter() - started
                for record in claimed:
                    self._unclaim(record, token)
                self._changed.notify_all()

    def _claim(self, layer: int, experts: Collection[int], token: object, claimed: list[HostRecord]) -> None:
        """A slot for each, and our claim on it."""
        different = len(set(experts))
        if different > self.capacity:
            raise HostMemoryFullError(
                f"{different} experts of layer {layer} are asked for at once, and {self.capacity} of {self.slot_bytes}"
                f" bytes fit host memory: ask for fewer, or give {different * self.slot_bytes} bytes"
            )
        new = 0
        with self._claiming, self._changed:
            for expert in experts:
                while (record := self._tier.records.get((layer, expert))) is None:
                    self._check(layer, expert)
                    record = self._tier.reserve((layer, expert), self._sizes[layer], predicted=False)
                    if record is not None:
                        self._queue.appendleft(record)
                        new += 1
                        break
                    if not self._tier.may_come_free(token):
                        raise HostMemoryFullError(
                            f"expert {expert} of layer {layer} is asked for, and all {self.capacity} in host memory"
                            f" are held: release some, or give more than {self.capacity * self.slot_bytes} bytes"
                        )
                    self._changed.wait()
                self._counters.hits += record.state is State.HERE
                claimed.append(record)
                record.claims.add(token)
                record.predicted = False
        self._start_readers(new - 1)  # the calling thread reads too

    def _unclaim(self, record: HostRecord, token: object) -> None:
        record.claims.discard(token)
        if record.state is State.QUEUED and not record.claims:
            self._tier.drop(record)  # nobody is left who wants it

    def _await(self, record: HostRecord) -> None:
        """Return when the record, which is claimed, is here: read by us, or by whoever began."""
        while True:
            with self._changed:
                while record.state is State.LOADING and not self._closed:
                    self._changed.wait()
                if self._closed:
                    raise ValueError(_CLOSED)
                if record.state is State.HERE:
                    return
                if record.error is not None:
                    raise record.error
            self._load(record)

    def _load(self, record: HostRecord) -> None:
        """Read a record that is QUEUED; an Exception goes into `record.error`."""
        me = threading.get_ident()
        try:
            with self._changed:
                if record.state is not State.QUEUED or self._closed:
                    return
                record.loader, record.ahead = me, not record.claims
                record.state = State.LOADING
            started = time.perf_counter()
            self._source.read_into(*record.key, record.view)
            seconds = time.perf_counter() - started
            with self._changed:
                self._tier.arrived(record)
                self._counters.loads += 1
                self._counters.ahead_loads += record.ahead
                self._counters.loaded_bytes += record.buffer.nbytes
                self._counters.load_seconds += seconds
                self._changed.notify_all()
        except Exception as error:
            with self._changed:
                record.error = error
                self._counters.failed += 1
                self._tier.drop(record)
                self._changed.notify_all()
        except BaseException:  # such as Ctrl-C: those who wait read it themselves
            with self._changed:
                if record.state is State.LOADING and record.loader == me:
                    self._tier.requeue(record)
                    self._unclaim(record, None)
                self._changed.notify_all()
            raise

    def _read_next(self) -> None:
        """What a reader thread does for everything that is queued."""
        while True:
            with self._changed:
                record = self._queue.popleft() if self._queue else None
            if record is None:
                return
            self._load(record)

    def _start_readers(self, count: int) -> None:
        # A thread may be refused, by the system or because the store is being closed: what is queued is then read by
        # whoever asks for it.
        with suppress(RuntimeError):
            for _ in range(min(count, self._most_readers)):
                self._readers.submit(self._read_next)

    def _use(self, record: HostRecord) -> None:
        """Somebody asked for it, and it is here."""
        self._tier.records.move_to_end(record.key)
        record.predicted = False
        self._counters.ahead_used += record.ahead
        record.ahead = False

    def _forget_predictions(self, layers: set[int], but: set[Key]) -> None:
        for layer in layers:
            for record in self._predicted.pop(layer, ()):
                if record.key not in but:
                    record.predicted = False
                    if record.state is State.QUEUED and not record.claims:
                        self._tier.drop(record)

    def _predict(self, record: HostRecord) -> None:
        record.predicted = True
        self._predicted.setdefault(record.key[0], []).append(record)
