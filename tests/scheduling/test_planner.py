from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_offload.scheduling
from moe_offload.scheduling.compiling import SOURCES
from moe_offload.scheduling.layer_plan import (
    COMING,
    CPU,
    FETCH,
    GPU,
    HOST,
    SLOT,
    LayerCosts,
    LayerPlan,
    LayerState,
)
from moe_offload.scheduling.planner import plan_makespan
from moe_offload.scheduling.policies import POLICIES
from moe_offload.scheduling.timing import makespan, objective
from tests.scheduling.exhaustive import REGIMES, least_objective, least_over_orders, random_layer

# 1 s a row on the CPU, 2 s an expert on the device, 5 s a copy.
COSTS = LayerCosts(np.arange(5.0), np.array([0.0, 2.0, 2.0, 2.0, 2.0]), copy=5.0)


def layer(
    rows: list[int], where: list[int], ready: list[float] | None = None, link_busy: float = 0.0, gpu_busy: float = 0.0
) -> LayerState:
    active = len(rows)
    return LayerState(
        0, 4, np.arange(active, dtype=np.int32), np.array(rows, np.int64), np.array(where, np.int8),
        np.array(ready or [0.0] * active, np.float64), np.zeros(active), link_busy, gpu_busy,
    )  # fmt: skip


def plan(action: list[int], gpu_order: list[int], fetch_order: list[int]) -> LayerPlan:
    return LayerPlan(np.array(action, np.int8), np.array(gpu_order, np.int64), np.array(fetch_order, np.int64), 0.0)


@pytest.mark.parametrize(
    ("state", "costs", "planned", "seconds"),
    [
        (layer([], []), COSTS, plan([], [], []), 0.0),
        (layer([], [], gpu_busy=3.0), COSTS, plan([], [], []), 3.0),
        (layer([3, 4], [HOST, HOST]), COSTS, plan([CPU, CPU], [], []), 7.0),
        (layer([3, 4], [HOST, HOST]), replace(COSTS, cpu_start=1.0, join=0.5), plan([CPU, CPU], [], []), 8.5),
        (layer([3], [HOST], gpu_busy=9.0), replace(COSTS, gpu_start=1.0, join=0.5), plan([CPU], [], []), 9.5),
        (layer([3], [SLOT], gpu_busy=9.0), replace(COSTS, gpu_start=1.0, join=0.5), plan([GPU], [0], []), 12.0),
        # the second copy arrives at 1 + 5 + 5, when the device has been idle since 8
        (layer([3, 4], [HOST, HOST], link_busy=1.0), COSTS, plan([FETCH, FETCH], [1, 0], [1, 0]), 13.0),
        # in this order the device waits for both before it begins
        (layer([3, 4], [HOST, HOST], link_busy=1.0), COSTS, plan([FETCH, FETCH], [0, 1], [1, 0]), 15.0),
        (layer([3, 4], [COMING, SLOT], [7.0, 0.0]), COSTS, plan([GPU, GPU], [1, 0], []), 9.0),
        (layer([3, 4], [COMING, SLOT], [7.0, 0.0]), COSTS, plan([GPU, CPU], [0], []), 9.0),
        (layer([40, 4], [HOST, SLOT]), COSTS, plan([CPU, GPU], [1], []), 40.0),  # beyond the table: in proportion
    ],
)
def test_makespan(state: LayerState, costs: LayerCosts, planned: LayerPlan, seconds: float) -> None:
    assert makespan(state, costs, planned) == seconds


def check(state: LayerState, costs: LayerCosts, planned: LayerPlan) -> None:
    """What holds for every plan."""
    active = len(state.rows)
    assert planned.action.shape == (active,)
    fetched = planned.action == FETCH
    assert np.isin(planned.action, (CPU, GPU, FETCH)).all()
    assert (state.where[fetched] == HOST).all()
    assert (state.where[planned.action == GPU] != HOST).all()
    assert sorted(planned.gpu_order) == np.flatnonzero(planned.action != CPU).tolist()
    assert sorted(planned.fetch_order) == np.flatnonzero(fetched).tolist()
    assert fetched.sum() <= state.room
    assert planned.seconds == pytest.approx(makespan(state, costs, planned), rel=1e-9, abs=1e-15)


