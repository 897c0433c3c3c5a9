import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from moe_offload.predictor.calibration import Calibration, fit_calibration, margins, reliability

SCORES = hnp.arrays(np.float32, (3, 6), elements=st.floats(-50, 50, width=16))


@given(SCORES, st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_margins_divide_the_chosen_from_the_others(scores: NDArray[np.float32], top_k: int) -> None:
    found = margins(scores, top_k)
    for row, margin in zip(scores, found, strict=True):
        ranked = np.sort(row)[::-1]
        line = (ranked[top_k - 1] + ranked[top_k]) / 2
        assert np.allclose(margin, row - line, atol=1e-4)


def test_margins_where_all_are_chosen() -> None:
    assert not margins(np.ones((2, 3)), 3).any()
    with pytest.raises(ValueError, match="4 experts per token of 3"):
        margins(np.ones((2, 3)), 4)


@pytest.mark.parametrize(("a", "b"), [(0.5, -2.0), (3.0, 0.5), (0.0, -1.0), (-1.0, 0.3)])
def test_a_known_sigmoid_is_found_again(a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000) * 2
    chosen = rng.random(x.size) < 1 / (1 + np.exp(-(a * x + b)))
    fitted = fit_calibration(x, chosen)
    assert fitted.a == pytest.approx(a, abs=0.1)
    assert fitted.b == pytest.approx(b, abs=0.1)
    assert reliability(fitted(x), chosen).error < 0.01


def test_the_scale_of_scores_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(5000)
    chosen = rng.random(x.size) < 1 / (1 + np.exp(-2 * x))
    small, large = fit_calibration(x, chosen), fit_calibration(1000 * x, chosen)
    assert np.allclose(small(x), large(1000 * x), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_margins_that_divide_perfectly_stay_finite(scale: float) -> None:
    x = np.linspace(-1, 1, 1000) * scale
    fitted = fit_calibration(x, x > 0)
    assert np.isfinite([fitted.a, fitted.b]).all()
    assert reliability(fitted(x), x > 0).error < 0.03
    assert (fitted(x[x > 0]) > 0.5).all()


@pytest.mark.parametrize("outcome", [False, True])
def test_one_outcome_only(outcome: bool) -> None:
    fitted = fit_calibration(np.linspace(-1, 1, 100), np.full(100, outcome))
    assert np.abs(fitted(np.linspace(-1, 1, 100)) - outcome).max() < 0.05


def test_margins_that_say_nothing_leave_the_frequency() -> None:
    chosen = np.arange(1000) % 8 == 0
    fitted = fit_calibration(np.zeros(1000), chosen)
    assert np.allclose(fitted(np.zeros(3)), 0.125, atol=1e-3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="as many"):
        fit_calibration(np.zeros(3), np.zeros(2, bool))
    with pytest.raises(ValueError, match="finite"):
        fit_calibration(np.array([0.0, np.nan]), np.zeros(2, bool))
    with pytest.raises(ValueError, match="from 0 to 1"):
        reliability(np.array([0.5, np.nan]), np.zeros(2, bool))
    with pytest.raises(ValueError, match="from 0 to 1"):
        reliability(np.array([1.5]), np.zeros(1, bool))


def test_probabilities_keep_the_order_and_never_reach_the_ends() -> None:
    found = Calibration(4.0, -1.0)(np.array([-1e6, -1.0, 0.0, 1.0, 1e6]))
    assert found.dtype == np.float32
    assert (np.diff(found) > 0).all()
    assert 0 < found[0] and found[-1] < 1


def test_a_curve_by_hand() -> None:
    curve = reliability(np.array([0.05, 0.15, 0.95, 1.0]), np.array([0, 1, 1, 0], bool), bins=2)
    assert curve.to_dict() == {
        "predicted": pytest.approx([0.1, 0.975]),
        "observed": [0.5, 0.5],
        "count": [2, 2],
        "error": pytest.approx((0.8 + 0.95) / 4),
    }
    both = curve + curve
    assert both.error == pytest.approx(curve.error)
    assert both.count.tolist() == [4, 4]
    assert reliability(np.zeros(0), np.zeros(0, bool)).error == 0
