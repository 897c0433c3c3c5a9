"""The race detector: mistakes that it must find, and a comparison with a plain search in the graph of operations."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer.accelerator import NOTHING, DeviceError, Event, Work
from moe_offload.transfer.server_profile import PROFILES
from moe_offload.transfer.virtual import RaceError, VirtualAccelerator
from moe_offload.transfer.virtual_memory import VirtualBuffer

SIZE = 64


def nothing(*_: torch.Tensor) -> None:
    pass


class Server:
    """A device with a slot that holds an expert, a record to copy into it, and a stream to do so on."""

    def __init__(self) -> None:
        self.accelerator = VirtualAccelerator(PROFILES["gtx1080ti"])
        self.arena = self.accelerator.host_arena(1 << 20)
        self.record = self.arena.take(SIZE, "record")
        self.record.host(write=True)[:] = 1
        self.slot = self.accelerator.allocate(SIZE, "slot")
        self.compute, self.copy = self.accelerator.compute, self.accelerator.stream("copy")
        self.copy_in()
        self.copy.synchronize()

    def copy_in(self) -> None:
        self.accelerator.copy_in(self.slot, self.record, self.copy)

    def use(self, *reads: VirtualBuffer, writes: tuple[VirtualBuffer, ...] = ()) -> None:
        self.accelerator.launch(self.compute, nothing, reads, writes, Work(nbytes=SIZE), "expert")


def slot_reused_before_its_reader(server: Server, mend: bool) -> None:
    server.use(server.slot)
    if mend:
        server.copy.wait(server.compute.record())
    server.copy_in()


def event_recorded_too_early(server: Server, mend: bool) -> None:
    event = server.compute.record()
    server.use(server.slot)
    if mend:
        event = server.compute.record()
    server.copy.wait(event)
    server.copy_in()


def wait_for_the_copy_forgotten(server: Server, mend: bool) -> None:
    server.copy_in()
    if mend:
        server.compute.wait(server.copy.record())
    server.use(server.slot)


def wait_on_the_wrong_side(server: Server, mend: bool) -> None:
    server.copy_in()
    event = server.copy.record()
    (server.compute if mend else server.copy).wait(event)
    server.use(server.slot)


def staging_rewritten_in_flight(server: Server, mend: bool) -> None:
    server.copy_in()
    if mend:
        server.copy.synchronize()
    server.record.host(write=True)[:] = 2


def result_read_in_flight(server: Server, mend: bool) -> None:
    server.use(server.slot, writes=(server.record,))
    if mend:
        server.compute.synchronize()
    server.record.host()


def polled_but_not_synchronised(server: Server, mend: bool) -> None:
    """`query` does not order the host."""
    server.use(server.slot, writes=(server.record,))
    event = server.compute.record()
    while not event.query():
        pass
    if mend:
        event.synchronize()
    server.record.host()


def freed_in_flight(server: Server, mend: bool) -> None:
    server.use(server.slot)
    if mend:
        server.compute.synchronize()
    server.accelerator.free(server.slot)


def arena_closed_in_flight(server: Server, mend: bool) -> None:
    server.copy_in()
    if mend:
        server.copy.synchronize()
    server.arena.close()
    server.arena.close()


def read_before_any_write(server: Server, mend: bool) -> None:
    fresh = server.accelerator.allocate(SIZE, "fresh")
    if mend:
        server.use(writes=(fresh,))
    server.use(fresh)


def only_a_part_written(server: Server, mend: bool) -> None:
    fresh = server.accelerator.allocate(SIZE, "fresh")
    server.use(writes=(fresh.part(0, SIZE // 2),))
    server.use(fresh.part(8, 16))
    server.use(fresh if not mend else fresh.part(0, SIZE // 2))


def arena_read_before_any_write(server: Server, mend: bool) -> None:
    fresh = server.arena.take(SIZE, "fresh")
    if mend:
        fresh.host(write=True)[:] = 0
    server.accelerator.copy_in(server.slot, fresh, server.copy)


def memory_read_after_free(server: Server, mend: bool) -> None:
    if not mend:
        server.accelerator.free(server.slot)
    server.use(server.slot)


def part_read_after_free(server: Server, mend: bool) -> None:
    part = server.slot.part(0, 8)
    if not mend:
        server.accelerator.free(server.slot)
    server.use(part)


def freed_twice(server: Server, mend: bool) -> None:
    server.accelerator.free(server.slot)
    if not mend:
        server.accelerator.free(server.slot)


def part_rewritten_before_the_reader_of_the_whole(server: Server, mend: bool) -> None:
    server.use(server.slot)
    if mend:
        server.copy.wait(server.compute.record())
    server.accelerator.copy_in(server.slot.part(48, 16), server.record.part(0, 16), server.copy)


def reader_hidden_by_the_host(server: Server, mend: bool) -> None:
    """The host reads what a kernel reads; then a copy overwrites it, in order with the host only."""
    server.use(server.record)
    server.record.host()
    if mend:
        server.copy.wait(server.compute.record())
    server.accelerator.copy_out(server.record, server.slot, server.copy)


def two_writers(server: Server, mend: bool) -> None:
    """The CPU's share of an output comes in by a copy while the device adds its own."""
    server.use(writes=(server.slot,))
    if mend:
        server.copy.wait(server.compute.record())
    server.copy_in()


