import numpy as np
import pytest

from moe_offload.predictor.resampling import LEAST_UNITS, Interval, Ratio, ratio


def drawn(rng: np.random.Generator, units: int, mean: float) -> Ratio:
    """Units of many tokens that agree within each: what they have in common is what counts."""
    own = np.clip(rng.normal(mean, 0.1, units), 0, 1)
    return Ratio(rng.binomial(200, own).astype(float), np.full(units, 200.0))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = drawn(rng, 40, 0.6).interval()
        held += found.low <= 0.6 <= found.high
    assert 178 <= held <= 199  # bootstrap intervals of 40 units are a little short


def test_tokens_of_one_unit_do_not_make_it_surer() -> None:
    part = np.random.default_rng(1).binomial(1, 0.5, 30).astype(float)
    few, many = Ratio(part, np.ones(30)).interval(), Ratio(part * 1000, np.full(30, 1000.0)).interval()
    assert few == many


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(2)
    a = drawn(rng, 50, 0.6)
    b = Ratio(a.part + 2, a.whole)  # 1 point better on every sequence
    assert b.above(a).to_list() == pytest.approx([0.01, 0.01, 0.01], abs=1e-6)
    assert b.interval().high - b.interval().low > 0.02
    assert a.above(a) == Interval(0.0, 0.0, 0.0)


def test_gap_closed() -> None:
    whole = np.full(10, 100.0)
    base, better = Ratio(np.full(10, 80.0), whole), Ratio(np.full(10, 92.0), whole)
    assert better.gap_closed(base).to_list() == pytest.approx([0.6, 0.6, 0.6])
    assert np.isnan(base.gap_closed(Ratio(whole, whole)).value)


def test_few_units_have_no_interval() -> None:
    for units in range(LEAST_UNITS):
        found = Ratio(np.ones(units), np.full(units, 2.0)).interval()
        assert found.to_list() == ([0.5, None, None] if units else [None, None, None])
    assert Ratio(np.ones(LEAST_UNITS), np.full(LEAST_UNITS, 2.0)).interval().to_list() == [0.5, 0.5, 0.5]


def test_sums_by_unit() -> None:
    found = ratio(np.array([True, False, True]), 2.0, np.array([0, 0, 2]), 3)
    assert found.part.tolist() == [1, 0, 1]
    assert found.whole.tolist() == [4, 0, 2]
    assert (found + found).value == found.value == pytest.approx(1 / 3)
