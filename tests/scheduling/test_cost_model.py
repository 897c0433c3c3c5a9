import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.correction import STALE, WINDOW, Correction
from moe_offload.scheduling.cost_curve import BANDS, ROWS, CostCurve
from moe_offload.scheduling.cost_model import CostModel

KIND = "int4 2048x768"
NBYTES = 2_654_208
CPU = {1: 50e-6, 2: 52e-6, 8: 100e-6, 64: 700e-6, 256: 2.8e-3}
GPU = {1: 5e-6, 64: 20e-6, 256: 80e-6}


def model(**starts: float) -> CostModel:
    made = CostModel(10e-6, 12e9, **starts)
    made.add(KIND, NBYTES, CPU, GPU)
    return made


def rows(*counts: int) -> Any:
    return np.array(counts, np.int64)


def test_the_tables_go_through_the_points_and_on_in_proportion() -> None:
    costs = model(cpu_start=3e-6, gpu_start=9e-6, join=4e-6).layer_costs(KIND)
    assert costs.cpu.shape == costs.gpu.shape == (ROWS + 1,)
    assert costs.cpu[0] == costs.gpu[0] == 0
    np.testing.assert_allclose(costs.cpu[list(CPU)], list(CPU.values()))
    np.testing.assert_allclose(costs.cpu[5], 76e-6)
    np.testing.assert_allclose(costs.cpu[1024], 4 * 2.8e-3)
    assert costs.copy == pytest.approx(10e-6 + NBYTES / 12e9)
    assert (costs.cpu_start, costs.gpu_start, costs.join) == (3e-6, 9e-6, 4e-6)
    with pytest.raises(ValueError, match="read-only"):
        costs.cpu[1] = 0


def test_the_crossover_is_where_the_fetch_begins_to_win() -> None:
    made = model(cpu_start=3e-6, gpu_start=9e-6, join=4e-6)
    costs = made.layer_costs(KIND)

    def fetch_wins(n: int) -> bool:
        return costs.copy + 9e-6 + float(costs.gpu[n]) < 3e-6 + 4e-6 + float(costs.cpu[n])

    at = made.crossover(KIND)
    assert at is not None
    assert not fetch_wins(at - 1)
    assert all(fetch_wins(n) for n in range(at, ROWS + 1))
    assert f"{KIND}: a fetch pays from {at} tokens per expert on" in made.describe()


def test_a_fetch_that_never_or_always_pays() -> None:
    slow, fast = CostModel(1.0, 1e6), CostModel(0.0, 1e14)
    for made in (slow, fast):
        made.add(KIND, NBYTES, CPU, GPU)
    assert slow.crossover(KIND) is None
    assert "a fetch never pays" in slow.describe()
    assert fast.crossover(KIND) == 1
    assert "a fetch always pays" in fast.describe()


def test_costs_are_made_anew_only_when_something_moved() -> None:
    made = model()
    costs = made.layer_costs(KIND)
    for _ in range(50):
        made.observe_cpu(KIND, rows(1, 1, 8), float(costs.cpu[[1, 1, 8]].sum()))
        made.observe_copy(NBYTES, costs.copy)
    assert made.layer_costs(KIND) is costs
    for _ in range(50):
        made.observe_copy(NBYTES, 2 * costs.copy)
    assert made.layer_costs(KIND).copy == pytest.approx(2 * costs.copy, rel=0.02)
    assert made.copy_seconds(1 << 20) == pytest.approx(2 * (10e-6 + (1 << 20) / 12e9), rel=0.02)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_lasting_change_is_followed_within_some_tens_of_jobs(device: str, factor: float) -> None:
    made = model(cpu_start=5e-6, gpu_start=5e-6)
    observe = getattr(made, f"observe_{device}")
    before = getattr(made.layer_costs(KIND), device)
    noise = np.random.default_rng(1)
    for _ in range(40):
        counts = rows(*noise.integers(1, 4, 8))
        observe(KIND, counts, 5e-6 + factor * float(before[counts].sum()) * noise.lognormal(0, 0.1))
    after = getattr(made.layer_costs(KIND), device)
    assert after[2] / before[2] == pytest.approx(factor, rel=0.1)
    assert after[500] / before[500] == pytest.approx(factor, rel=0.1)  # never measured: as its neighbours
    other = "gpu" if device == "cpu" else "cpu"
    assert getattr(made.layer_costs(KIND), other) is getattr(model().layer_costs(KIND), other) or np.array_equal(
        getattr(made.layer_costs(KIND), other), getattr(model().layer_costs(KIND), other)
    )


