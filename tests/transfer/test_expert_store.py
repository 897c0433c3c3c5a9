"""The expert store against a naive model, with many threads, slow and failing sources, and Ctrl-C in the middle."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.transfer.accelerator import Buffer, Event, HostArena
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.expert_store import ExpertStore, HostMemoryFullError
from moe_offload.transfer.host_tier import Key
from moe_offload.transfer.pack_layout import PackPlan, UnusablePackError
from moe_offload.transfer.pack_writer import PackWriter
from moe_offload.transfer.record_source import PackSource
from moe_offload.transfer.server_profile import find_profile
from moe_offload.transfer.virtual import RaceError, VirtualAccelerator

PAGE = 4096


class PlainBuffer(Buffer):
    on_device = False

    def __init__(self, data: NDArray[np.uint8], name: str) -> None:
        self._data, self.name, self.nbytes = data, name, data.size

    def part(self, offset: int, nbytes: int) -> "PlainBuffer":
        return PlainBuffer(self._data[offset : offset + nbytes], self.name)

    def host(self, *, write: bool = False) -> NDArray[np.uint8]:
        return self._data


class PlainArena(HostArena):
    """Ordinary memory, which any thread may ask for. Closed memory is overwritten, so that late readers see it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self._next, self.closed = nbytes, 0, False
        self._data = np.full(nbytes, 255, np.uint8)

    def take(self, nbytes: int, name: str) -> PlainBuffer:
        if self._next + nbytes > self.nbytes:
            raise MemoryError
        self._next += nbytes
        return PlainBuffer(self._data[self._next - nbytes : self._next], name)

    def close(self) -> None:
        self.closed = True
        self._data[:] = 254


def content(layer: int, expert: int, nbytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng((layer, expert)).integers(0, 256, nbytes, np.uint8)


class Source:
    """Records of 100 + 7 * layer bytes. `before` is called in the middle of a read; reads at once are counted."""

    num_experts = 4

    def __init__(self, before: Callable[[Key], object] = lambda key: None) -> None:
        self.before = before
        self.reads: Counter[Key] = Counter()
        self.hints: list[Key] = []
        self.most_at_once = 0
        self._reading: Counter[Key] = Counter()
        self._lock = threading.Lock()

    def record_bytes(self, layer: int) -> int:
        return 100 + 7 * layer

    def read_into(self, layer: int, expert: int, out: NDArray[np.uint8]) -> None:
        key = layer, expert
        with self._lock:
            self.reads[key] += 1
            self._reading[key] += 1
            self.most_at_once = max(self.most_at_once, self._reading[key])
        try:
            data = content(layer, expert, self.record_bytes(layer))
            out[:50] = data[:50]
            self.before(key)
            out[:] = data
        finally:
            with self._lock:
                self._reading[key] -= 1

    def will_need(self, layer: int, expert: int) -> None:
        self.hints.append((layer, expert))


def is_right(buffer: Buffer, layer: int, expert: int) -> bool:
    return bool(np.array_equal(buffer.host(), content(layer, expert, 100 + 7 * layer)))


def slow(key: Key) -> None:
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.001)


