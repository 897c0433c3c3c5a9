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
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Buffer, Event, HostArena
from moe_offload.transfer.host_tier import HostRecord, HostTier, Key, State
from moe_offload.transfer.record_source import RecordSource
from moe_offload.transfer.store_counters import StoreCounters

_ALIGNED = 4096
_LINGER = 1.0  # seconds that a reader waits for more: starting a thread takes ten times as long as waking one
_CLOSED = "the expert store is closed"


class HostMemoryFullError(MemoryError):
    """Every record in host memory is held, and another is asked for."""


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
        self._lock = threading.RLock()  # guards all below and the tier
        self._gates: list[threading.Lock] = []  # closed; of those who wait for a change
        self._claiming = threading.Lock()  # taken before: only one call at a time waits for slots while it has some
        self._queue: deque[HostRecord] = deque()
        self._counters = self._tier.counters
        self._closed = False
        # Threads come with work and go without. Daemons: a program that ends without `close` does not wait for them.
        self._work = threading.Condition(self._lock)
        self._readers: set[threading.Thread] = set()
        self._ended: list[threading.Thread] = []  # are through, and still to be joined
        self._most_readers, self._idle_readers = readers, 0

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
        with self._lock:
            self._check(layer, expert)
            record = self._tier.records.get((layer, expert))
            if record is None or record.state is not State.HERE:
                return None
            self._tier.use(record)
            record.holds += 1
            return record.buffer

    def release(self, layer: int, expert: int, after: Event | None = None) -> None:
        """Undo one `hold`. after: the event behind the last copy that reads the record."""
        with self._lock:
            if self._closed:
                return
            record = self._tier.records.get((layer, expert))
            if record is None or not record.holds:
                raise ValueError(f"expert {expert} of layer {layer} is released and was not held")
            if after is not None:
                record.remember(after)
            record.holds -= 1
            self._open_gates()

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
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            for key in wanted:
                self._check(*key)
            self._tier.replace_predictions(wanted)
            for key in wanted:
                if key in self._tier.records:
                    self._tier.predict(self._tier.records[key])
            queued = 0
            for key in wanted:
                if key in self._tier.records:
                    continue
                record = self._tier.reserve(key, self._sizes[key[0]], predicted=True)
                if record is None:
                    break
                self._tier.predict(record)
                queued += 1
            named = [self._tier.records[key] for key in wanted if key in self._tier.records]
            for record in reversed(named):  # the likeliest is to stay longest
                self._tier.records.move_to_end(record.key)
            waiting = [record for record in named if record.state is State.QUEUED]
            self._queue = deque(dict.fromkeys([*self._queue, *waiting]))
            self._wake_readers(len(waiting))
        return queued

    @property
    def counters(self) -> StoreCounters:
        """As they are now."""
        with self._lock:
            return replace(self._counters)

    def check_integrity(self) -> None:
        """AssertionError when the bookkeeping contradicts itself."""
        with self._lock:
            self._tier.check_integrity()
            assert 0 <= self._idle_readers <= len(self._readers)

    def close(self) -> None:
        """Stop and join the threads, wait for copies, give the memory back. Harmless when done twice."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._open_gates()
            self._work.notify_all()
            threads = [*self._readers, *self._ended]
        for thread in threads:
            with suppress(RuntimeError):  # Ctrl-C came before its start
                thread.join()
        while True:
            with self._lock:
                if not any(record.state is State.LOADING for record in self._tier.records.values()):
                    self._tier.close()
                    return
                gate = self._gate()
            gate.acquire()  # a call of another thread is reading

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
        with self._lock:
            for expert in experts:
                self._check(layer, expert)
            found = [self._tier.records.get((layer, expert)) for expert in experts]
            here = [record for record in found if record is not None and record.state is State.HERE]
            if len(here) == len(found):
                self._counters.hits += len(here)
                for record in here:
                    self._tier.use(record)
                    record.holds += holds
                return here
        started = time.perf_counter()
        token = object()
        claimed: list[HostRecord] = []
        try:
            self._claim(layer, experts, token, claimed)
            for record in claimed:
                self._load(record)
            for record in claimed:
                self._await(record)
            with self._lock:
                for record in claimed:
                    self._tier.use(record)
                    record.holds += holds
            return claimed
        finally:
            with self._lock:
                self._counters.waited_seconds += time.perf_counter() - started
                for record in claimed:
                    self._tier.unclaim(record, token)
                self._open_gates()

    def _claim(self, layer: int, experts: Collection[int], token: object, claimed: list[HostRecord]) -> None:
        """A slot for each, and our claim on it."""
        different = len(set(experts))
        if different > self.capacity:
            raise HostMemoryFullError(
                f"{different} experts of layer {layer} are asked for at once, and {self.capacity} of {self.slot_bytes}"
                f" bytes fit host memory: ask for fewer, or give {different * self.slot_bytes} bytes"
            )
        new: list[HostRecord] = []
        with self._claiming:
            for expert in experts:
                while (gate := self._claim_one((layer, expert), token, claimed, new)) is not None:
                    gate.acquire()
        with self._lock:
            self._queue.extendleft(reversed(new[1:]))  # the first is read by this thread
            self._wake_readers(len(new) - 1)

    def _claim_one(
        self, key: Key, token: object, claimed: list[HostRecord], new: list[HostRecord]
    ) -> "threading.Lock | None":
        """None when that is done, else what to wait for."""
        with self._lock:
            self._check(*key)
            record = self._tier.records.get(key)
            if record is None:
                record = self._tier.reserve(key, self._sizes[key[0]], predicted=False)
                if record is None:
                    if self._tier.may_come_free(token):
                        return self._gate()
                    raise HostMemoryFullError(
                        f"expert {key[1]} of layer {key[0]} is asked for, and all {self.capacity} in host memory are"
                        f" held: release some, or give more than {self.capacity * self.slot_bytes} bytes"
                    )
                new.append(record)
            self._counters.hits += record.state is State.HERE
            claimed.append(record)
            record.claims.add(token)
            record.predicted = False
            return None

    def _await(self, record: HostRecord) -> None:
        """Return when the record, which is claimed, is here: read by us, or by whoever began."""
        while True:
            with self._lock:
                if self._closed:
                    raise ValueError(_CLOSED)
                if record.state is State.HERE:
                    return
                if record.error is not None:
                    raise record.error
                gate = self._gate() if record.state is State.LOADING else None
            if gate is None:
                self._load(record)
            else:
                gate.acquire()

    def _gate(self) -> threading.Lock:
        """A lock that can be taken after the next change.

        Where a user's thread waits there is no condition: Ctrl-C within its Python code leaves it locked, or unlocked
        too often.
        """
        gate = threading.Lock()
        gate.acquire()
        self._gates.append(gate)
        return gate

    def _open_gates(self) -> None:
        """Something changed."""
        while self._gates:
            if self._gates[-1].locked():
                self._gates[-1].release()
            self._gates.pop()  # afterwards: better opened twice than never

    def _load(self, record: HostRecord) -> None:
        """Read a record that is QUEUED; an Exception goes into `record.error`."""
        me = threading.get_ident()
        try:
            with self._lock:
                if record.state is not State.QUEUED or self._closed:
                    return
                record.loader, record.ahead = me, not record.claims
                record.state = State.LOADING
            started = time.perf_counter()
            self._source.read_into(*record.key, record.view)
            seconds = time.perf_counter() - started
            with self._lock:
                self._tier.arrived(record)
                self._counters.loads += 1
                self._counters.ahead_loads += record.ahead
                self._counters.loaded_bytes += record.buffer.nbytes
                self._counters.load_seconds += seconds
                self._open_gates()
        except Exception as error:
            with self._lock:
                record.error = error
                self._counters.failed += 1
                self._tier.drop(record)
                self._open_gates()
        except BaseException:  # such as Ctrl-C: those who wait read it themselves
            with self._lock:
                if record.state is State.LOADING and record.loader == me:
                    self._tier.requeue(record)
                    self._tier.unclaim(record, None)
                self._open_gates()
            raise

    def _wake_readers(self, count: int) -> None:
        """See to it that `count` readers are at work, or as many as there may be."""
        if count <= 0:
            return
        self._work.notify(count)
        for _ in range(min(count - self._idle_readers, self._most_readers - len(self._readers))):
            thread = threading.Thread(target=self._read_queue, name="expert-store", daemon=True)
            self._readers.add(thread)
            try:
                thread.start()
            except RuntimeError:  # the system refuses: whoever asks for what is queued reads it
                self._readers.discard(thread)
                return
            except BaseException:
                if thread.ident is None:
                    self._readers.discard(thread)
                raise

    def _read_queue(self) -> None:
        """What a reader does."""
        me = threading.current_thread()
        with self._lock:
            self._readers.add(me)
            ended, self._ended = self._ended, []
        for thread in ended:
            thread.join()  # here: `join` and `is_alive` do not stand Ctrl-C
        try:
            while (record := self._next_record()) is not None:
                self._load(record)
        finally:
            with self._lock:
                self._readers.discard(me)
                self._ended.append(me)

    def _next_record(self) -> HostRecord | None:
        """The first of the queue, which stays there; None when there was none for long."""
        with self._lock:
            while not (self._drop_read() or self._closed):
                self._idle_readers += 1
                woken = self._work.wait(_LINGER)
                self._idle_readers -= 1
                if not woken and not self._queue:
                    return None
            if self._closed:
                return None
            record = self._queue[0]
            following = self._queue[1].key if len(self._queue) > 1 else None
        if following is not None:  # here and not in `read_ahead`: the hint takes 40 us, from a cold disk 800
            self._source.will_need(*following)
        return record

    def _drop_read(self) -> bool:
        """Forget what is first in the queue and needs no reading any more; whether anything is left."""
        while self._queue and self._queue[0].state is not State.QUEUED:
            self._queue.popleft()
        return bool(self._queue)
