"""The planner: which experts of a layer run on the device, which are fetched for it, and which the CPU takes.

A first choice comes from a ranking: an expert's place says at what price of CPU time the device is the better place for
it. The ranking is cut where both sides end together. What an expert costs the device depends on what is scarce, the
link or its arithmetic, so there are three rankings, and one for little room. Then experts near the cut change sides
while that helps, and branch and bound looks for something better: for few experts until there is none.
"""

import numpy as np

from moe_offload.cpu_kernels.jit import native
from moe_offload.scheduling.arrangement import (
    ARGUMENTS,
    Choice,
    Counts,
    Layer,
    Places,
    Times,
    arguments,
    finish,
    read_layer,
    sort_by,
    write_plan,
)
from moe_offload.scheduling.compiling import planning
from moe_offload.scheduling.exact import branch_and_bound
from moe_offload.scheduling.layer_plan import LayerCosts, LayerPlan, LayerState

LINK, ARITHMETIC, EITHER, ROOM, STATIC = range(5)  # what is scarce; the last is no ranking: nothing is fetched
_PRICE = 0.75  # of CPU time where room is scarce; the device's is the rest to 1
# Bounds on the search, in experts gone through: what it costs does not grow with a layer's experts.
_BRANCHED = 21_000  # by branch and bound: with up to 10 experts that is enough for all choices there are
_TRIED = 4096  # near the cut
_FEW = 16  # up to so many branch and bound alone finds more
_WINDOW = 6  # experts on either side of the cut that may change sides


@native
def _rank(layer: Layer, kind: int, keys: Times, ranking: Counts) -> None:
    """Rank the experts by the price of CPU time at which the device is the better place."""
    for i in range(len(keys)):
        device = layer.copy if i >= layer.coming else 0.0
        if kind == ARITHMETIC or (kind == ROOM and i < layer.coming):
            device = layer.gpu[i]
        elif kind == EITHER:
            device = max(device, layer.gpu[i])
        total = device + layer.cpu[i]
        keys[i] = (device - layer.value[i]) / total if total > 0.0 else -layer.value[i]
        if kind == ROOM and i >= layer.coming:  # what it gains at one price; a high one, as the CPU has to do the rest
            keys[i] = (1.0 - _PRICE) * layer.gpu[i] - _PRICE * layer.cpu[i] - layer.value[i]
        ranking[i] = i
    sort_by(keys, layer.cpu, ranking)


@native
def _balance(layer: Layer, keys: Times, ranking: Counts) -> int:
    """Where to cut a ranking: where the device ends no sooner than the CPU, behind all that later layers pay for."""
    device, link, room = layer.gpu_busy + layer.gpu_start, layer.link_busy, layer.room
    cpu = layer.cpu_start
    for i in range(len(ranking)):
        cpu += layer.cpu[i]
    for rank in range(len(ranking)):
        i = ranking[rank]
        if max(device, link) >= cpu and keys[i] >= 0.0:
            return rank
        if i < layer.coming or room > 0:
            cpu -= layer.cpu[i]
            device += layer.gpu[i]
            if i >= layer.coming:
                link += layer.copy
                room -= 1
    return len(ranking)


@native
def _cut(layer: Layer, ranking: Counts, count: int, chosen: Choice) -> None:
    """The first `count` of a ranking on the device, save those beyond the room and those that come too late."""
    room = layer.room
    device, cpu, link = layer.gpu_busy + layer.gpu_start, layer.cpu_start, layer.link_busy
    for rank in range(len(ranking)):
        i = ranking[rank]
        chosen[i] = rank < count and (i < layer.coming or room > 0)
        if not chosen[i]:
            cpu += layer.cpu[i]
        elif i >= layer.coming:
            device += layer.gpu[i]
            link += layer.copy
            room -= 1
        elif i < layer.slots:
            device += layer.gpu[i]
    for i in range(layer.coming - 1, layer.slots - 1, -1):
        if chosen[i]:
            cpu += layer.cpu[i]
            if layer.ready[i] + layer.gpu[i] <= max(device, link, cpu):
                break
            chosen[i] = False


