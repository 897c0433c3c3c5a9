import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.projection import fit, quantise


@pytest.mark.parametrize("rows", [11, 400])  # fewer than dimensions, and more
def test_directions_are_those_of_the_data(rows: int) -> None:
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.normal(size=(40, 3)))[0].T
    data = random.normal(size=(rows, 3)) * [9, 5, 2] @ axes + 3
    found = fit(data, 3)
    assert np.allclose(found.directions @ found.directions.T, np.eye(3), atol=1e-5)
    # what they span holds all of the data
    states = found(data.astype(np.float32))
    assert np.allclose(states @ found.directions + data.mean(axis=0), data, atol=1e-3)
    assert np.allclose(states.mean(axis=0), 0, atol=1e-3)
    assert np.allclose(states.var(axis=0, ddof=1), found.variance, rtol=1e-3)
    assert (np.diff(found.variance) <= 0).all()


def test_both_ways_agree() -> None:
    data = np.random.default_rng(1).normal(size=(30, 30)) * np.arange(1, 31)
    wide = np.concatenate([data, np.zeros((30, 1))], axis=1)  # one dimension more than rows
    one, other = fit(data, 5), fit(wide, 5)
    assert np.allclose(one.directions, other.directions[:, :30], atol=1e-4)
    assert np.allclose(one.variance, other.variance, rtol=1e-4)


@pytest.mark.parametrize(("rows", "projected", "said"), [(4, 4, "more text"), (9, 6, "at most all"), (9, 0, "least 1")])
def test_what_cannot_be_fitted(rows: int, projected: int, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        fit(np.ones((rows, 5)), projected)


def test_rows_without_variance() -> None:
    found = fit(np.ones((9, 5)), 2)
    assert np.isfinite(found.directions).all() and np.allclose(found.variance, 0)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)))
@settings(deadline=None, max_examples=150)
def test_quantised_rows_are_near(rows: NDArray[np.float32]) -> None:
    integers, scale = quantise(rows)
    assert integers.dtype == np.int8 and scale.dtype == np.float16 and np.abs(integers.astype(int)).max() <= 127
    error = np.abs(integers * scale.astype(np.float64)[:, None] - rows)
    assert (error <= 0.501 * scale.astype(np.float64)[:, None] + 1e-12).all()
    # the scale is as small as it can be, to the precision of f16
    assert (scale.astype(np.float64) <= np.abs(rows).max(axis=1) / 127 * 1.001 + 6e-8).all()


def test_huge_rows_are_cut() -> None:
    integers, scale = quantise(np.array([[1e9, -2e9]], np.float32))
    assert integers.tolist() == [[127, -127]] and np.isfinite(scale).all()
