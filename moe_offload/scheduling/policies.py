"""The policies that can be chosen: ours, and what others do, behind the same interface.

A policy is a planner (who computes which expert of this layer) and how the cache on the device is filled. Baselines are
given what a good implementation would have: the best order for what they chose, a link and a device that work at the
same time, and measured costs. They differ in what they choose. Where a planner wants to fetch more than there is room
for, the experts with the most rows are fetched and the CPU takes the rest.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.arrangement import arrange
from moe_offload.scheduling.layer_plan import HOST, SLOT, LayerCosts, LayerPlan, LayerState, Planner, curve
from moe_offload.scheduling.planner import plan_makespan

OFFLOAD_TOKENS = 32  # llama.cpp's GGML_OP_OFFLOAD_MIN_BATCH


def _misses(state: LayerState) -> NDArray[np.int64]:
    """Positions of the host's experts, most rows first."""
    positions = np.flatnonzero(state.where == HOST)
    return positions[np.argsort(-state.rows[positions], kind="stable")]


def _with_fetches(state: LayerState, costs: LayerCosts, fetched: NDArray[np.int64]) -> LayerPlan:
    """Everything that is on the device runs there, and of `fetched` the first that there is room for."""
    on_device = state.where != HOST
    on_device[fetched[: max(state.room, 0)]] = True
    return arrange(state, costs, on_device)


def plan_static(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """All misses on the CPU: llama.cpp's n-cpu-moe, expert by expert."""
    return _with_fetches(state, costs, np.empty(0, np.int64))


def plan_static_offload(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """As `plan_static`, but batches of 32 tokens or more fetch all misses: llama.cpp with op offload."""
    return plan_lru(state, costs) if state.tokens >= OFFLOAD_TOKENS else plan_static(state, costs)


def plan_fiddler(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """Each miss by its own: fetched where that takes less time than the CPU (Fiddler)."""
    sooner = [
        p for p in _misses(state) if costs.copy + curve(costs.gpu, state.rows[p]) < curve(costs.cpu, state.rows[p])
    ]
    return _with_fetches(state, costs, np.array(sooner, np.int64))


def plan_lru(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """All misses are fetched (mixtral-offloading)."""
    return _with_fetches(state, costs, _misses(state))


def plan_tokens(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """Most rows first: fetched while all copies and the run end before the CPU's rest (LayerScope's artifact)."""
    misses = _misses(state)
    cpu = [curve(costs.cpu, rows) for rows in state.rows[misses]]
    rest = sum(cpu)
    count = 0
    for position, seconds in zip(misses, cpu, strict=True):
        rest -= seconds
        if (count + 1) * costs.copy + curve(costs.gpu, state.rows[position]) >= rest:
            break
        count += 1
    return _with_fetches(state, costs, misses[:count])


def plan_qstar(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """A fixed share of the misses is fetched: the link's rate over host memory's, by one row (FreeToken's q*)."""
    misses = _misses(state)
    share = curve(costs.cpu, 1) / costs.copy if costs.copy > 0 else 1.0
    return _with_fetches(state, costs, misses[: round(len(misses) * min(share, 1.0))])


def plan_greedy(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """A simulation that gives each expert to where it ends first, one by one (HybriMoE, as far as it is described).

    The device is offered what it has, what is there first and has the most rows before others; the link the miss with
    the most rows, for the device to run then; the CPU the miss with the fewest, and when there is none left, of what
    the device has.
    """
    cpu, gpu = ([curve(table, rows) for rows in state.rows.tolist()] for table in (costs.cpu, costs.gpu))
    rows, ready = state.rows.tolist(), np.where(state.where == SLOT, 0.0, state.ready).tolist()
    misses = _misses(state).tolist()
    present = sorted(np.flatnonzero(state.where != HOST).tolist(), key=lambda p: (ready[p], -rows[p]))
    on_device = np.zeros(len(rows), np.bool_)
    device, processor, link = state.gpu_busy + costs.gpu_start, costs.cpu_start, state.link_busy
    room = state.room
    while misses or present:
        smallest = misses[-1] if misses else min(present, key=lambda p: rows[p])
        by_cpu = processor + cpu[smallest]
        by_device = max(device, ready[present[0]]) + gpu[present[0]] if present else np.inf
        by_link = max(device, link + costs.copy) + gpu[misses[0]] if misses and room > 0 else np.inf
        if by_device <= min(by_cpu, by_link):
            on_device[present.pop(0)] = True
            device = by_device
        elif by_cpu <= by_link:
            (misses or present).remove(smallest)
            processor = by_cpu
        else:
            on_device[misses.pop(0)] = True
            device, link, room = by_link, link + costs.copy, room - 1
    return arrange(state, costs, on_device)


@dataclass(frozen=True, slots=True)
class Policy:
    """A planner, and how the device's cache is filled.

    placement: which experts the cache holds. "static": the hot ones, for good; "hot": these at first; "empty": none at
    first. keeps_fetched: an expert fetched for a layer stays in the cache, where `eviction` makes room. prefetch:
    experts of later layers are copied ahead, by a forecast from experts' popularity and the router, or by perfect
    knowledge of the routing.
    """

    name: str
    planner: Planner
    placement: Literal["static", "hot", "empty"]
    keeps_fetched: bool
    eviction: Literal["lru", "lfu", "least-stale", "score"] = "lru"
    prefetch: bool = False
    forecast: Literal["popularity", "perfect"] = "popularity"


_ALL = (
    Policy("static", plan_static, "static", keeps_fetched=False),
    Policy("static-offload32", plan_static_offload, "static", keeps_fetched=False),
    Policy("fiddler", plan_fiddler, "static", keeps_fetched=False),
    Policy("lru", plan_lru, "empty", keeps_fetched=True),
    Policy("tokens", plan_tokens, "static", keeps_fetched=False),
    Policy("makespan-greedy", plan_greedy, "hot", keeps_fetched=True, eviction="score", prefetch=True),
    Policy("qstar", plan_qstar, "empty", keeps_fetched=True),
    Policy("ours", plan_makespan, "hot", keeps_fetched=True, eviction="score", prefetch=True),
    Policy("oracle", plan_makespan, "hot", keeps_fetched=True, eviction="score", prefetch=True, forecast="perfect"),
)
POLICIES = {policy.name: policy for policy in _ALL}


def find_policy(name: str) -> Policy:
    """The policy of that name."""
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]