@native
def first_choice(
    layer: Layer, best: Choice, chosen: Choice, keys: Times,
    ranking: Counts, kept: Counts,
) -> tuple[float, int]:  # fmt: skip
    """The best cut of the rankings, or static placement if that is better: its objective, and where `kept` is cut."""
    active = len(best)
    least = np.inf
    cut = middle = 0
    for kind in range(5):
        if kind == ROOM and active - layer.coming <= layer.room:
            continue
        if kind < STATIC:
            _rank(layer, kind, keys, ranking)
            middle = _balance(layer, keys, ranking)
        for trial in range(4 if kind < STATIC else 1):
            count = active if trial == 3 else min(max(middle + trial - 1, 0), active)
            if kind < STATIC:
                _cut(layer, ranking, count, chosen)
            else:
                for i in range(active):
                    chosen[i] = i < layer.coming
            seconds, saved, _, _ = finish(layer, chosen)
            if kind + trial == 0 or seconds - saved < least:
                least = seconds - saved
                for i in range(active):
                    best[i] = chosen[i]
                if kind < STATIC:
                    cut = count
                    for i in range(active):
                        kept[i] = ranking[i]
    return least, cut


@native
def change_sides(layer: Layer, ranking: Counts, cut: int, least: float, best: Choice, left: int) -> float:
    """Let experts near the cut change sides, one or two at a time, while that helps; `left` trials at most."""
    fetched = 0
    for i in range(layer.coming, len(best)):
        fetched += best[i]
    first, last = max(0, cut - _WINDOW), min(len(best), cut + _WINDOW)
    helped = True
    while helped and left > 0:
        helped = False
        for one in range(first, last):
            for two in range(one, last):
                i, j = ranking[one], ranking[two]
                if left == 0 or (i != j and best[i] == best[j]):
                    continue
                was = (best[i] and i >= layer.coming) + (i != j and best[j] and j >= layer.coming)
                best[i] = not best[i]
                best[j] = not best[j] if i != j else best[j]
                now = (best[i] and i >= layer.coming) + (i != j and best[j] and j >= layer.coming)
                objective = np.inf
                if fetched + now - was <= layer.room:
                    seconds, saved, _, _ = finish(layer, best)
                    objective = seconds - saved
                    left -= 1
                if objective < least:
                    least = objective
                    fetched += now - was
                    helped = True
                else:
                    best[i] = not best[i]
                    best[j] = not best[j] if i != j else best[j]
    return least


@planning(f"Tuple((float64, int64, int64))({ARGUMENTS}, int8[::1], int64[::1], int64[::1])")
def _plan(
    rows: Counts, where: Places, ready: Times, value: Times, cpu: Times, gpu: Times, copy: float, cpu_start: float,
    gpu_start: float, join: float, link_busy: float, gpu_busy: float, room: int,
    action: Places, gpu_order: Counts, fetch_order: Counts,
) -> tuple[float, int, int]:  # fmt: skip
    layer = read_layer(rows, where, ready, value, cpu, gpu, copy, cpu_start, gpu_start, join, link_busy, gpu_busy, room)
    active = len(rows)
    best, chosen = np.empty(active, np.bool_), np.empty(active, np.bool_)
    least, cut = first_choice(layer, best, chosen, np.empty(active), gpu_order, fetch_order)
    if active > _FEW:
        least = change_sides(layer, fetch_order, cut, least, best, _TRIED // active)
    branch_and_bound(layer, best, chosen, least, _BRANCHED // max(active, 1))
    seconds, _, _, _ = finish(layer, best)
    ran, fetched = write_plan(layer, best, action, gpu_order, fetch_order)
    return seconds, ran, fetched


COMPILED = (_plan,)


def plan_makespan(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """The plan with the least makespan, less what fetched experts save later, that was found."""
    active = len(state.rows)
    action, orders = np.empty(active, np.int8), np.empty((2, active), np.int64)
    seconds, ran, fetched = _plan(*arguments(state, costs), action, orders[0], orders[1])
    return LayerPlan(action, orders[0, :ran], orders[1, :fetched], seconds)