def all_at_once(works: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Run works on a thread each; what they raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "stuck"
    return errors


def test_records_are_read_once_and_stay() -> None:
    source = Source()
    with ExpertStore(source, PlainArena, range(3)) as store:
        for _ in range(2):
            for layer in range(3):
                for expert in range(4):
                    assert is_right(store.get(layer, expert), layer, expert)
        assert set(source.reads.values()) == {1} and len(source.reads) == 12
        counters = store.counters
        assert (counters.hits, counters.loads, counters.evictions) == (12, 12, 0)
        assert counters.loaded_bytes == 4 * (100 + 107 + 114)
        assert store.is_here(2).all()
        store.check_integrity()


def test_the_least_recently_used_goes() -> None:
    with ExpertStore(Source(), PlainArena, range(2), 3 * PAGE) as store:
        for expert in (0, 1, 2):
            store.get(0, expert)
        store.get(0, 0)
        store.get(1, 3)
        assert store.is_here(0).tolist() == [True, False, True, False]
        assert store.is_here(1).tolist() == [False, False, False, True]
        assert store.counters.evictions == 1


def test_what_is_held_stays() -> None:
    with ExpertStore(Source(), PlainArena, range(2), 2 * PAGE) as store:
        held = store.hold(0, 0)
        for expert in range(4):
            store.get(1, expert)
        assert is_right(held, 0, 0)
        store.hold(0, 0)
        store.hold(0, 1)
        with pytest.raises(HostMemoryFullError, match="2 in host memory are held"):
            store.get(0, 2)
        store.release(0, 0)
        with pytest.raises(HostMemoryFullError):  # it was held twice
            store.get(0, 2)
        store.release(0, 0)
        assert is_right(store.get(0, 2), 0, 2)
        with pytest.raises(ValueError, match="expert 2 of layer 0 is released and was not held"):
            store.release(0, 2)
        assert store.hold_if_here(0, 0) is None
        assert store.hold_if_here(0, 1) is not None
        store.check_integrity()


def test_addresses_are_those_of_the_bytes() -> None:
    with ExpertStore(Source(), PlainArena, range(2), 2 * PAGE) as store:
        buffer = store.get(1, 2)
        address = int(buffer.host().ctypes.data)
        assert store.address(1, 2) == address
        assert store.addresses(1).tolist() == [0, 0, address, 0]
        with pytest.raises(LookupError, match="expert 0 of layer 1"):
            store.address(1, 0)


def test_a_layer_is_held_all_at_once_or_not_at_all() -> None:
    broken = [True]

    def fail(key: Key) -> None:
        if key == (0, 2) and broken:
            raise OSError("a bad sector")

    source = Source(fail)
    with ExpertStore(source, PlainArena, range(2), 4 * PAGE) as store:
        with pytest.raises(OSError, match="bad sector"), store.held(0, range(4)):
            pass
        for expert in range(4):  # nothing is held
            store.get(1, expert)
        broken.clear()
        with store.held(0, range(4)) as buffers:
            assert all(is_right(buffer, 0, expert) for expert, buffer in enumerate(buffers))
            with pytest.raises(HostMemoryFullError):
                store.get(1, 0)
        store.get(1, 0)
        with store.held(0, [0, 1, 2, 3, 0]):  # twice is no more room
            pass
        store.check_integrity()
    with ExpertStore(source, PlainArena, range(2), 3 * PAGE) as store:
        with pytest.raises(HostMemoryFullError, match=f"4 experts of layer 0 .* ask for fewer, or give {4 * PAGE}"):
            store.hold_all(0, range(4))


def test_many_threads_read_every_record_once() -> None:
    source = Source(slow)
    with ExpertStore(source, PlainArena, range(2)) as store:

        def work() -> None:
            for expert in range(4):
                assert is_right(store.get(0, expert), 0, expert)

        assert not all_at_once([work] * 8)
        assert source.reads == {(0, expert): 1 for expert in range(4)}


def test_threads_that_fight_for_two_slots() -> None:
    source = Source()
    with ExpertStore(source, PlainArena, range(2), 2 * PAGE) as store:

        def work(seed: int) -> Callable[[], None]:
            def run() -> None:
                rng = np.random.default_rng(seed)
                for layer, expert in zip(rng.integers(0, 2, 60), rng.integers(0, 4, 60), strict=True):
                    while True:
                        try:
                            buffer = store.hold(int(layer), int(expert))
                            break
                        except HostMemoryFullError:  # two others hold theirs
                            time.sleep(0)
                    assert is_right(buffer, int(layer), int(expert))
                    store.release(int(layer), int(expert))
                    store.read_ahead([(int(layer), int(expert + 1) % 4)])
                    store.get(int(layer), int(expert)) if seed % 2 else None

            return run

        errors = [e for e in all_at_once([work(seed) for seed in range(6)]) if not isinstance(e, HostMemoryFullError)]
        assert not errors
        assert source.most_at_once == 1
        store.check_integrity()


def test_calls_that_need_all_slots_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExpertStore(Source(), PlainArena, range(2), 2 * PAGE) as store:
        claim_one = store._claim_one

        def slow_claim(*what: Any) -> Any:
            gate = claim_one(*what)
            time.sleep(0.02)  # time for the other to take the second slot
            return gate

        monkeypatch.setattr(store, "_claim_one", slow_claim)

        def work(layer: int) -> Callable[[], None]:
            def run() -> None:
                with suppress(HostMemoryFullError), store.held(layer, [0, 1]) as buffers:
                    assert is_right(buffers[1], layer, 1)

            return run

        assert not all_at_once([work(layer) for layer in range(2)])
        store.check_integrity()


def test_read_ahead_is_used_and_wasted() -> None:
    source = Source()
    with ExpertStore(source, PlainArena, range(2), 3 * PAGE) as store:
        assert store.read_ahead([(0, 0), (0, 1), (0, 0)]) == 2
        wait_until(lambda: bool(store.is_here(0)[:2].all()))
        assert set(source.hints) <= {(0, 1)}  # what is read next
        assert is_right(store.get(0, 1), 0, 1)
        for expert in range(3):
            store.get(1, expert)
        counters = store.counters
        assert (counters.ahead_loads, counters.ahead_used, counters.ahead_wasted) == (2, 1, 1)
        assert counters.hits == 1


def test_read_ahead_spares_what_is_held_and_what_is_predicted() -> None:
    with ExpertStore(Source(), PlainArena, range(3), 3 * PAGE) as store:
        store.hold(0, 0)
        assert store.read_ahead([(1, 0), (1, 1), (1, 2)]) == 2  # as many as fit
        wait_until(lambda: int(store.is_here(1).sum()) == 2)
        assert store.read_ahead([(2, 0)]) == 0
        assert store.is_here(0)[0] and store.is_here(1)[:2].all()
        assert store.read_ahead([(1, 3), (1, 1)]) == 1  # replaces what was predicted for layer 1
        wait_until(lambda: bool(store.is_here(1)[3]))
        assert store.is_here(1).tolist() == [False, True, False, True]
        store.get(2, 0)  # on demand: the least likely of the predicted goes
        assert store.is_here(1).tolist() == [False, False, False, True]
        store.release(0, 0)
        store.check_integrity()


def test_what_waits_in_the_queue_is_taken_over() -> None:
    """One reader is stuck: a call reads the other record itself, and the reader does not read it again."""
    go = threading.Event()

    def stick(key: Key) -> None:
        if key == (0, 0):
            go.wait(10)

    source = Source(stick)
    with ExpertStore(source, PlainArena, range(2), readers=1) as store:
        store.read_ahead([(0, 0), (0, 1), (0, 2)])
        wait_until(lambda: source.reads[0, 0] == 1)
        assert is_right(store.get(0, 1), 0, 1)
        store.check_integrity()
        go.set()
        assert is_right(store.get(0, 0), 0, 0)
        wait_until(lambda: bool(store.is_here(0)[2]))
        assert set(source.reads.values()) == {1}
        assert store.counters.ahead_loads == 2


def test_a_replaced_prediction_is_not_read() -> None:
    go = threading.Event()
    source = Source(lambda key: go.wait(10))
    with ExpertStore(source, PlainArena, range(2), readers=1) as store:
        store.read_ahead([(0, 0), (0, 1)])
        wait_until(lambda: source.reads[0, 0] == 1)
        store.read_ahead([(0, 3)])
        go.set()
        wait_until(lambda: bool(store.is_here(0)[3]))
        assert not source.reads[0, 1]


def test_an_error_reaches_all_who_wait_and_the_next_call_tries_again() -> None:
    waiting = threading.Semaphore(0)

    def fail(key: Key) -> None:
        for _ in range(2):
            waiting.acquire()
        raise OSError("a bad sector")

    source = Source(fail)
    with ExpertStore(source, PlainArena, range(2), PAGE) as store:

        def work() -> None:
            waiting.release()
            store.get(0, 1)

        def others() -> None:
            wait_until(lambda: source.reads[0, 1] == 1)
            work()

        errors = all_at_once([lambda: store.get(0, 1), others, others])
        assert [str(error) for error in errors] == ["a bad sector"] * len(errors) and len(errors) == 3
        assert not store.is_here(0).any()
        source.before = lambda key: None
        assert is_right(store.get(0, 1), 0, 1)
        store.check_integrity()


def test_an_error_of_a_read_ahead_is_counted_and_forgotten() -> None:
    def fail(key: Key) -> None:
        raise OSError("a bad sector")

    source = Source(fail)
    with ExpertStore(source, PlainArena, range(2)) as store:
        store.read_ahead([(0, 1)])
        wait_until(lambda: store.counters.failed == 1)
        source.before = lambda key: None
        assert is_right(store.get(0, 1), 0, 1)


def test_ctrl_c_leaves_no_half_record() -> None:
    def interrupt(key: Key) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        slow(key)

    source = Source(interrupt)
    with ExpertStore(source, PlainArena, range(2), 2 * PAGE) as store:
        with pytest.raises(KeyboardInterrupt):
            store.hold_all(0, [0, 1])
        assert not store.is_here(0)[0]
        assert store.hold_if_here(0, 0) is None
        store.check_integrity()
        source.before = lambda key: None
        for expert in range(4):
            assert is_right(store.get(0, expert), 0, expert)


def test_ctrl_c_in_one_thread_lets_the_others_read() -> None:
    first = [True]
    waiting = threading.Event()

    def interrupt(key: Key) -> None:
        if first:
            first.clear()
            waiting.wait(10)
            time.sleep(0.01)
            raise KeyboardInterrupt

    source = Source(interrupt)
    with ExpertStore(source, PlainArena, range(2)) as store:

        def other() -> None:
            wait_until(lambda: source.reads[0, 1] == 1)
            waiting.set()
            assert is_right(store.get(0, 1), 0, 1)

        errors = all_at_once([lambda: store.get(0, 1), other])
        assert [type(error) for error in errors] == [KeyboardInterrupt]
        assert source.reads[0, 1] == 2


def test_closing_waits_for_reads_and_wakes_those_who_wait() -> None:
    go, begun = threading.Event(), threading.Event()
    arenas: list[PlainArena] = []

    def stick(key: Key) -> None:  # the thread of a call, no reader
        if key == (0, 0):
            begun.set()
            go.wait(10)

    def arena(nbytes: int) -> PlainArena:
        arenas.append(PlainArena(nbytes))
        return arenas[-1]

    store = ExpertStore(Source(stick), arena, range(2), 2 * PAGE)
    reader = threading.Thread(target=lambda: pytest.raises(ValueError, store.get, 0, 0))
    reader.start()
    begun.wait(10)
    waiter = threading.Thread(target=lambda: pytest.raises(ValueError, store.get, 0, 0))
    waiter.start()
    store.read_ahead([(1, 0)])
    closer = threading.Thread(target=store.close)
    closer.start()
    waiter.join(10)
    closer.join(0.05)
    assert not waiter.is_alive() and closer.is_alive() and not arenas[0].closed
    go.set()
    for thread in (closer, reader):
        thread.join(10)
        assert not thread.is_alive()
    assert arenas[0].closed
    store.close()
    for call in (lambda: store.get(0, 0), lambda: store.read_ahead([(0, 0)]), lambda: store.hold_all(0, [0])):
        with pytest.raises(ValueError, match="closed"):
            call()
    store.release(0, 0)
    assert not store.is_here(0).any()


def test_bad_arguments_are_named() -> None:
    source = Source()
    with pytest.raises(ValueError, match=f"hold 1 experts of {PAGE} bytes, and 3 are needed.* at least {3 * PAGE}"):
        ExpertStore(source, PlainArena, range(2), 2 * PAGE - 1, least=3)
    for budget in (0, -1):
        with pytest.raises(ValueError, match="hold 0 experts"):
            ExpertStore(source, PlainArena, range(2), budget)
    with pytest.raises(ValueError, match="readers"):
        ExpertStore(source, PlainArena, [], PAGE)
    with ExpertStore(source, PlainArena, [1, 5], least=100) as store:
        for layer, expert in ((0, 0), (1, 4), (5, -1)):
            with pytest.raises(IndexError, match=f"expert {expert} of layer {layer}"):
                store.get(layer, expert)
            with pytest.raises(IndexError):
                store.read_ahead([(1, 0), (layer, expert)])
        store.check_integrity()


def test_arenas_are_a_gibibyte_at_most_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_offload.transfer.host_tier.SLAB", 3 * PAGE)
    sizes = []

    def arena(nbytes: int) -> PlainArena:
        sizes.append(nbytes)
        if refuse and len(sizes) == 2:
            raise MemoryError("the system refuses")
        made.append(PlainArena(nbytes))
        return made[-1]

    refuse, made = False, list[PlainArena]()
    with ExpertStore(Source(), arena, range(2), 7 * PAGE + 5) as store:
        assert sizes == [3 * PAGE, 3 * PAGE, PAGE] and store.capacity == 7
    refuse, made = True, []
    sizes.clear()
    with pytest.raises(MemoryError, match="refuses"):
        ExpertStore(Source(), arena, range(2))
    assert [each.closed for each in made] == [True]


def test_ctrl_c_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer raises KeyboardInterrupt between any two lines of the store, hundreds of times.

    But while a thread is being started: there Python itself can be left with a lock that nobody opens any more.
    """
    monkeypatch.setattr("moe_offload.transfer.expert_store._LINGER", 60)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = Source(lambda key: time.sleep(1e-4))
    rng = np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        with ExpertStore(source, PlainArena, range(2), 3 * PAGE) as store:
            store.read_ahead([(0, 0), (0, 1)])
            for delay, layer, expert in zip(rng.uniform(1e-5, 1e-3, 400), *rng.integers(0, 2, (2, 400)), strict=True):
                key = int(layer), int(expert)
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    store.read_ahead([(key[0], 2), (1 - key[0], 3)])
                    buffer = store.get(*key)
                    store.get(key[0], 2)
                    store.get(*key)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                store.check_integrity()
                buffer = store.get(*key)
                assert is_right(buffer, *key) and not store.counters.failed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from(["get", "hold", "release"]), st.integers(0, 1), st.integers(0, 3)), max_size=60),
)
@settings(deadline=None, max_examples=100)
def test_contents_are_those_of_a_list(capacity: int, steps: list[tuple[str, int, int]]) -> None:
    """Least recently used goes first, held ones aside: the list has the last one used behind."""
    source = Source()
    here: list[Key] = []
    holds: Counter[Key] = Counter()
    loads = 0
    with ExpertStore(source, PlainArena, range(2), capacity * PAGE) as store:
        for what, layer, expert in steps:
            key = layer, expert
            if what == "release":
                if holds[key]:
                    store.release(*key)
                    holds[key] -= 1
                continue
            call = store.get if what == "get" else store.hold
            if key in here:
                here.remove(key)
            else:
                if len(here) == capacity:
                    victims = [each for each in here if not holds[each]]
                    if not victims:
                        with pytest.raises(HostMemoryFullError):
                            call(*key)
                        continue
                    here.remove(victims[0])
                loads += 1
            here.append(key)
            holds[key] += what == "hold"
            assert is_right(call(*key), *key)
            assert {(at, e) for at in range(2) for e in np.flatnonzero(store.is_here(at)).tolist()} == set(here)
            store.check_integrity()
        assert store.counters.loads == loads == source.reads.total()


class StoreMachine(RuleBasedStateMachine):
    """One thread of a user, the store's readers, 2 layers of 4 experts, 3 slots on the virtual accelerator.

    The model: what is held; what must be here. All data is compared; a slot that is written while a copy reads it is a
    RaceError of the virtual accelerator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = VirtualAccelerator(find_profile("gtx1080ti"), 1 << 20)
        self.copies = self.device.stream("copies")
        self.target = self.device.allocate(200, "target")
        self.source = Source()
        self.store = ExpertStore(self.source, self.device.host_arena, range(2), 3 * PAGE)
        self.holds: Counter[Key] = Counter()

    keys = st.tuples(st.integers(0, 1), st.integers(0, 3))

    @rule(key=keys)
    def get(self, key: Key) -> None:
        if len(+self.holds) == 3 and key not in self.holds:
            with pytest.raises(HostMemoryFullError):
                self.store.get(*key)
            return
        assert is_right(self.store.get(*key), *key)
        assert self.store.is_here(key[0])[key[1]]

    @rule(layer=st.integers(0, 1), experts=st.lists(st.integers(0, 3), max_size=4))
    def hold(self, layer: int, experts: list[int]) -> None:
        keys = [(layer, expert) for expert in experts]
        if len(set(keys) | set(self.holds)) > 3 and not set(keys) <= set(self.holds):
            with pytest.raises(HostMemoryFullError):
                self.store.hold_all(layer, experts)
            return
        for key, buffer in zip(keys, self.store.hold_all(layer, experts), strict=True):
            self.holds[key] += 1
            assert is_right(buffer, *key)

    @rule(key=keys, copied=st.booleans())
    def release(self, key: Key, copied: bool) -> None:
        if key not in self.holds:
            with pytest.raises(ValueError):
                self.store.release(*key)
            return
        event: Event | None = None
        if copied:
            buffer = self.store.hold_if_here(*key)
            assert buffer is not None
            self.store.release(*key)
            self.device.copy_in(self.target.part(0, buffer.nbytes), buffer, self.copies)
            event = self.copies.record()
        self.store.release(*key, event)
        self.holds[key] -= 1
        self.holds = +self.holds

    @rule(keys=st.lists(keys, max_size=5))
    def read_ahead(self, keys: list[Key]) -> None:
        here = {key for key in keys if self.store.is_here(key[0])[key[1]]}
        assert self.store.read_ahead(keys) <= min(len(set(keys) - here), 3 - len(self.holds))

    @invariant()
    def all_is_well(self) -> None:
        self.store.check_integrity()
        assert sum(int(self.store.is_here(layer).sum()) for layer in range(2)) <= 3
        for key in self.holds:
            assert self.store.is_here(key[0])[key[1]]
            assert self.store.address(*key)
        assert self.source.most_at_once <= 1
        counters = self.store.counters
        assert counters.ahead_used + counters.ahead_wasted <= counters.ahead_loads <= counters.loads

    def teardown(self) -> None:
        self.store.close()
        self.device.close()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


def test_a_slot_waits_for_the_copy_that_reads_it() -> None:
    with VirtualAccelerator(find_profile("gtx1080ti"), 1 << 20) as device:
        copies, target = device.stream("copies"), device.allocate(100, "target")
        with ExpertStore(Source(), device.host_arena, range(2), PAGE) as store:
            device.copy_in(target, store.hold(0, 0), copies)
            store.release(0, 0, after=copies.record())
            store.get(0, 1)
            device.copy_in(target, store.hold(0, 1), copies)
            store.release(0, 1)  # without its event
            with pytest.raises(RaceError):
                store.get(0, 2)
            copies.synchronize()
            store.check_integrity()
            assert is_right(store.get(0, 2), 0, 2)


def test_a_lost_device_does_not_stop_the_store() -> None:
    device = VirtualAccelerator(find_profile("gtx1080ti"), 1 << 20)
    with device:
        copies, target = device.stream("copies"), device.allocate(100, "target")
        with ExpertStore(Source(), device.host_arena, range(2), PAGE) as store:
            device.copy_in(target, store.hold(0, 0), copies)
            store.release(0, 0, after=copies.record())
            device.fail_after(0)
            assert is_right(store.get(0, 1), 0, 1)


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[ExpertPack]:
    records = [ExpertRecord(32, 32, "int4"), ExpertRecord(32, 64, "int4")]
    contents = [(f"layer{n}", record, 3) for n, record in enumerate(records)]
    plan = PackPlan.plan("key", [*contents, ("matrix", PackedMatrix(32, 32, "int8"), 1)])
    write_pack(tmp_path / "a.pack", plan, seed=0)
    pack = ExpertPack(tmp_path / "a.pack", plan)
    yield pack
    pack.close()


def write_pack(path: Path, plan: PackPlan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with PackWriter(path, plan) as writer:
        for section in plan.sections:
            records = rng.integers(0, 256, (section.count, section.record_bytes), np.uint8)
            crcs = [writer.write(section, index, record) for index, record in enumerate(records)]
            writer.finish_section(section, crcs)
        writer.finish()


def test_a_pack_is_a_source(pack: ExpertPack) -> None:
    source = PackSource(pack, {4: "layer0", 7: "layer1"})
    try:
        assert (source.num_experts, source.record_bytes(7)) == (3, pack.plan.section("layer1").record_bytes)
        with ExpertStore(source, PlainArena, [4, 7]) as store:
            store.read_ahead([(7, 2)])
            for layer, name in ((4, "layer0"), (7, "layer1")):
                for expert in range(3):
                    assert np.array_equal(store.get(layer, expert).host(), pack.record(name, expert))
        with pytest.raises(IndexError):
            source.read_into(4, 3, np.zeros(source.record_bytes(4), np.uint8))
        with pytest.raises(ValueError, match="does not go into"):
            source.read_into(4, 0, np.zeros(10, np.uint8))
    finally:
        source.close()
        source.close()


def test_a_pack_that_is_no_more_is_no_source(pack: ExpertPack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matrix"):
        PackSource(pack, {0: "matrix"})
    source = PackSource(pack, {0: "layer0"})
    with pack.path.open("r+b") as file:  # cut short under our hands: no fault, an error
        file.truncate(pack.plan.position(pack.plan.section("layer0"), 1) + 1)
    with pytest.raises(OSError, match="layer0, expert 1"):
        source.read_into(0, 1, np.zeros(source.record_bytes(0), np.uint8))
    source.close()
    write_pack(tmp_path / "b.pack", pack.plan, seed=1)
    (tmp_path / "b.pack").replace(pack.path)
    with pytest.raises(UnusablePackError, match="replaced"):
        PackSource(pack, {0: "layer0"})
