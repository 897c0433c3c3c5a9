from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.predictor.baselines import Perfect
from moe_offload.predictor.hit_rates import ahead, belady, hit_rates, lru
from tests.predictor.small_traces import Says, small_trace

REQUESTS = st.lists(st.integers(0, 5), max_size=14)


@given(REQUESTS, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_lru_finds_what_is_among_the_last_different_ones(requests: list[int], capacity: int) -> None:
    for at, hit in enumerate(lru(requests, capacity)):
        recent = list(dict.fromkeys(reversed(requests[:at])))[:capacity]
        assert hit == (requests[at] in recent)


@given(REQUESTS, st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_belady_is_the_best_that_loads_on_demand(requests: list[int], capacity: int) -> None:
    @lru_cache(None)
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(requests):
            return 0
        now = requests[at]
        if now in held:
            return 1 + best(at + 1, held)
        if len(held) < capacity:
            return best(at + 1, held | {now})
        return max(best(at + 1, held - {victim} | {now}) for victim in held)

    assert sum(belady(requests, capacity)) == best(0, frozenset())
    assert sum(belady(requests, capacity)) >= sum(lru(requests, capacity))


def routed(seed: int = 0, layers: int = 3, experts: int = 6, tokens: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((layers, tokens, experts)), axis=2)[..., :2]


def test_a_perfect_predictor_misses_nothing_the_link_can_carry() -> None:
    trace = small_trace(routed(), 6, lengths=[20] * 3)
    found = hit_rates(Perfect(), trace, range(3), capacity=8, copies=2)
    assert found.predicted.value == 1 and found.used == 1
    assert found.lru.value < found.belady.value < 1
    assert hit_rates(Perfect(), trace, range(3), capacity=2, copies=2).predicted.value == 1


def test_who_says_nothing_and_a_link_without_room_leave_lru() -> None:
    trace = small_trace(routed(), 6, lengths=[20] * 3)
    silent = hit_rates(Says(np.full((3, 60, 6), 0.4)), trace, range(3), capacity=6, copies=2)
    full = hit_rates(Perfect(), trace, range(3), capacity=6, copies=0)
    for each in (silent, full):
        assert np.array_equal(each.predicted.part, each.lru.part)
        assert each.loaded == 0 and np.isnan(each.used)
        assert each.to_dict()["used"] is None


def test_a_wrong_predictor_costs_hits() -> None:
    experts = routed(1)
    trace = small_trace(experts, 6, lengths=[20] * 3)
    wrong = np.ones((3, 60, 6))
    np.put_along_axis(wrong, experts, 0.0, axis=2)
    found = hit_rates(Says(wrong), trace, range(3), capacity=6, copies=2)
    assert found.predicted.value < found.lru.value
    assert found.used < 0.5


def test_the_cost_decides() -> None:
    trace = small_trace(routed(), 6, lengths=[20] * 3)
    said = Says(np.full((3, 60, 6), 0.4))
    assert hit_rates(said, trace, range(3), capacity=6, copies=2, cost=0.39).loaded > 0
    assert hit_rates(said, trace, range(3), capacity=6, copies=2, saving=2, cost=0.81).loaded == 0


def test_the_nearest_and_the_most_probable_come_first() -> None:
    # One token, two layers; room for all but a link that carries one expert per layer.
    wanted = [[[[1, 0]]], [[[5]], [[4, 5]]]]  # layer 1: from itself, then from layer 0
    hits, loaded, used = ahead([[[0, 1], [4, 5]]], wanted, capacity=6, copies=1)
    assert hits == [False, True, False, True]
    assert (loaded, used) == (2, 2)


def test_what_is_expected_before_is_not_given_up() -> None:
    hits, loaded, _ = ahead([[[0, 1]]], [[[[0, 1, 2, 3]]]], capacity=2, copies=4)
    assert hits == [True, True] and loaded == 2


def test_what_is_expected_later_makes_room() -> None:
    # Layer 1's expert is held from the token before; layer 0 needs both places.
    wanted: list[list[list[list[int]]]] = [[[[], [0, 1]]], [[[], []], [[], [4]]]]
    hits, loaded, used = ahead([[[2, 3], [4, 5]], [[0, 1], [4, 5]]], wanted, capacity=2, copies=2)
    assert hits == [False] * 4 + [True, True, False, False]
    assert (loaded, used) == (2, 2)


def test_bad_settings_are_refused() -> None:
    trace = small_trace(routed(), 6)
    with pytest.raises(ValueError, match="at least the 2 of a token, at most 18"):
        hit_rates(Perfect(), trace, [0], capacity=1, copies=1)
    with pytest.raises(ValueError, match="at most 18"):
        hit_rates(Perfect(), trace, [0], capacity=19, copies=1)
    with pytest.raises(ValueError, match="none negative"):
        hit_rates(Perfect(), trace, [0], capacity=4, copies=-1)
