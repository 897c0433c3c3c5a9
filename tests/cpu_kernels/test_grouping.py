import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.cpu_kernels.grouping import Groups, group_tokens


def reference(
    index: NDArray[np.int64], weight: NDArray[np.float32], num_experts: int
) -> list[tuple[int, list[tuple[int, float]]]]:
    """transformers' eager loop: per expert, first choices of all tokens, then second ones."""
    found = []
    for expert in range(num_experts):
        rows = [
            (t, float(weight[t, k]))
            for k in range(index.shape[1])
            for t in range(index.shape[0])
            if index[t, k] == expert and weight[t, k] != 0
        ]
        if rows:
            found.append((expert, rows))
    return found


def listed(groups: Groups) -> list[tuple[int, list[tuple[int, float]]]]:
    rows = list(zip(groups.tokens.tolist(), groups.weights.tolist(), strict=True))
    spans = zip(groups.offsets, groups.offsets[1:], strict=False)
    return [(e, rows[a:b]) for e, (a, b) in zip(groups.experts.tolist(), spans, strict=True)]


@st.composite
def routings(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    experts = draw(st.integers(1, 9))
    tokens, choices = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    size = tokens * choices
    # -1 and beyond the end: somebody else's; repeats within a row come by themselves
    index = draw(st.lists(st.integers(-1, experts + 1), min_size=size, max_size=size))
    weight = draw(st.lists(st.sampled_from([0.0, -0.0, 0.25, 1.5, -2.0]), min_size=size,
                           max_size=size))  # fmt: skip
    shape = (tokens, choices)
    return (
        np.array(index, np.int64).reshape(shape),
        np.array(weight, np.float32).reshape(shape),
        experts,
    )


@given(routings())
@settings(deadline=None)
def test_groups_are_those_of_the_eager_loop(
    routing: tuple[NDArray[np.int64], NDArray[np.float32], int],
) -> None:
    index, weight, experts = routing
    groups = group_tokens(index, weight, experts)
    assert listed(groups) == reference(index, weight, experts)
    assert groups.offsets[-1] == len(groups.tokens)
    assert groups.experts.dtype == groups.tokens.dtype == np.int32


@given(routings(), st.data())
@settings(deadline=None)
def test_select_keeps_the_chosen_groups(
    routing: tuple[NDArray[np.int64], NDArray[np.float32], int], data: st.DataObject
) -> None:
    groups = group_tokens(*routing)
    active = len(groups.experts)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=active, max_size=active)), bool)
    assert listed(groups.select(mask)) == [group for group, chosen in zip(listed(groups), mask, strict=True) if chosen]


def test_no_tokens_no_groups() -> None:
    groups = group_tokens(np.zeros((0, 4), np.int64), np.zeros((0, 4), np.float32), 8)
    assert len(groups.experts) == len(groups.tokens) == 0
    assert groups.offsets.tolist() == [0]


def test_nan_weight_is_kept() -> None:
    groups = group_tokens(np.array([[2]]), np.array([[np.nan]], np.float32), 4)
    assert groups.experts.tolist() == [2]
    assert np.isnan(groups.weights).all()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\[T, K\]"):
        group_tokens(np.zeros((2, 3), np.int64), np.zeros((2, 2), np.float32), 4)
