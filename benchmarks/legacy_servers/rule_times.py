"""A scheduler's rule on the artifact's own constants: what a decode step should take if nothing else cost anything.

The CPU's times are the measured table, a copy and a computation on the card the artifact's constants. The rule is the
product's planner of that name, on synthetic routing, with the hottest experts on the card. Two sums, between which a
real engine of that kind should lie: link, card and CPU all at once within a layer, or one after the other. Around the
experts stand dense weights and keys, read at the card's rate.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.legacy_servers.published import Constants
from benchmarks.servers.routing import Choices
from benchmarks.servers.shapes import Shape
from benchmarks.servers.simulation import CONTEXT
from moe_offload.scheduling.layer_plan import CPU, FETCH, HOST, SLOT, LayerCosts, LayerState, Planner, curve
from moe_offload.transfer.measured_experts import XEON_6230R
from moe_offload.transfer.server_profile import ServerProfile

_ROWS = 512


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: everything at once, and one after the other. hits: share of active experts on the card."""

    at_once: float
    in_turn: float
    hits: float


def costs_of(shape: Shape, constants: Constants) -> LayerCosts:
    """The artifact's tables of an expert of this model."""
    tables = [t for t in XEON_6230R if t.describes(shape.expert_bytes, shape.flops_per_row)]
    if not tables:
        raise ValueError(f"no measured times of {shape.name}'s {shape.record.dtype} experts: only of bf16 ones")
    device = np.full(_ROWS + 1, constants.device)
    device[0] = 0.0
    return LayerCosts(np.ascontiguousarray(tables[0].seconds[: _ROWS + 1]), device, constants.copy)


def hottest(choices: Choices, experts: int, slots: int) -> NDArray[np.bool_]:
    """[L, E] those used most in what was seen [steps, L, T, K]."""
    layers = choices.shape[1]
    uses = np.stack([np.bincount(choices[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    held = np.zeros(layers * experts, np.bool_)
    held[np.argsort(-uses, axis=None, kind="stable")[:slots]] = True
    return held.reshape(layers, experts)


def layer_time(
    planner: Planner,
    costs: LayerCosts,
    experts: NDArray[np.int32],
    rows: NDArray[np.int64],
    held: NDArray[np.bool_],
    tokens: int,
) -> tuple[float, float]:
    """Seconds of one layer at once and in turn; held [A]: active experts on the card."""
    where = np.where(held, np.int8(SLOT), np.int8(HOST))
    nothing = np.zeros(len(rows))
    plan = planner(LayerState(0, tokens, experts, rows, where, nothing, nothing), costs)
    on_card = int(np.count_nonzero(plan.action != CPU))
    fetched = int(np.count_nonzero(plan.action == FETCH))
    cpu = sum(curve(costs.cpu, int(n)) for n in rows[plan.action == CPU])
    return plan.seconds, on_card * float(costs.gpu[1]) + fetched * costs.copy + cpu


def step_time(
    server: ServerProfile, shape: Shape, constants: Constants, planner: Planner, choices: Choices, seen: int, slots: int
) -> StepTime:
    """The mean of the steps after the first `seen`, by which experts are placed."""
    held, costs = hottest(choices[:seen], shape.experts, slots), costs_of(shape, constants)
    batch, steps = choices.shape[2], len(choices) - seen
    dense = 2 * (shape.dense_params + shape.head_params) + batch * CONTEXT * shape.kv_bytes
    around = dense / (server.memory_gbs * 1e9)
    at_once, in_turn, hits = 0.0, 0.0, []
    for step in choices[seen:]:
        for layer, chosen in enumerate(step):
            experts, rows = np.unique(chosen, return_counts=True)
            there = held[layer, experts]
            one, other = layer_time(planner, costs, experts.astype(np.int32), rows.astype(np.int64), there, batch)
            at_once, in_turn = at_once + one, in_turn + other
            hits.append(float(there.mean()))
    return StepTime(around + at_once / steps, around + in_turn / steps, float(np.mean(hits)))
