"""Device memory for expert slots: within the budget, given back in slabs, never while it is read."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer.accelerator import NOTHING, OutOfDeviceMemoryError
from moe_offload.transfer.device_slots import DeviceSlots
from moe_offload.transfer.server_profile import find_profile
from moe_offload.transfer.virtual import RaceError, VirtualAccelerator

SLOT = 512


def device(budget: int) -> VirtualAccelerator:
    return VirtualAccelerator(find_profile("t4"), budget)


def test_as_many_as_fit() -> None:
    accelerator = device(10 * SLOT + 100)
    slots = DeviceSlots(accelerator, 300, 64, slab_bytes=4 * SLOT)  # 300 bytes are filled up
    assert (len(slots), slots.slot_bytes, slots.nbytes) == (10, SLOT, 10 * SLOT)
    assert accelerator.used == 10 * SLOT
    assert {slots.buffer(slot).nbytes for slot in range(10)} == {SLOT}


def test_too_few_is_said_and_nothing_is_kept() -> None:
    accelerator = device(10 * SLOT)
    accelerator.reserve(9 * SLOT, "model")
    with pytest.raises(OutOfDeviceMemoryError, match="needs 2 slots of 512 bytes, but only 1 fit: 4608 of 5120"):
        DeviceSlots(accelerator, SLOT, 8, least=2)
    assert accelerator.used == 9 * SLOT


def test_a_part_lives_as_long_as_its_slot() -> None:
    slots = DeviceSlots(device(10 * SLOT), SLOT, 8, slab_bytes=2 * SLOT)
    first, last = slots.part(0, 300), slots.part(7, 300)
    assert first.nbytes == 300 and slots.part(0, 300) is first and slots.part(0, 200).nbytes == 200
    slots.shrink(6)
    with pytest.raises(IndexError):
        slots.part(7, 300)
    slots.grow(8)
    assert slots.part(7, 300) is not last  # the memory is other memory


def test_a_slot_larger_than_a_slab() -> None:
    slots = DeviceSlots(device(10 * SLOT), 3 * SLOT, 8, slab_bytes=SLOT)
    assert (len(slots), slots.per_slab, slots.nbytes) == (3, 1, 9 * SLOT)


SIZES = st.integers(0, 20)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), SIZES, st.lists(st.tuples(st.sampled_from(["grow", "shrink", "take", "give"]), SIZES)))
def test_sizes_agree_whatever_happens(per_slab: int, first: int, steps: list[tuple[str, int]]) -> None:
    accelerator = device(16 * SLOT)
    slots = DeviceSlots(accelerator, SLOT, first, least=0, slab_bytes=per_slab * SLOT)
    others: list[Any] = []
    for step, count in steps:
        before, left = len(slots), slots.after_shrinking(count)
        room = (accelerator.budget - accelerator.used) // SLOT
        if step == "grow":
            assert slots.grow(count) == len(slots) == max(before, min(count, before + room))
        elif step == "shrink":
            assert slots.shrink(count) == len(slots) == left <= min(before, max(count, 0))
            assert before <= count or left > count - per_slab
        elif step == "take" and count <= room and count:
            others.append(accelerator.allocate(count * SLOT, "other"))
        elif step == "give" and others:
            accelerator.free(others.pop())
        assert slots.nbytes == len(slots) * SLOT
        assert accelerator.used == slots.nbytes + sum(other.nbytes for other in others) <= accelerator.budget
        places = {(slots.buffer(slot).name, slots.last_read(slot)) for slot in range(len(slots))}
        assert len(places) == len(slots)


def used_by(slots: DeviceSlots, accelerator: VirtualAccelerator, slot: int) -> Any:
    """A kernel that takes its time with a slot; the event behind it."""
    accelerator.launch(accelerator.compute, lambda *_: None, (), [slots.buffer(slot)], NOTHING)
    return accelerator.compute.record()


def test_memory_is_given_back_behind_its_last_reader() -> None:
    accelerator = device(8 * SLOT)
    slots = DeviceSlots(accelerator, SLOT, 8, slab_bytes=2 * SLOT)
    event = used_by(slots, accelerator, 7)
    slots.read_until(7, event)
    assert slots.last_read(7) is event and slots.last_read(6) is None
    assert slots.shrink(5) == 4
    slots.grow(8)
    assert slots.last_read(7) is None  # other memory


def test_a_reader_that_nobody_told_of_is_found() -> None:
    accelerator = device(8 * SLOT)
    slots = DeviceSlots(accelerator, SLOT, 8, slab_bytes=2 * SLOT)
    used_by(slots, accelerator, 7)
    with pytest.raises(RaceError, match="expert slots 3"):
        slots.shrink(5)
