import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from moe_offload.predictor.presence import expected_rows, fit_overlap, hazards, presence, prompt_overlaps
from tests.predictor.small_traces import Says, small_trace


@st.composite
def groups(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    p = draw(hnp.arrays(np.float32, (sum(sizes), 3), elements=st.floats(0, 1, width=32)))
    return p, np.concatenate([[0], np.cumsum(sizes)])


@given(groups())
@settings(deadline=None, max_examples=60)
def test_groups_are_as_each_by_itself(case: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    p, starts = case
    found, rows = presence(p, starts), expected_rows(p, starts)
    for number, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        part = p[begin:end].astype(np.float64)
        assert np.allclose(found[number], 1 - np.prod(1 - part, axis=0), atol=2e-7)
        assert np.allclose(rows[number], part.sum(axis=0))
        assert np.allclose(found[number], presence(p[begin:end]))
        assert np.allclose(rows[number], expected_rows(p[begin:end]))
    assert (found >= 0).all() and (found <= 1).all()
    assert (presence(p, starts, overlap=0.3) <= found + 1e-12).all()


def test_of_one_token_presence_is_its_probability() -> None:
    p = np.array([[0.0, 0.25, 1.0]], np.float32)
    for overlap in (0.0, 0.5):
        assert presence(p, overlap=overlap) == pytest.approx([0, 0.25, 1], abs=1e-6)


def test_no_tokens() -> None:
    nothing = np.zeros((0, 3), np.float32)
    assert presence(nothing).tolist() == expected_rows(nothing).tolist() == [0, 0, 0]


def test_bad_groups_are_refused() -> None:
    p = np.full((4, 2), 0.5, np.float32)
    for starts in ([0], [0, 3], [1, 4], [0, 2, 2, 4], [0, 5]):
        with pytest.raises(ValueError, match="groups are to follow"):
            presence(p, np.array(starts))
    with pytest.raises(ValueError, match="overlap"):
        presence(p, overlap=1.0)
    with pytest.raises(ValueError, match="overlap"):
        presence(p, overlap=-0.1)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.3])
def test_a_known_overlap_is_found_again(overlap: float) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([1, 4, 16, 64], 4000)
    hazard = sizes[:, None] * rng.uniform(0.01, 0.3, (4000, 8))
    active = rng.random(hazard.shape) < -np.expm1(-hazard * sizes[:, None] ** -overlap)
    assert fit_overlap(hazard, sizes, active) == pytest.approx(overlap, abs=0.02)


def test_tokens_that_are_all_alike_overlap_and_independent_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    lengths = [64] * 60
    alike = np.repeat(rng.integers(0, 8, (1, 60, 1)), 64, axis=1)
    mixed = rng.integers(0, 8, (1, 60 * 64, 1))
    said = Says(np.full((1, 60 * 64, 8), 1 / 8))
    found = [prompt_overlaps(said, small_trace(each, 8, lengths=lengths), range(60))[1] for each in (alike, mixed)]
    assert found[0] > 0.4
    assert found[1] < 0.03


def test_prompts_alone_are_fitted_on() -> None:
    rng = np.random.default_rng(2)
    experts = rng.integers(0, 8, (1, 60, 128, 1))
    experts[:, :, 64:] = experts[:, :, 64:65]  # what was generated is all alike
    trace = small_trace(experts.reshape(1, -1, 1), 8, lengths=[128] * 60, prompts=[64] * 60)
    assert prompt_overlaps(Says(np.full((1, 60 * 128, 8), 1 / 8)), trace, range(60))[1] < 0.03
    with pytest.raises(ValueError, match="no prompts"):
        prompt_overlaps(Says(np.zeros((1, 1, 8))), trace, [])


def test_hazards_add_up() -> None:
    p = np.random.default_rng(3).random((6, 4)).astype(np.float32)
    apart = hazards(p, np.array([0, 2, 6]))
    assert np.allclose(apart.sum(axis=0), hazards(p, np.array([0, 6]))[0])
    with pytest.raises(ValueError, match="alike"):
        fit_overlap(apart, np.array([2]), apart > 1)