@st.composite
def layers(draw: st.DrawFn, most: int = 9) -> tuple[LayerState, LayerCosts]:
    """Wide: any rows, zero costs, ties, everything resident, no room, nothing at all."""
    active = draw(st.integers(0, most))
    few = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    times = draw(st.sampled_from([few, st.floats(0.0, 100.0), st.just(0.0), st.just(1.0)]))

    def array(values: st.SearchStrategy[float], size: int = active) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), np.float64)

    entries = draw(st.integers(1, 6))
    cpu, gpu = (np.append(0.0, array(times, entries)) for _ in range(2))
    places = st.sampled_from(draw(st.sampled_from([[HOST], [SLOT], [HOST, SLOT], [HOST, COMING, SLOT]])))
    where = array(places).astype(np.int8)
    state = LayerState(
        layer=0,
        tokens=4096,
        experts=np.arange(active, dtype=np.int32),
        rows=array(st.sampled_from([1, 2, 4096]) | st.integers(1, 4096)).astype(np.int64),
        where=where,
        ready=array(times) * (where == COMING),
        value=array(draw(st.sampled_from([st.just(0.0), times, st.floats(-10.0, 10.0)]))),
        link_busy=draw(times),
        gpu_busy=draw(times),
        room=draw(st.sampled_from([0, 1, 2, 1 << 30])),
    )
    return state, LayerCosts(cpu, gpu, draw(times), draw(times), draw(times), draw(times))


@given(layers())
@settings(deadline=None, max_examples=120)
def test_the_plan_is_the_best_one(case: tuple[LayerState, LayerCosts]) -> None:
    state, costs = case
    planned = plan_makespan(state, costs)
    check(state, costs, planned)
    assert objective(state, costs, planned) == pytest.approx(least_objective(state, costs), rel=1e-9, abs=1e-6)


@given(layers(most=40))
@settings(deadline=None, max_examples=60)
def test_no_plan_is_worse_than_static_placement(case: tuple[LayerState, LayerCosts]) -> None:
    state, costs = case
    planned = plan_makespan(state, costs)
    check(state, costs, planned)
    static = POLICIES["static"].planner(state, costs)
    assert objective(state, costs, planned) <= objective(state, costs, static) + 1e-6


