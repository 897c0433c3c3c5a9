"""Which experts are worth a copy before anybody asks, and how far forecasts are believed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.layer_plan import LayerCosts
from moe_offload.scheduling.prefetch import Booking, CopyEffort, Yield, choose, savings

# 1 s a row on the CPU, 0.5 s an expert of any rows on the device, 3 s a copy.
COSTS = LayerCosts(np.arange(17.0), np.append(0.0, np.full(16, 0.5)), copy=3.0)
EXPERTS = st.integers(1, 12)
PARTS = st.floats(0, 1)


def test_what_an_expert_saves_is_its_gain_times_its_presence() -> None:
    presence, rows = np.array([1.0, 0.5, 0.25, 0.0]), np.array([4.0, 4.0, 0.25, 0.0])
    # 4 rows: 3.5 s; 8 rows when there are any: 7.5 s, every other step; 1 row: 0.5 s, every fourth
    assert savings(presence, rows, COSTS).tolist() == [3.5, 3.75, 0.125, 0.0]


def test_rows_beyond_the_table_save_in_proportion() -> None:
    assert savings(np.ones(1), np.array([64.0]), COSTS)[0] == pytest.approx(4 * (16 - 0.5))


def test_a_device_slower_than_the_cpu_saves_nothing() -> None:
    slow = LayerCosts(COSTS.cpu, 2 * COSTS.cpu, copy=3.0)
    assert not savings(np.ones(3), np.array([1.0, 2.0, 30.0]), slow).any()


def candidates(saved: list[float], absent: list[bool], seconds: float, least: float = 0.0) -> list[int]:
    found = choose(5, np.array(saved), np.array(saved), np.array(absent), seconds, 3.0, least)
    assert all(each.layer == 5 for each in found)
    return [each.expert for each in found]


def test_the_best_absent_ones_that_the_link_carries() -> None:
    saved, absent = [1.0, 9.0, 4.0, 7.0, 2.0], [True, False, True, True, True]
    assert candidates(saved, absent, 100.0) == [3, 2, 4, 0]
    assert candidates(saved, absent, 6.5) == [3, 2]
    assert candidates(saved, absent, 2.9) == []
    assert candidates(saved, absent, 100.0, least=2.0) == [3, 2]  # what saves just that is not worth it
    assert candidates(saved, [False] * 5, 100.0) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(PARTS, st.booleans()), min_size=1, max_size=20), st.floats(-2, 60), PARTS)
def test_no_choice_is_better(experts: list[tuple[float, bool]], seconds: float, least: float) -> None:
    saved, absent = [each[0] for each in experts], [each[1] for each in experts]
    found = candidates(saved, absent, seconds, least)
    worth = sorted((s for s, gone in experts if gone and s > least), reverse=True)
    assert [saved[expert] for expert in found] == worth[: max(int(seconds / 3.0), 0)]
    assert all(absent[expert] for expert in found)


def test_copies_that_take_no_time_are_all_worth_it() -> None:
    found = choose(0, np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.ones(2, np.bool_), 0.0, 0.0, 0.5)
    assert [(each.expert, each.saves, each.keep) for each in found] == [(1, 2.0, 4.0), (0, 1.0, 3.0)]


@settings(max_examples=50, deadline=None)
@given(EXPERTS, st.lists(st.tuples(PARTS, PARTS), min_size=1, max_size=12))
def test_savings_are_never_negative_and_grow_with_presence(seed: int, experts: list[tuple[float, float]]) -> None:
    presence = np.array([each[0] for each in experts])
    rows = presence * np.array([1 + 20 * each[1] for each in experts])
    saved = savings(presence, rows, COSTS)
    assert (saved >= 0).all() and not saved[presence == 0].any()
    assert (savings(presence / 2, rows / 2, COSTS) <= saved + 1e-12).all()


def test_forecasts_are_believed_as_far_as_they_came_true() -> None:
    kept, broken = Yield(), Yield()
    for step in range(400):
        kept.observe(0.5, step % 2 == 0)
        broken.observe(0.5, step % 20 == 0)
    assert kept.share == pytest.approx(1.0, abs=0.05)
    assert broken.share == pytest.approx(0.1, abs=0.06)


def test_what_never_paid_is_tried_again_later() -> None:
    found = Yield()
    for _ in range(1000):
        found.observe(1.0, False)
    assert 0 < found.share < 0.05
    for _ in range(5000):
        found.tick()
    assert found.share > 0.8


def test_the_link_is_booked_until_the_next_layer() -> None:
    booking = Booking(pace=5.0, busy=1.0, slots=100)
    assert booking.seconds(1, 2.0) == 4.0  # has to be there by then
    assert booking.seconds(2, 2.0) == booking.seconds(3, 2.0) == 6.0  # the last copy may go on
    booking.take(2.0)
    booking.take(2.0)
    assert booking.seconds(1, 2.0) == 0.0 and booking.seconds(2, 2.0) == 2.0
    booking.take(2.0)
    assert booking.seconds(2, 2.0) == 0.0


def test_a_copy_that_takes_longer_than_a_layer_goes_to_those_it_reaches_in_time() -> None:
    booking = Booking(pace=1.0, busy=0.0, slots=100)
    assert [booking.seconds(distance, 3.0) >= 3.0 for distance in (1, 2, 3, 4)] == [False, False, True, True]


def test_no_more_is_booked_than_there_are_slots() -> None:
    booking = Booking(pace=50.0, busy=0.0, slots=2)
    assert booking.seconds(1, 3.0) == 6.0
    booking.take(3.0)
    booking.take(3.0)
    assert booking.seconds(1, 3.0) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 20), st.floats(0, 30), st.integers(0, 9), st.lists(st.tuples(st.integers(1, 3), st.floats(0.1, 9))))
def test_bookings_never_exceed_the_link_by_more_than_one_copy(
    pace: float, busy: float, slots: int, asked: list[tuple[int, float]]
) -> None:
    booking, taken, longest = Booking(pace, busy, slots), 0.0, 0.0
    for distance, copy in asked:
        seconds = booking.seconds(distance, copy)
        if seconds >= copy:
            arrives = busy + taken + copy
            assert arrives <= distance * pace + 1e-9  # in time
            booking.take(copy)
            taken, slots, longest = taken + copy, slots - 1, max(longest, copy)
    assert slots >= 0 and taken <= max(pace - busy, 0.0) + longest + 1e-9


def test_the_hosts_effort_is_what_copies_add() -> None:
    effort = CopyEffort()
    effort.observe(1.0, 0)
    for _ in range(100):
        effort.observe(1.0, 0)
        effort.observe(2.0, 4)
    assert effort.seconds == pytest.approx(0.25)
    effort.observe(0.5, 1)  # never below nothing
    assert effort.seconds == pytest.approx(0.9 * 0.25)
