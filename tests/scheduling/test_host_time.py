"""The host's own time: learned from what layers took, told to planners as the CPU's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.host_time import HostTime
from moe_offload.scheduling.layer_plan import SLOT, LayerCosts, LayerState
from moe_offload.scheduling.planner import plan_makespan

MICRO = 1e-6


def costs_of(cpu: float, gpu: float, copy: float = 1e-3) -> LayerCosts:
    rows = np.arange(65.0)
    return LayerCosts(cpu * rows, gpu * rows, copy, cpu_start=20 * MICRO, gpu_start=30 * MICRO, join=10 * MICRO)


def resident(active: int) -> LayerState:
    return LayerState(
        0, 1, np.arange(active, dtype=np.int32), np.ones(active, np.int64), np.full(active, SLOT, np.int8),
        np.zeros(active), np.zeros(active),
    )  # fmt: skip


@given(
    job=st.floats(0, 100), each=st.floats(0, 20), fetch=st.floats(0, 50),
    layers=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10)), min_size=64, max_size=64),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_enqueueing_is_taken_apart(job: float, each: float, fetch: float, layers: list[tuple[int, int]]) -> None:
    host = HostTime()
    cases = [(1, 0), (8, 0), (8, 4), (20, 2), *layers, (1, 0), (8, 0), (8, 4), (20, 2)]
    for on_device, fetched in cases * 2:
        host.observe_enqueue(on_device, fetched, MICRO * (job + each * on_device + fetch * fetched))
    assert host.fetch == pytest.approx(MICRO * fetch, rel=0.05, abs=0.5 * MICRO)
    costs = costs_of(40 * MICRO, MICRO)
    start = host.adjust(costs, 10).cpu_start - costs.cpu_start
    assert start == pytest.approx(MICRO * (job + each * 10), rel=0.05, abs=6 * MICRO)


def test_nothing_enqueued_teaches_nothing() -> None:
    host = HostTime()
    for _ in range(64):
        host.observe_enqueue(0, 0, 1.0)
    assert host.adjust(costs_of(40 * MICRO, MICRO), 8).cpu_start == pytest.approx(20 * MICRO)


def simulate(
    host: HostTime, layers: int, after_host: float, after_device: float, gpu: float = 12 * MICRO, seed: int = 0
) -> list[int]:
    """Layers of 5 to 8 resident experts, planned as a dispatcher does and "run": how many the CPU took, by layer."""
    random, costs, taken = np.random.default_rng(seed), costs_of(30 * MICRO, gpu), []
    host.begin(1)
    for _ in range(layers):
        state = resident(int(random.integers(5, 9)))
        plan = plan_makespan(state, host.adjust(costs, len(state.experts)))
        on_device, everything = len(plan.gpu_order), len(state.experts)
        if host.explores and 30 * MICRO + gpu * everything <= host.bearable * plan.seconds:
            on_device = everything
        on_cpu = everything - on_device
        device = 30 * MICRO + gpu * on_device
        cpu = (20 * MICRO + 30 * MICRO * on_cpu) if on_cpu else 0.0
        turn = max(cpu + after_host, device + after_device)
        host.observe_turn(turn - cpu, turn - device)
        taken.append(on_cpu)
    return taken


def test_a_host_that_has_much_to_do_between_layers_is_spared() -> None:
    host = HostTime()
    taken = simulate(host, 200, after_host=300 * MICRO, after_device=200 * MICRO)
    assert host.lag == pytest.approx(100 * MICRO, rel=0.1)
    assert (
        sum(taken[-100:]) < 12
    )  # but to learn: 8 experts are 126 us of the device, the first one on the CPU would be 50 + 100


def test_a_host_that_waits_for_the_device_takes_its_share() -> None:
    host = HostTime()
    taken = simulate(host, 200, after_host=200 * MICRO, after_device=200 * MICRO)
    assert host.lag < 20 * MICRO
    assert sum(taken[-100:]) > 100


def test_a_slow_device_is_not_believed_to_be_waited_for() -> None:
    # by the curves two of seven experts on the CPU end a third sooner; but what comes behind it takes longer than that
    host = HostTime()
    taken = simulate(host, 2000, after_host=500 * MICRO, after_device=250 * MICRO, gpu=30 * MICRO)
    assert host.lag == pytest.approx(250 * MICRO, rel=0.1)
    assert sum(each > 0 for each in taken[64:]) < 0.05 * len(taken)  # but to learn: one in 32


def test_another_number_of_tokens_is_learned_anew() -> None:
    host = HostTime()
    simulate(host, 100, after_host=300 * MICRO, after_device=200 * MICRO)
    host.begin(1)
    assert host.lag > 0 and not host.explores
    host.begin(2)
    assert host.lag == 0 and host.explores


def test_rare_hiccups_do_not_move_it() -> None:
    host = HostTime()
    random = np.random.default_rng(1)
    for at in range(2000):
        slow = 5e-3 if at % 50 == 0 else 0.0
        cpu, device = random.uniform(0, 200 * MICRO, 2)
        turn = max(cpu + 150 * MICRO, device + 100 * MICRO) + slow
        host.observe_turn(turn - cpu, turn - device)
    assert host.lag == pytest.approx(50 * MICRO, abs=10 * MICRO)


def test_times_told_stay_positive_and_rise_with_rows() -> None:
    host = HostTime()
    for on_device in (1, 4, 8, 2) * 16:  # 60 us each, twice what the CPU takes
        host.observe_enqueue(on_device, 0, 60 * MICRO * on_device)
    adjusted = host.adjust(costs_of(30 * MICRO, MICRO), 8)
    assert adjusted.cpu[0] == 0 and (np.diff(adjusted.cpu) > 0).all()
    assert adjusted.cpu is host.adjust(costs_of(30 * MICRO, MICRO), 8).cpu or not adjusted.cpu.flags.writeable
    # all on the CPU takes what it took before, wherever the times stand
    assert adjusted.cpu_start + 8 * adjusted.cpu[1] == pytest.approx((20 + 8 * 30) * MICRO, rel=1e-3)
