"""The best that any plan can do, by trying all of them, and random layers to try it on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

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
    curve,
)
from moe_offload.scheduling.timing import objective


def least_objective(state: LayerState, costs: LayerCosts) -> float:
    """Over all choices, each in its best order; another way to count than the planner's.

    A device that takes what arrives first ends at the latest of: an arrival, and all runs from it on.
    """
    active = len(state.rows)
    order = np.argsort([-curve(costs.gpu, rows) for rows in state.rows.tolist()], kind="stable")
    rows, where = state.rows[order].tolist(), state.where[order]
    cpu, gpu = (np.array([curve(table, count) for count in rows]) for table in (costs.cpu, costs.gpu))
    host = where == HOST
    chosen: NDArray[np.bool_] = (np.arange(1 << active)[:, None] >> np.arange(active)) % 2 == 1
    fetched = chosen & host
    chosen, fetched = (mask[fetched.sum(axis=1) <= state.room] for mask in (chosen, fetched))
    arrival = np.where(
        host, state.link_busy + costs.copy * fetched.cumsum(axis=1), state.ready[order] * (where == COMING)
    )
    start = state.gpu_busy + costs.gpu_start
    device = start + np.where(chosen, gpu, 0.0).sum(axis=1)
    for expert in range(active):
        behind = chosen & (arrival >= arrival[:, [expert]])
        device = np.maximum(device, np.where(chosen[:, expert], arrival[:, expert] + (behind * gpu).sum(axis=1), 0.0))
    device = np.where(chosen.any(axis=1), device, state.gpu_busy)
    alone = chosen.all(axis=1)
    both = np.maximum(device, costs.cpu_start + np.where(chosen, 0.0, cpu).sum(axis=1)) + costs.join
    return float((np.where(alone, device, both) - (fetched * state.value[order]).sum(axis=1)).min())


def least_over_orders(state: LayerState, costs: LayerCosts) -> float:
    """Over all choices and all orders of copies and runs: for four experts at most."""
    best = np.inf
    options: Sequence[tuple[int, ...]] = [(CPU, FETCH) if where == HOST else (CPU, GPU) for where in state.where]
    for choice in product(*options):
        action = np.array(choice, np.int8)
        if (action == FETCH).sum() > state.room:
            continue
        for runs in permutations(np.flatnonzero(action != CPU)):
            for copies in permutations(np.flatnonzero(action == FETCH)):
                plan = LayerPlan(action, np.array(runs, np.int64), np.array(copies, np.int64), 0.0)
                best = min(best, objective(state, costs, plan))
    return best


@dataclass(frozen=True, slots=True)
class Regime:
    """One kind of server and batch: milliseconds a + b * rows of an expert, and the rows that experts have."""

    cpu: tuple[float, float]
    gpu: tuple[float, float]
    copy: float
    rows: tuple[int, int]


# What decides differs: the CPU is faster than the link, about as fast, or slower; the device's arithmetic is slow.
REGIMES = {
    "batch 1, PCIe 3": Regime((0.16, 0.05), (0.03, 0.001), 0.8, (1, 1)),
    "batch 16, PCIe 3": Regime((0.16, 0.05), (0.03, 0.001), 0.8, (1, 16)),
    "batch 64, PCIe 4": Regime((0.3, 0.06), (0.04, 0.002), 0.4, (1, 64)),
    "prefill": Regime((0.3, 0.06), (0.04, 0.002), 0.4, (16, 2048)),
    "slow device (P40)": Regime((0.16, 0.03), (0.1, 0.03), 0.3, (1, 64)),
    "tiny experts": Regime((0.02, 0.004), (0.015, 0.0005), 0.02, (1, 64)),
}


def random_layer(
    rng: np.random.Generator,
    regime: Regime,
    active: int,
    *,
    values: bool = False,
    coming: float = 0.3,
    noise: float = 0.1,
) -> tuple[LayerState, LayerCosts]:
    """A layer with times of a regime, give or take `noise`, in seconds; some of it resident, some of it coming."""
    counts = np.arange(257.0)
    tables = []
    for first, more in (regime.cpu, regime.gpu):
        table = 1e-3 * (first + more * counts) * rng.uniform(1 - noise, 1 + noise, len(counts))
        table[0] = 0.0
        tables.append(table)
    copy = 1e-3 * regime.copy * rng.uniform(0.7, 1.4)
    starts = rng.choice([0.0, 2e-5], 3)
    costs = LayerCosts(tables[0], tables[1], copy, *starts.tolist())
    low, high = np.log(regime.rows[0]), np.log(regime.rows[1] + 0.99)
    rows = np.exp(rng.uniform(low, high, active)).astype(np.int64)
    shares = np.array([1.0, rng.uniform(0, coming), rng.uniform(0, 0.8)])
    where = rng.choice(np.array([HOST, COMING, SLOT]), active, p=shares / shares.sum())
    ready = np.where(where == COMING, rng.uniform(0, 3 * copy, active), 0.0)
    value = rng.uniform(-0.2, 0.6, active) * copy * rng.choice([0.5, 1.0, 4.0]) * (where == HOST) * values
    state = LayerState(
        layer=0,
        tokens=int(rows.max(initial=1)),
        experts=np.arange(active, dtype=np.int32),
        rows=rows,
        where=where.astype(np.int8),
        ready=ready,
        value=value,
        link_busy=float(rng.choice([0.0, rng.uniform(0, copy)])),
        gpu_busy=float(rng.choice([0.0, rng.uniform(0, copy)])),
        room=int(rng.choice(np.array([1 << 30, rng.integers(0, active + 1)]))),
    )
    return state, costs