MISTAKES = [
    slot_reused_before_its_reader,
    event_recorded_too_early,
    wait_for_the_copy_forgotten,
    wait_on_the_wrong_side,
    staging_rewritten_in_flight,
    result_read_in_flight,
    polled_but_not_synchronised,
    freed_in_flight,
    arena_closed_in_flight,
    read_before_any_write,
    only_a_part_written,
    arena_read_before_any_write,
    memory_read_after_free,
    part_read_after_free,
    freed_twice,
    part_rewritten_before_the_reader_of_the_whole,
    reader_hidden_by_the_host,
    two_writers,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found_and_its_mend_is_accepted(mistake: Callable[[Server, bool], None]) -> None:
    mistake(Server(), True)
    with pytest.raises(RaceError) as caught:
        mistake(Server(), False)
    assert isinstance(caught.value, DeviceError)


def test_the_message_says_who_what_and_how_to_mend() -> None:
    server = Server()
    server.use(server.slot.part(16, 8))
    with pytest.raises(RaceError) as caught:
        server.copy_in()
    assert str(caught.value) == (
        "slot: the write by copy in on copy is not ordered after the read by expert on compute: "
        "let copy wait for an event recorded behind that"
    )


def test_a_race_that_gives_right_numbers_is_found() -> None:
    """The kernel starts long after the copy has ended, as the device had other work; but nothing orders them."""
    server = Server()
    server.copy_in()
    copied = server.copy.record(timed=True)
    server.accelerator.launch(server.compute, nothing, [], [], Work(nbytes=1 << 30))
    server.accelerator.run_host(lambda: None, Work(nbytes=1 << 30))
    assert copied.query() and copied.time() < server.accelerator.now()
    with pytest.raises(RaceError, match="let compute wait"):
        server.use(server.slot)


def test_order_is_passed_on() -> None:
    """copy -> compute -> third: the third stream need not know of the first."""
    server = Server()
    third = server.accelerator.stream("third")
    server.copy_in()
    server.compute.wait(server.copy.record())
    third.wait(server.compute.record())
    server.accelerator.launch(third, nothing, [server.slot], [server.slot], NOTHING)
    third.synchronize()
    server.record.host(write=True)[:] = 3  # after the copy, by way of two streams
    server.copy_in()


def test_parts_of_one_allocation_are_independent() -> None:
    server = Server()
    slab = server.accelerator.allocate(4 * SIZE, "slab")
    for chunk in range(4):  # a record in four pieces, each of its own size
        piece = SIZE // 4
        server.accelerator.copy_in(
            slab.part(chunk * piece, piece), server.record.part(chunk * piece, piece), server.copy
        )
    server.use(writes=(slab.part(SIZE, SIZE),))
    server.use(slab.part(SIZE, SIZE))
    with pytest.raises(RaceError, match=r"slab\[32:96\]"):
        server.use(slab.part(SIZE // 2, SIZE))
    server.compute.wait(server.copy.record())
    server.use(slab.part(SIZE // 2, SIZE))


def test_segments_do_not_pile_up() -> None:
    """Cut anew in every round, a slab consists of the parts of the last write."""
    server = Server()
    slab = server.accelerator.allocate(1000, "slab")
    for round_ in range(50):
        for start in range(0, 1000, 100):
            cut = 1 + (7 * round_ + start) % 99
            server.use(writes=(slab.part(start, cut), slab.part(start + cut, 100 - cut)))
            server.use(slab.part(start, 100))
        server.use(writes=(slab,))
    assert len(slab.allocation._segments) == len(slab.allocation._starts) == 1


# Random programs. The reference keeps every access there was, and for every operation the set of all those before it.

STREAMS, BYTES = 3, 12
Access = tuple[int, int, int, bool]  # allocation, start, end, writes


class Reference:
    """Sets of operations as bits of an integer. `before[s]`: what is ordered before the next operation of stream s; the
    last one is the host's.
    """

    def __init__(self) -> None:
        self.before = [0] * (STREAMS + 1)
        self.history: list[tuple[int, Access]] = []
        self.count = 0

    def races(self, who: int, accesses: list[Access]) -> bool:
        before = self.before[who] | self.before[-1]
        earlier = [(bool(before >> number & 1), access) for number, access in self.history]
        for position, (allocation, start, end, writes) in enumerate(accesses):
            earlier_and_own = earlier + [(True, access) for access in accesses[:position]]
            missing = set() if writes else set(range(start, end))
            for ordered, (where, first, last, wrote) in earlier_and_own:
                if where == allocation and first < end and start < last:
                    if (wrote or writes) and not ordered:
                        return True
                    if wrote:
                        missing.difference_update(range(first, last))
            if missing:
                return True
        return False

    def do(self, who: int, accesses: list[Access]) -> None:
        bit = 1 << self.count
        self.before[who] |= self.before[-1] | bit
        self.history += [(self.count, access) for access in accesses]
        self.count += 1


class Program:
    """Does the same on a virtual accelerator and in the reference."""

    def __init__(self) -> None:
        self.accelerator = VirtualAccelerator(PROFILES["p40"], ghost=True)
        self.streams = [self.accelerator.compute, self.accelerator.stream("one"), self.accelerator.stream("two")]
        self.device = self.accelerator.allocate(BYTES, "device")
        self.host = self.accelerator.host_arena(BYTES).take(BYTES, "host")
        self.reference = Reference()
        self.events: list[tuple[Event, int]] = []

    def record(self, stream: int) -> None:
        self.events.append((self.streams[stream].record(), self.reference.before[stream]))

    def wait(self, who: int, event: int) -> None:
        """A stream or, as the last one, the host."""
        if not self.events:
            return
        recorded, before = self.events[-1 - event % len(self.events)]
        if who == STREAMS:
            recorded.synchronize()
        else:
            self.streams[who].wait(recorded)
        self.reference.before[who] |= before

    def access(self, who: int, accesses: list[Access]) -> None:
        """Where it races a copy of everything is told so, and the original does it after it has waited for all."""
        if self.reference.races(who, accesses):
            with pytest.raises(RaceError):
                copy.deepcopy(self)._run(who, accesses)
            for stream in range(STREAMS):
                self.record(stream)
                self.wait(who, 0)
            if self.reference.races(who, accesses):
                return  # something that nobody has written
        self.reference.do(who, accesses)
        self._run(who, accesses)

    def _run(self, who: int, accesses: list[Access]) -> None:
        buffers = [(self.device, self.host)[where].part(start, end - start) for where, start, end, _ in accesses]
        reads = [buffer for buffer, access in zip(buffers, accesses, strict=True) if not access[3]]
        writes = [buffer for buffer, access in zip(buffers, accesses, strict=True) if access[3]]
        if who == STREAMS:
            buffers[0].host(write=accesses[0][3])
        elif [access[0] for access in accesses] == [1, 0]:
            self.accelerator.copy_in(writes[0], reads[0], self.streams[who])
        elif [access[0] for access in accesses] == [0, 1]:
            self.accelerator.copy_out(writes[0], reads[0], self.streams[who])
        else:
            self.accelerator.launch(self.streams[who], nothing, reads, writes, NOTHING)


def span(start: int, length: int) -> tuple[int, int]:
    return start, min(start + length, BYTES)


numbers = st.integers(0, STREAMS - 1)
places = st.builds(span, st.integers(0, BYTES - 1), st.integers(1, BYTES))


@st.composite
def copies(draw: st.DrawFn) -> list[Access]:
    start, end = draw(places)
    there = draw(st.integers(0, BYTES - (end - start)))
    source = draw(st.integers(0, 1))
    return [(source, start, end, False), (1 - source, there, there + end - start, True)]


@st.composite
def kernels(draw: st.DrawFn) -> list[Access]:
    """Of one side only, so that they are not taken for copies."""
    side = draw(st.integers(0, 1))
    reads, writes = draw(st.lists(places, max_size=2)), draw(st.lists(places, max_size=2))
    return [(side, *place, False) for place in reads] + [(side, *place, True) for place in writes]


host_accesses = st.tuples(places, st.booleans()).map(lambda drawn: [(1, *drawn[0], drawn[1])])
steps = st.one_of(
    st.tuples(st.just("access"), numbers, copies()),
    st.tuples(st.just("access"), numbers, kernels()),
    st.tuples(st.just("access"), st.just(STREAMS), host_accesses),
    st.tuples(st.just("record"), numbers),
    st.tuples(st.just("wait"), st.integers(0, STREAMS), st.integers(0, 5)),
)


@given(program=st.lists(steps, min_size=12, max_size=40), blank=st.booleans())
@settings(deadline=None, max_examples=80)
def test_random_programs_race_exactly_where_the_graph_says(program: list[tuple[Any, ...]], blank: bool) -> None:
    server = Program()
    if not blank:
        server.access(STREAMS, [(1, 0, BYTES, True)])
        server.access(0, [(1, 0, BYTES, False), (0, 0, BYTES, True)])
    for kind, *arguments in program:
        if kind == "record":
            server.record(*arguments)
        elif kind == "wait":
            server.wait(*arguments)
        else:
            server.access(*arguments)
    server.accelerator.close()


def test_values_are_those_of_the_order_of_issue() -> None:
    """What runs without a race gives the numbers of a program that does one thing after another."""
    server = Server()
    rng = np.random.default_rng(0)
    expected = np.ones(SIZE, np.uint8)
    for _ in range(20):
        values = rng.integers(0, 100, SIZE, dtype=np.uint8)
        server.copy.synchronize()
        server.record.host(write=True)[:] = values
        server.copy.wait(server.compute.record())
        server.copy_in()
        server.compute.wait(server.copy.record())
        server.accelerator.launch(server.compute, lambda a, b: b.add_(a), [server.slot], [server.slot], NOTHING)
        expected = 2 * values
    out = server.arena.take(SIZE, "out")
    server.accelerator.copy_out(out, server.slot, server.compute)
    server.compute.synchronize()
    np.testing.assert_array_equal(out.host(), expected)
