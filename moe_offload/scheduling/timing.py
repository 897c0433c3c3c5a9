"""How long a plan takes: three resources, each of which does one thing at a time.

The link copies the fetched experts in their order. The device runs its experts in their order, each no sooner than its
weights are there. The CPU runs its share in one job. The layer is done when both shares are, and the CPU's has come to
the device.

This is the definition, in plain Python and for any order; `arrangement.finish` is the same for the best order,
compiled.
"""

import numpy as np

from moe_offload.scheduling.layer_plan import CPU, FETCH, SLOT, LayerCosts, LayerPlan, LayerState, curve


def makespan(state: LayerState, costs: LayerCosts, plan: LayerPlan) -> float:
    """Seconds from now until the layer's output is on the device; nothing to run: until the device is free."""
    arrival = np.where(state.where == SLOT, 0.0, state.ready)
    link = state.link_busy
    for position in plan.fetch_order.tolist():
        link += costs.copy
        arrival[position] = link
    device = state.gpu_busy + (costs.gpu_start if len(plan.gpu_order) else 0.0)
    for position in plan.gpu_order.tolist():
        device = max(device, float(arrival[position])) + curve(costs.gpu, int(state.rows[position]))
    on_cpu = state.rows[plan.action == CPU].tolist()
    if not on_cpu:
        return device
    return max(device, costs.cpu_start + sum(curve(costs.cpu, rows) for rows in on_cpu)) + costs.join


def objective(state: LayerState, costs: LayerCosts, plan: LayerPlan) -> float:
    """What a planner minimises: the makespan less what the fetched experts save later."""
    return makespan(state, costs, plan) - float(state.value[plan.action == FETCH].sum())
