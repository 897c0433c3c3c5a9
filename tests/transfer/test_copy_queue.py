"""The copy queue on the virtual accelerator: times in ghosts of real sizes, bytes and races in small real memory."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_offload.transfer.accelerator import NOTHING, Buffer, Event, Stream, Work
from moe_offload.transfer.copy_orders import CopyCounts, Order, Transfer
from moe_offload.transfer.copy_queue import CopyQueue
from moe_offload.transfer.link_rate import LinkRate
from moe_offload.transfer.server_profile import ServerProfile, find_profile
from moe_offload.transfer.virtual import VirtualAccelerator
from moe_offload.transfer.virtual_host import VirtualEvent
from moe_offload.transfer.virtual_memory import RaceError

MIB = 1 << 20
CHUNK = 1024
PROFILE = find_profile("gtx1080ti")
CHUNK_SECONDS = PROFILE.copy_seconds(4 * MIB)


def quiet(name: str) -> ServerProfile:
    """A host whose jobs cost nothing but reading, so that time can be spent to the point."""
    return replace(find_profile(name), host_job_seconds=0.0, host_expert_seconds=0.0, expert_tables=())


class CountingAccelerator(VirtualAccelerator):
    """Bytes that went over the link."""

    copied = 0

    def copy_in(self, device: Buffer, host: Buffer, stream: Stream) -> None:
        super().copy_in(device, host, stream)
        self.copied += host.nbytes


class Bench:
    """An accelerator with a queue, and records on both sides of the link."""

    def __init__(
        self, sizes: list[int], *, ghost: bool = False, chunk: int = CHUNK, profile: str = "gtx1080ti"
    ) -> None:
        self.accelerator = CountingAccelerator(quiet(profile), ghost=ghost)
        self.arena = self.accelerator.host_arena(sum(-(-size // 4096) * 4096 for size in sizes))
        self.sources: list[Buffer] = []
        for number, size in enumerate(sizes):
            source = self.arena.take(size, f"source {number}")
            data = source.host(write=True)
            if not ghost:
                data[:] = np.random.default_rng(number).integers(0, 256, size)
            self.sources.append(source)
        self.slots = [self.accelerator.allocate(size, f"slot {number}") for number, size in enumerate(sizes)]
        # small chunks: the guess makes each of them take so long that the first fills any backlog
        self.queue: CopyQueue[int] = CopyQueue(self.accelerator, chunk, bandwidth_guess=10.0 if ghost else 1e-3)

    def transfer(self, number: int, after: Event | None = None, slot: int | None = None) -> Transfer[int]:
        return Transfer(number, self.sources[number], self.slots[number if slot is None else slot], after)

    def drain(self) -> list[int]:
        """Everything that arrives when enough time is given."""
        self.queue.feed(1e9)
        self.sleep(1e3)
        return [arrival.key for arrival in self.queue.arrivals()]

    def sleep(self, seconds: float) -> None:
        rate = self.accelerator.profile.host_read_gbs * 1e9
        self.accelerator.run_host(nothing, Work(nbytes=int(seconds * rate)))

    def read(self, number: int, slot: int | None = None) -> Event:
        """Let the device compare a slot with what should be there."""
        slot = number if slot is None else slot
        expected = None if self.accelerator.ghost else self.sources[number].host().copy()

        def compare(data: torch.Tensor) -> None:
            assert np.array_equal(data.numpy(), expected)  # type: ignore[arg-type]

        self.accelerator.launch(self.accelerator.compute, compare, [self.slots[slot]], [], NOTHING)
        return self.accelerator.compute.record()

    def long_read(self, slot: int) -> Event:
        """A kernel of about 10 ms that reads a slot, which need not have been written."""
        self.accelerator.launch(self.accelerator.compute, nothing, [], [self.slots[slot]], NOTHING)
        work = Work(nbytes=int(PROFILE.memory_gbs * 1e7))
        self.accelerator.launch(self.accelerator.compute, nothing, [self.slots[slot]], [], work)
        return self.accelerator.compute.record()


def nothing(*_: torch.Tensor) -> None:
    pass


def when(event: Event | None) -> float:
    """When an event of the future will have passed."""
    assert isinstance(event, VirtualEvent)
    return event.at


@pytest.fixture
def ghosts() -> Iterator[Bench]:
    """40 records of 8 MiB, copied in chunks of 4 MiB."""
    bench = Bench([8 * MIB] * 40, ghost=True, chunk=4 * MIB)
    yield bench
    bench.queue.close()
    bench.accelerator.close()


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 10 * CHUNK - 1])
@pytest.mark.parametrize("urgent", [True, False])
def test_records_are_cut_into_equal_chunks(size: int, urgent: bool) -> None:
    bench = Bench([size])
    bench.accelerator.keep_timeline(True)
    (bench.queue.fetch if urgent else bench.queue.prefetch)(bench.transfer(0))
    assert bench.drain() == [0]
    bench.read(0)
    copies = [span.name for span in bench.accelerator.timeline() if span.track == "copy"]
    assert len(copies) == -(-size // CHUNK)
    if len(copies) > 1:
        bounds = [[int(number) for number in name.split("[")[1][:-1].split(":")] for name in copies]
        lengths = [end - start for start, end in bounds]
        assert sum(lengths) == size and max(lengths) <= CHUNK
        assert max(lengths) - min(lengths) < 256 * len(copies)
        assert all(start % 256 == 0 for start, _ in bounds)


def test_an_urgent_fetch_waits_no_longer_than_the_backlog_and_a_chunk(ghosts: Bench) -> None:
    for number in range(30):
        ghosts.queue.prefetch(ghosts.transfer(number))
    ghosts.queue.feed(0.002)
    ghosts.queue.fetch(ghosts.transfer(35))
    took = when(ghosts.queue.ready(35)) - ghosts.accelerator.now()
    assert 0.002 < took < 0.002 + 3 * CHUNK_SECONDS + 1e-4
    assert when(ghosts.queue.ready(0)) < when(ghosts.queue.ready(35))
    ghosts.queue.feed(1.0)  # too much at once: whoever comes now waits for all of it
    ghosts.queue.fetch(ghosts.transfer(36))
    assert when(ghosts.queue.ready(36)) - ghosts.accelerator.now() > 50 * CHUNK_SECONDS


def test_feeding_keeps_the_backlog_at_what_is_asked(ghosts: Bench) -> None:
    for number in range(40):
        ghosts.queue.prefetch(ghosts.transfer(number))
    assert ghosts.queue.feed(0.0) == 0
    fed = 0
    for _ in range(20):
        fed += ghosts.queue.feed(0.001)
        assert 0.001 <= ghosts.queue.backlog() < 0.001 + 1.1 * CHUNK_SECONDS
        ghosts.sleep(0.0005)
    assert fed == ghosts.queue.counts().prefetched
    assert fed / 12e9 == pytest.approx(0.0095 + 0.001, abs=2 * CHUNK_SECONDS)


def test_no_chunk_is_longer_than_said() -> None:
    bench = Bench([1200], chunk=300)  # less than equal parts, aligned, would be
    bench.accelerator.keep_timeline(True)
    bench.queue.fetch(bench.transfer(0))
    names = [span.name for span in bench.accelerator.timeline() if span.track == "copy"]
    assert [name.split("[")[1] for name in names] == ["0:300]", "300:600]", "600:900]", "900:1200]"]


def test_the_link_never_idles_while_it_is_fed_in_time(ghosts: Bench) -> None:
    for number in range(40):
        ghosts.queue.prefetch(ghosts.transfer(number))
    start = ghosts.accelerator.now()
    while ghosts.queue.waiting:
        ghosts.queue.feed(0.001)
        ghosts.sleep(0.0009)
    end = max(when(ghosts.queue.ready(number)) for number in range(40) if number in ghosts.queue)
    assert ghosts.accelerator.busy["h2d"] > 0.99 * (end - start)


def test_priorities(ghosts: Bench) -> None:
    for number, priority in enumerate([1.0, 3.0, 3.0, 2.0]):
        ghosts.queue.prefetch(ghosts.transfer(number), priority)
    ghosts.queue.set_priority(0, 4.0)
    assert ghosts.drain() == [0, 1, 2, 3]
    for number, priority in enumerate([1.0, 3.0, 2.0]):
        ghosts.queue.prefetch(ghosts.transfer(number), priority)
    ghosts.queue.feed(1e-9)  # half of 1
    ghosts.queue.prefetch(ghosts.transfer(3), 9.0)
    assert ghosts.drain() == [3, 1, 2, 0]


def test_a_promoted_prefetch_goes_before_all_others(ghosts: Bench) -> None:
    for number in range(4):
        ghosts.queue.prefetch(ghosts.transfer(number), priority=-number)
    ghosts.queue.feed(1e-9)  # the first chunk of 0
    ghosts.queue.fetch(ghosts.transfer(3))
    ghosts.queue.promote(0)
    assert ghosts.queue.waiting == [1, 2]
    ghosts.queue.promote(0)  # no more than once
    assert ghosts.drain() == [3, 0, 1, 2]
    assert ghosts.queue.counts() == CopyCounts(
        prefetches=4, promotions=2, on_demand=12 * MIB, prefetched=(4 + 16) * MIB
    )


def test_a_prefetch_that_is_wholly_submitted_can_be_wanted(ghosts: Bench) -> None:
    ghosts.queue.prefetch(ghosts.transfer(0))
    ghosts.queue.feed(1.0)
    ghosts.queue.fetch(ghosts.transfer(0))
    assert ghosts.queue.counts() == CopyCounts(prefetches=1, promotions=1, prefetched=8 * MIB)
    assert ghosts.drain() == [0]


def test_cancelled_half_way() -> None:
    bench = Bench([4 * CHUNK, 4 * CHUNK])
    bench.queue.prefetch(bench.transfer(0))
    bench.queue.feed(1e-9)
    cancelled = bench.queue.cancel(0)
    assert cancelled is not None and cancelled.key == 0 and cancelled.passed is not None
    assert bench.queue.counts() == CopyCounts(prefetches=1, cancellations=1, prefetched=CHUNK, cancelled=CHUNK)
    assert 0 not in bench.queue and bench.drain() == []
    with pytest.raises(RaceError, match="slot 0"):
        bench.accelerator.launch(bench.accelerator.compute, nothing, [], [bench.slots[0]], NOTHING)
    bench.accelerator.compute.wait(cancelled.passed)
    bench.accelerator.launch(bench.accelerator.compute, nothing, [], [bench.slots[0]], NOTHING)


def test_a_slot_whose_prefetch_was_cancelled_takes_the_next() -> None:
    bench = Bench([4 * CHUNK, 4 * CHUNK])
    bench.queue.prefetch(bench.transfer(0))
    bench.queue.feed(1e-9)
    cancelled = bench.queue.cancel(0)
    assert cancelled is not None
    bench.queue.fetch(bench.transfer(1, cancelled.passed, slot=0))
    bench.queue.prefetch(bench.transfer(0, slot=1))  # the key may come again at once
    assert bench.drain() == [1, 0]
    bench.read(1, slot=0)
    bench.read(0, slot=1)


def test_what_cannot_be_cancelled(ghosts: Bench) -> None:
    ghosts.queue.fetch(ghosts.transfer(0))
    ghosts.queue.prefetch(ghosts.transfer(1))
    ghosts.queue.feed(1.0)
    ghosts.queue.prefetch(ghosts.transfer(2))
    ghosts.queue.promote(2)
    assert [ghosts.queue.cancel(number) for number in range(3)] == [None, None, None]
    ghosts.queue.prefetch(ghosts.transfer(3))
    assert [one.key for one in ghosts.queue.cancel_all()] == [3]
    assert ghosts.drain() == [0, 1, 2]


def test_a_prefetch_that_did_not_begin_leaves_its_slot_to_the_last_reader(ghosts: Bench) -> None:
    after = ghosts.long_read(0)
    ghosts.queue.prefetch(ghosts.transfer(0, after))
    cancelled = ghosts.queue.cancel(0)
    assert cancelled is not None and cancelled.passed is after


def test_a_slot_that_is_still_read_is_passed_over(ghosts: Bench) -> None:
    ghosts.queue.prefetch(ghosts.transfer(0, ghosts.long_read(0)), 9.0)
    ghosts.queue.prefetch(ghosts.transfer(1))
    ghosts.queue.feed(1.0)
    assert ghosts.queue.waiting == [0]
    assert when(ghosts.queue.ready(1)) < 0.005
    assert ghosts.queue.ready(0) is None
    ghosts.sleep(0.02)
    ghosts.queue.feed(1.0)
    assert ghosts.queue.waiting == []


def test_an_urgent_copy_waits_for_the_last_reader() -> None:
    bench = Bench([CHUNK])
    after = bench.long_read(0)
    bench.queue.fetch(bench.transfer(0, after))
    assert when(bench.queue.ready(0)) > when(after) > 0.009


class Forgetful(CopyQueue[int]):
    """The planted bug."""

    def _wait_for_reader(self, order: Order[int]) -> None:
        pass


@pytest.mark.parametrize("urgent", [True, False])
def test_a_queue_that_forgets_the_reader_is_caught(urgent: bool) -> None:
    bench = Bench([CHUNK])
    bench.queue = Forgetful(bench.accelerator, CHUNK)
    transfer = bench.transfer(0, bench.long_read(0))
    bench.sleep(1.0)  # all is long over: only the wait is missing
    with pytest.raises(RaceError, match="not ordered after"):
        if urgent:
            bench.queue.fetch(transfer)
        else:
            bench.queue.prefetch(transfer)
            bench.queue.feed(1.0)


def test_who_reads_waits_for_ready() -> None:
    bench = Bench([3 * CHUNK])
    bench.queue.fetch(bench.transfer(0))
    bench.sleep(1.0)
    with pytest.raises(RaceError, match="not ordered after"):
        bench.read(0)
    ready = bench.queue.ready(0)
    assert ready is not None
    bench.accelerator.compute.wait(ready)
    bench.read(0)


def test_compute_is_ordered_behind_arrivals_and_the_host_by_their_event() -> None:
    bench = Bench([CHUNK, CHUNK])
    for number in range(2):
        bench.queue.fetch(bench.transfer(number))
    bench.sleep(1.0)
    arrivals = bench.queue.arrivals()
    for arrival in arrivals:
        bench.read(arrival.key)
    with pytest.raises(RaceError, match="source 0"):
        bench.sources[0].host(write=True)
    arrivals[0].event.synchronize()
    bench.sources[0].host(write=True)
    with pytest.raises(RaceError, match="source 1"):
        bench.sources[1].host(write=True)


def test_arrivals_are_told_once_and_only_when_they_are_there(ghosts: Bench) -> None:
    for number in range(3):
        ghosts.queue.fetch(ghosts.transfer(number))
    assert ghosts.queue.arrivals() == []
    event = ghosts.queue.ready(1)
    assert event is not None
    event.synchronize()
    assert ghosts.queue.ready_in(0) == 0.0
    assert [arrival.key for arrival in ghosts.queue.arrivals()] == [0, 1]
    assert ghosts.queue.arrivals() == []
    with pytest.raises(KeyError, match="0 is not being copied"):
        ghosts.queue.ready(0)


@pytest.mark.parametrize("profile", ["gtx1080ti", "t4", "a100"])
@pytest.mark.parametrize("way", ["idle", "busy", "held up"])
def test_bandwidth_is_that_of_the_link(profile: str, way: str) -> None:
    """However long the link stands still between copies, or before one that waits for a reader."""
    bench = Bench([3 * MIB] * 10, ghost=True, chunk=3 * MIB, profile=profile)
    assert not bench.queue.measured and bench.queue.bandwidth == 10.0
    for number in range(10):
        bench.queue.fetch(bench.transfer(number, bench.long_read(number) if way == "held up" else None))
        if way == "idle":
            bench.sleep(0.01)
    bench.sleep(1.0)
    assert len(bench.queue.arrivals()) == 10
    chunk = 3 * MIB
    server = find_profile(profile)
    # on an idle link the call itself counts, too
    seconds = server.copy_seconds(chunk) + (server.launch_seconds if way == "idle" else 0.0)
    assert bench.queue.measured and bench.queue.bandwidth == pytest.approx(chunk / seconds / 1e9, rel=0.01)
    if way != "idle" and profile != "a100":  # where a copy's latency takes more of so short a chunk
        assert bench.queue.bandwidth == pytest.approx(server.link_gbs, rel=0.05)


def test_bandwidth_follows_a_link_that_changes() -> None:
    bench = Bench([8 * MIB] * 80, ghost=True, chunk=4 * MIB)
    for number in range(80):
        if number == 40:
            bench.drain()
            bench.accelerator.profile = replace(PROFILE, link_gbs=6.0)
        bench.queue.fetch(bench.transfer(number))
    bench.drain()
    assert bench.queue.bandwidth == pytest.approx(6.0, rel=0.05)


def test_it_knows_when_a_record_will_be_there(ghosts: Bench) -> None:
    for number in range(30, 40):  # until the rate is known well
        ghosts.queue.fetch(ghosts.transfer(number))
    assert len(ghosts.drain()) == 10
    for number in range(10):
        ghosts.queue.fetch(ghosts.transfer(number))
    ghosts.queue.prefetch(ghosts.transfer(20))
    for _ in range(12):
        for number in range(10):
            left = max(when(ghosts.queue.ready(number)) - ghosts.accelerator.now(), 0.0)
            assert ghosts.queue.ready_in(number) == pytest.approx(left, rel=0.01, abs=0.03 * CHUNK_SECONDS)
        assert ghosts.queue.backlog() == pytest.approx(ghosts.queue.ready_in(9), abs=1e-5)
        if_promoted = ghosts.queue.backlog() + 8 * MIB / (ghosts.queue.bandwidth * 1e9)
        assert ghosts.queue.ready_in(20) == pytest.approx(if_promoted, rel=0.01)
        ghosts.sleep(0.7 * CHUNK_SECONDS)


def test_a_copy_that_is_held_up_counts_as_backlog(ghosts: Bench) -> None:
    ghosts.queue.fetch(ghosts.transfer(0, ghosts.long_read(0)))
    ghosts.sleep(0.008)
    assert ghosts.queue.backlog() > 0.9 * CHUNK_SECONDS  # of two chunks at least the second


def test_what_may_not_be(ghosts: Bench) -> None:
    queue = ghosts.queue
    queue.fetch(ghosts.transfer(0))
    queue.prefetch(ghosts.transfer(1))
    for twice in (queue.fetch, queue.prefetch):
        with pytest.raises(ValueError, match="0 is being copied already, to slot 0"):
            twice(ghosts.transfer(0))
    with pytest.raises(ValueError, match="1 is being copied already, to slot 1"):
        queue.prefetch(ghosts.transfer(1))
    with pytest.raises(ValueError, match="1 is being copied already, to slot 1"):
        queue.fetch(ghosts.transfer(1, slot=2))
    with pytest.raises(ValueError, match=r"source 2\[0:8\] has 8 bytes, slot 2 8388608"):
        queue.fetch(Transfer(2, ghosts.sources[2].part(0, 8), ghosts.slots[2]))
    with pytest.raises(ValueError, match="no copy from the host to the device"):
        queue.fetch(Transfer(2, ghosts.slots[2], ghosts.sources[2]))
    for ask in (queue.ready, queue.ready_in, queue.promote, queue.cancel):
        with pytest.raises(KeyError, match="2 is not being copied"):
            ask(2)
    with pytest.raises(ValueError, match="chunks of 0 bytes"):
        CopyQueue(ghosts.accelerator, 0)
    with pytest.raises(ValueError, match="must be above 0"):
        CopyQueue(ghosts.accelerator, bandwidth_guess=0.0)
    assert queue.waiting == [1] and ghosts.drain() == [0, 1]


def test_closing_leaves_nothing_on_its_way() -> None:
    bench = Bench([4 * CHUNK] * 2)
    bench.queue.fetch(bench.transfer(0))
    bench.queue.prefetch(bench.transfer(1))
    for _ in range(2):
        bench.queue.close()
        assert bench.queue.waiting == [] and 0 not in bench.queue
    bench.sources[0].host(write=True)
    bench.arena.close()


def test_closing_with_a_lost_device() -> None:
    bench = Bench([4 * CHUNK] * 2)
    bench.queue.fetch(bench.transfer(0))
    bench.queue.prefetch(bench.transfer(1))
    bench.accelerator.fail_after(0)
    bench.queue.close()


def test_the_rate_is_a_median_by_bytes() -> None:
    rate = LinkRate(5.0, window=8)
    assert rate.value == 5.0 and rate.samples == 0
    rate.add(100, 0.0)  # no time passed: says nothing
    assert rate.value == 5.0
    for _ in range(5):
        rate.add(1, 1.0)
    rate.add(100, 10.0)
    assert rate.value == 10.0  # one long copy against five short ones
    rate.add(100, 1000.0)  # a hiccup
    rate.add(100, 0.01)
    assert rate.value == 10.0 and rate.samples == 8
    for _ in range(8):
        rate.add(100, 50.0)
    assert rate.value == 2.0


class QueueMachine(RuleBasedStateMachine):
    """Any order of calls: every record that is told to be there is there, as a whole, and nothing races."""

    sizes = (1, 300, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7)

    @initialize(chunk=st.sampled_from([256, 300, CHUNK]))
    def begin(self, chunk: int) -> None:
        self.bench = Bench(list(self.sizes), chunk=chunk)
        self.queue = self.bench.queue
        accelerator = self.bench.accelerator
        self.slots = [[accelerator.allocate(size, f"{size} {n}") for n in range(2)] for size in self.sizes]
        self.last_use: dict[Buffer, Event | None] = {slot: None for slots in self.slots for slot in slots}
        self.under_way: dict[int, Buffer] = {}
        self.urgent: set[int] = set()
        self.there: dict[int, Buffer] = {}

    def transfer(self, number: int, slot: int) -> Transfer[int]:
        destination = self.slots[number][slot]
        if self.there.get(number) is destination:
            del self.there[number]
        return Transfer(number, self.bench.sources[number], destination, self.last_use[destination])

    def idle(self) -> list[int]:
        return [number for number in range(len(self.sizes)) if number not in self.under_way]

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), slot=st.integers(0, 1), urgent=st.booleans(), priority=st.sampled_from([0.0, 1.0, 2.0]))
    def copy(self, data: st.DataObject, slot: int, urgent: bool, priority: float) -> None:
        transfer = self.transfer(data.draw(st.sampled_from(self.idle())), slot)
        if urgent:
            self.queue.fetch(transfer)
            self.urgent.add(transfer.key)
        else:
            self.queue.prefetch(transfer, priority)
        self.under_way[transfer.key] = transfer.destination

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), again=st.booleans())
    def promote(self, data: st.DataObject, again: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.under_way)))
        if again and number not in self.urgent:
            self.queue.fetch(Transfer(number, self.bench.sources[number], self.under_way[number]))
        else:
            self.queue.promote(number)
        self.urgent.add(number)
        assert self.queue.ready(number) is not None

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.under_way)))
        submitted = self.queue.ready(number) is not None
        cancelled = self.queue.cancel(number)
        assert (cancelled is None) == submitted
        if cancelled is not None:
            self.last_use[self.under_way.pop(number)] = cancelled.passed

    @rule(seconds=st.sampled_from([0.0, 5e-6, 2e-5, 1.0]))
    def feed(self, seconds: float) -> None:
        fed = self.queue.feed(seconds)
        waiting = set(self.under_way) - self.urgent
        assert seconds > 0 or fed == 0
        assert seconds < 1 or all(
            self.queue.ready(number) or not self.last_use[self.under_way[number]].query()  # type: ignore[union-attr]
            for number in waiting
        )

    @rule(seconds=st.sampled_from([1e-6, 1e-5, 1e-3]))
    def time_passes(self, seconds: float) -> None:
        self.bench.sleep(seconds)

    @rule()
    def arrive(self) -> None:
        passed = {n for n in self.under_way if (event := self.queue.ready(n)) is not None and event.query()}
        arrived = [arrival.key for arrival in self.queue.arrivals()]
        assert passed <= set(arrived) and len(set(arrived)) == len(arrived)
        for number in arrived:
            self.there[number] = self.under_way.pop(number)
            self.urgent.discard(number)
            self.read(number, self.there[number])

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def read_again(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.there)))
        self.read(number, self.there[number])

    @precondition(lambda self: self.urgent)
    @rule(data=st.data())
    def read_when_ready(self, data: st.DataObject) -> None:
        """Before the host knows that it is there."""
        number = data.draw(st.sampled_from(sorted(self.urgent)))
        ready = self.queue.ready(number)
        assert ready is not None
        self.bench.accelerator.compute.wait(ready)
        self.read(number, self.under_way[number])

    def read(self, number: int, slot: Buffer) -> None:
        expected = self.bench.sources[number].host().copy()

        def compare(data: torch.Tensor) -> None:
            assert np.array_equal(data.numpy(), expected)

        self.bench.accelerator.launch(self.bench.accelerator.compute, compare, [slot], [], NOTHING)
        self.last_use[slot] = self.bench.accelerator.compute.record()

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "queue"):
            return
        counts = self.queue.counts()
        assert counts.fetches + counts.prefetches - counts.cancellations >= len(self.under_way)
        assert set(self.queue.waiting) <= set(self.under_way) - self.urgent
        assert counts.cancelled <= counts.prefetched
        assert self.queue.backlog() >= 0

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.bench.sleep(1.0)
        self.queue.feed(1e9)
        self.bench.sleep(1.0)
        self.arrive()
        assert not self.under_way and self.queue.backlog() == 0
        counts = self.queue.counts()
        assert counts.on_demand + counts.prefetched == self.bench.accelerator.copied
        self.queue.close()
        self.bench.accelerator.close()


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