@pytest.mark.parametrize("hiccup", [1e-3, 100.0, 1e9])
def test_hiccups_move_nothing(hiccup: float) -> None:
    made = model()
    before = made.layer_costs(KIND).cpu
    for step in range(300):
        seconds = float(before[[1, 2, 1]].sum())
        made.observe_cpu(KIND, rows(1, 2, 1), seconds * (hiccup if step % 10 == 0 else 1))
    np.testing.assert_allclose(made.layer_costs(KIND).cpu, before, rtol=0.02)


@given(
    st.lists(st.floats(0.3, 3.0), min_size=len(BANDS), max_size=len(BANDS)),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_every_band_finds_its_own_factor(factors: list[float], seed: int) -> None:
    curve = CostCurve({1: 1e-4, 1024: 1e-4 * 1024 * 0.9})  # steep enough that the truth below does not fall
    noise = np.random.default_rng(seed)
    factors = np.maximum.accumulate(factors).tolist()
    base = curve.table
    for _ in range(120):
        for band, factor in enumerate(factors):
            n = int(noise.integers(BANDS[band], (*BANDS[1:], 300)[band]))
            curve.observe(rows(n, n), 2 * factor * float(base[n]) * noise.lognormal(0, 0.05))
    for band, factor in enumerate(factors):
        assert curve.table[BANDS[band]] / base[BANDS[band]] == pytest.approx(factor, rel=0.1)


@given(
    st.dictionaries(st.integers(1, 2000), st.floats(1e-9, 1e3), min_size=1, max_size=8),
    st.lists(st.tuples(st.lists(st.integers(0, 5000), max_size=6), st.floats(0, 1e12, allow_nan=False)), max_size=30),
)
@settings(deadline=None, max_examples=100)
def test_tables_never_fall_whatever_is_observed(points: dict[int, float], jobs: list[tuple[list[int], float]]) -> None:
    curve = CostCurve(points, start=1e-6)
    for counts, seconds in jobs:
        curve.observe(rows(*counts), seconds)
    table = curve.table
    assert np.isfinite(table).all()
    assert table[0] == 0
    assert (table[1:] > 0).all()
    assert (np.diff(table) >= 0).all()


def test_a_band_below_its_neighbour_is_not_pushed_down_for_ever() -> None:
    curve = CostCurve({1: 1e-4, 2: 1e-4, 1024: 1e-3})
    for _ in range(200):
        curve.observe(rows(1), 3e-4)  # the truth falls from 1 row to 2: the table cannot
        curve.observe(rows(2), 1e-4)
    assert curve.correction.logs[1] == pytest.approx(0, abs=0.01)
    assert curve.table[2] == pytest.approx(3e-4, rel=0.02)


def test_jobs_beyond_the_table_count_in_proportion() -> None:
    curve = CostCurve(CPU)
    before = curve.table
    for _ in range(60):
        curve.observe(rows(3 * ROWS), 2 * 3 * float(before[ROWS]))
    assert curve.table[ROWS] / before[ROWS] == pytest.approx(2, rel=0.02)


def test_what_is_not_measured_any_more_goes_back_to_the_calibration() -> None:
    correction = Correction(3)
    for _ in range(50):
        correction.observe(0, 1.0)
        correction.observe(1, 1.0)
    assert correction.logs == pytest.approx([1.0] * 3, abs=0.01)
    for _ in range(20 * STALE):
        correction.observe(0, 1.0)
    assert correction.logs[0] == pytest.approx(1.0)
    assert abs(correction.logs[1]) < 0.05
    assert correction.logs[2] == correction.logs[1]  # never measured: as the nearest that was


def test_half_a_window_is_needed_to_move() -> None:
    correction = Correction(1)
    for _ in range(WINDOW // 2):
        correction.observe(0, 3.0)
    assert correction.logs == [0.0]
    correction.observe(0, 3.0)
    assert 0 < correction.logs[0] <= 0.1


def test_senseless_measurements_are_left_out() -> None:
    made = model()
    costs = made.layer_costs(KIND)
    for seconds in (0.0, 5e-324, -1.0, math.nan, math.inf):
        for _ in range(20):
            made.observe_cpu(KIND, rows(1), seconds)
            made.observe_gpu(KIND, rows(1), seconds)
            made.observe_copy(NBYTES, seconds)
            made.observe_copy(0, 1.0)
            made.observe_cpu(KIND, rows(), 1.0)
            made.observe_cpu(KIND, rows(0, 0), 1.0)
    assert made.layer_costs(KIND) is costs


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"'bf16 8x8'.*'int4 2048x768'"):
        model().layer_costs("bf16 8x8")
    with pytest.raises(ValueError, match="none"):
        CostModel(0, 1e9).crossover("bf16 8x8")


@pytest.mark.parametrize(
    ("points", "what"),
    [({}, "no measured point"), ({0: 1.0}, "at 0 rows"), ({1: 0.0}, "0.0 seconds"), ({1: math.nan}, "nan seconds")],
)
def test_senseless_points_are_refused(points: dict[int, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        CostModel(0, 1e9).add(KIND, NBYTES, points, GPU)


def learned() -> CostModel:
    made = model(cpu_start=5e-6, gpu_start=7e-6, join=1e-6)
    costs = made.layer_costs(KIND)
    for _ in range(40):
        made.observe_cpu(KIND, rows(1, 3), 1.7 * float(costs.cpu[[1, 3]].sum()))
        made.observe_gpu(KIND, rows(1, 30), 0.6 * float(costs.gpu[[1, 30]].sum()))
        made.observe_copy(NBYTES, 1.2 * costs.copy)
    return made


def test_round_trip_through_json() -> None:
    made = learned()
    text = json.dumps(made.to_dict())
    again = CostModel.from_dict(json.loads(text))
    before, after = made.layer_costs(KIND), again.layer_costs(KIND)
    np.testing.assert_allclose(after.cpu, before.cpu, rtol=0.011)  # tables lag by up to a percent
    np.testing.assert_allclose(after.gpu, before.gpu, rtol=0.011)
    assert after.copy == pytest.approx(before.copy, rel=0.011)
    assert json.dumps(again.to_dict()) == text


def mutate(draw: st.DrawFn, node: Any) -> Any:
    """The same with one leaf or branch replaced."""
    junk = st.one_of(
        st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(-(10**400), 10**400), st.just([]),
        st.just({}), st.just([[]]), st.lists(st.floats(), max_size=6),
    )  # fmt: skip
    if isinstance(node, dict) and node and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(node)))
        if draw(st.integers(0, 9)) == 0:
            return {k: v for k, v in node.items() if k != key}
        return {**node, key: mutate(draw, node[key])}
    if isinstance(node, list) and node and draw(st.integers(0, 2)):
        at = draw(st.integers(0, len(node) - 1))
        return [*node[:at], mutate(draw, node[at]), *node[at + 1 :]]
    return draw(junk)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    data = json.loads(json.dumps(learned().to_dict()))
    for _ in range(draw(st.integers(1, 3))):
        data = mutate(draw, data)
    return data


@given(damaged())
@settings(deadline=None, max_examples=150)
def test_damaged_data_is_a_value_error_or_a_usable_model(data: Any) -> None:
    try:
        made = CostModel.from_dict(data)
    except ValueError:
        return
    for kind in made.kinds:
        costs = made.layer_costs(kind)
        assert np.isfinite(costs.cpu).all()
        assert (np.diff(costs.cpu) >= 0).all()
        assert costs.copy >= 0
        made.observe_cpu(kind, rows(1, 2000), 1e-3)
    made.observe_copy(1 << 20, 1e-3)
    made.describe()
    json.dumps(made.to_dict(), allow_nan=False)
