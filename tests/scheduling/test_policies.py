from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from moe_offload.scheduling.layer_plan import COMING, CPU, FETCH, GPU, HOST, SLOT, LayerCosts, LayerState
from moe_offload.scheduling.policies import POLICIES, find_policy
from moe_offload.scheduling.timing import objective
from tests.scheduling.exhaustive import REGIMES, random_layer
from tests.scheduling.test_planner import check, layer, layers

# 1 s a row on the CPU, 0.5 s an expert on the device, 3 s a copy.
COSTS = LayerCosts(np.arange(65.0), np.append(0.0, np.full(64, 0.5)), copy=3.0)
STATE = layer([1, 2, 4, 9, 2], [HOST, HOST, HOST, HOST, SLOT])


def actions(name: str, state: LayerState, costs: LayerCosts = COSTS) -> list[int]:
    found: list[int] = find_policy(name).planner(state, costs).action.tolist()
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("static", [CPU, CPU, CPU, CPU, GPU]),
        ("static-offload32", [CPU, CPU, CPU, CPU, GPU]),
        ("fiddler", [CPU, CPU, FETCH, FETCH, GPU]),  # 3.5 s is less than 4 rows take
        ("lru", [FETCH, FETCH, FETCH, FETCH, GPU]),
        ("tokens", [CPU, CPU, CPU, FETCH, GPU]),  # 3.5 s < 7 rows left; then 6.5 s > 3
        ("makespan-greedy", [CPU, CPU, FETCH, FETCH, GPU]),  # CPU until 1 and 3, then the link until 3.5 and 6.5
        ("qstar", [CPU, CPU, CPU, FETCH, GPU]),  # a third of 4 misses
        ("ours", [CPU, CPU, FETCH, FETCH, GPU]),  # 6.5 s; 7 s with one copy
    ],
)
def test_who_does_what(name: str, expected: list[int]) -> None:
    assert actions(name, STATE) == expected


def test_thirty_two_tokens_are_offloaded() -> None:
    assert actions("static-offload32", replace(STATE, tokens=31)) == actions("static", STATE)
    assert actions("static-offload32", replace(STATE, tokens=32)) == actions("lru", STATE)


def test_qstar_fetches_everything_over_a_link_as_fast_as_memory() -> None:
    assert actions("qstar", STATE, replace(COSTS, copy=1.0)) == actions("lru", STATE)
    assert actions("qstar", STATE, replace(COSTS, copy=0.0)) == actions("lru", STATE)
    assert actions("qstar", STATE, replace(COSTS, copy=9.0)) == actions("static", STATE)


def test_greedy_gives_the_cpu_what_the_device_would_end_later() -> None:
    slow = replace(COSTS, gpu=np.append(0.0, np.full(64, 4.0)))
    state = layer([1, 2, 3], [SLOT, SLOT, COMING], [0.0, 0.0, 1.0])
    assert actions("makespan-greedy", state, slow) == [CPU, CPU, GPU]  # at 1, at 3, and at 5 sooner than 6
    assert actions("makespan-greedy", state) == [GPU, GPU, GPU]


@pytest.mark.parametrize("name", POLICIES)
def test_those_with_most_rows_get_what_room_there_is(name: str) -> None:
    prefill = replace(STATE, tokens=4096, rows=STATE.rows * 1000)
    for room in (0, 1, 2):
        planned = find_policy(name).planner(replace(prefill, room=room), COSTS)
        fetched = np.flatnonzero(planned.action == FETCH).tolist()
        assert fetched == (
            [] if name == "static" else [[], [3], [2, 3]][room] if name != "qstar" else [[], [3], [3]][room]
        )


@pytest.mark.parametrize("name", POLICIES)
@given(case=layers(most=12))
@settings(deadline=None, max_examples=15)
def test_every_policy_makes_plans(name: str, case: tuple[LayerState, LayerCosts]) -> None:
    check(*case, find_policy(name).planner(*case))


@pytest.mark.parametrize("regime", REGIMES)
def test_no_policy_plans_a_layer_better_than_ours(regime: str) -> None:
    rng = np.random.default_rng(5)
    for number in range(30):
        state, costs = random_layer(rng, REGIMES[regime], 1 + number, values=number % 2 == 0)
        ours = objective(state, costs, find_policy("ours").planner(state, costs))
        for policy in POLICIES.values():
            theirs = objective(state, costs, policy.planner(state, costs))
            assert ours <= theirs + 1e-12, policy.name


def test_an_unknown_policy_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="no policy 'best': choose one of static, .*ours"):
        find_policy("best")


def test_policies_are_told_apart() -> None:
    assert all(name == policy.name for name, policy in POLICIES.items())
    kinds = [replace(policy, name="") for policy in POLICIES.values()]
    assert all(kind not in kinds[:place] for place, kind in enumerate(kinds))
    assert [name for name, policy in POLICIES.items() if policy.forecast == "perfect"] == ["oracle"]
    assert not any(policy.keeps_fetched or policy.prefetch for policy in kinds if policy.placement == "static")