@given(layers(most=4))
@settings(deadline=None, max_examples=25)
def test_no_other_order_is_better(case: tuple[LayerState, LayerCosts]) -> None:
    """Copies of the longest first, runs as they arrive: what planner and exhaustive search take for granted."""
    state, costs = case
    assert least_objective(state, costs) == pytest.approx(least_over_orders(state, costs), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("regime", REGIMES)
def test_up_to_ten_experts_are_planned_as_well_as_can_be(regime: str) -> None:
    rng = np.random.default_rng(10)
    for number in range(40):
        state, costs = random_layer(rng, REGIMES[regime], 1 + number % 10, values=number % 3 == 0)
        planned = plan_makespan(state, costs)
        check(state, costs, planned)
        assert objective(state, costs, planned) <= least_objective(state, costs) + 1e-9 * planned.seconds


@pytest.mark.parametrize("regime", REGIMES)
def test_experts_that_only_the_cpu_can_tell_apart(regime: str) -> None:
    rng = np.random.default_rng(12)
    for number in range(20):
        state, costs = random_layer(rng, REGIMES[regime], 9, values=number % 2 == 0)
        costs = replace(costs, gpu=np.full(257, costs.gpu[64]) * (np.arange(257) > 0))
        state = replace(state, rows=state.rows % 256 + 1)
        planned = plan_makespan(state, costs)
        assert objective(state, costs, planned) <= least_objective(state, costs) + 1e-9 * planned.seconds


@pytest.mark.parametrize("regime", REGIMES)
def test_a_link_that_is_busy_for_long_is_left_alone(regime: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(15):
        state, costs = random_layer(rng, REGIMES[regime], 9)
        state = replace(state, link_busy=float(costs.cpu[-1]) * rng.uniform(1, 20))
        planned = plan_makespan(state, costs)
        assert objective(state, costs, planned) <= least_objective(state, costs) + 1e-9 * planned.seconds


@pytest.mark.parametrize("regime", REGIMES)
def test_more_experts_are_planned_nearly_as_well(regime: str) -> None:
    rng = np.random.default_rng(14)
    gaps = []
    for number in range(6):
        state, costs = random_layer(rng, REGIMES[regime], 14, values=number % 2 == 0)
        planned = plan_makespan(state, costs)
        check(state, costs, planned)
        without = replace(state, value=np.zeros(14))
        gap = objective(state, costs, planned) - least_objective(state, costs)
        gaps.append(gap / least_objective(without, costs))
    assert np.mean(gaps) < 0.02 and max(gaps) < 0.1


def test_many_experts_are_shared_by_link_and_cpu() -> None:
    """On a device that takes no time the k experts with the most rows are fetched, for the best k."""
    rng = np.random.default_rng(128)
    rows = rng.integers(1, 9, 128)
    costs = LayerCosts(np.arange(9.0), np.zeros(9), copy=4.5)
    state = layer(rows.tolist(), [HOST] * 128)
    planned = plan_makespan(state, costs)
    check(state, costs, planned)
    on_cpu = rows.sum() - np.append(0, np.sort(rows)[::-1].cumsum())
    assert planned.seconds == np.maximum(on_cpu, costs.copy * np.arange(129)).min()


def test_a_plan_depends_on_its_arguments_alone() -> None:
    rng = np.random.default_rng(3)
    for active in (8, 40):
        state, costs = random_layer(rng, REGIMES["batch 16, PCIe 3"], active, values=True)
        given = state.rows, state.where, state.ready, state.value, costs.cpu, costs.gpu
        before = [array.tobytes() for array in given]
        first = plan_makespan(state, costs)
        plan_makespan(*random_layer(rng, REGIMES["prefill"], active))
        second = plan_makespan(state, costs)
        assert first.seconds == second.seconds
        for one, other in ((first.action, second.action), (first.gpu_order, second.gpu_order)):
            assert one.tolist() == other.tolist()
        assert [array.tobytes() for array in given] == before


def test_tables_may_be_read_only_and_seconds_whole() -> None:
    state = replace(layer([3, 1, 4], [HOST, SLOT, HOST]), link_busy=0, gpu_busy=0)
    costs = replace(COSTS, cpu=COSTS.cpu.copy(), gpu=COSTS.gpu.copy(), copy=5)
    costs.cpu.flags.writeable = costs.gpu.flags.writeable = False
    check(state, costs, plan_makespan(state, costs))


def test_numbers_that_are_not_numbers_end_nowhere_else() -> None:
    """A broken cost model costs time, not the process."""
    rng = np.random.default_rng(4)
    for broken in (np.nan, np.inf, -1.0):
        for active in (5, 30):
            state, costs = random_layer(rng, REGIMES["prefill"], active, values=True)
            planned = plan_makespan(state, replace(costs, copy=broken, cpu=np.full(9, broken)))
            assert sorted(planned.gpu_order) == np.flatnonzero(planned.action != CPU).tolist()


def test_machine_code_is_keyed_by_all_of_its_sources() -> None:
    folder = Path(moe_offload.scheduling.__file__).parent
    compiled = {
        file.name
        for file in folder.glob("*.py")
        if "import native" in file.read_text() or "import planning" in file.read_text()
    }
    assert compiled <= set(SOURCES)
