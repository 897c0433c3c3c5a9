"""The planner: which experts of a layer run on the device, which are fetched for it, and which the CPU takes.

Up to EXACT experts every choice is tried. With more, an expert's place in a ranking says how much sooner both sides
would end with it on the device; the ranking is cut where both end together, and experts near the cut change sides while
that helps. What an expert costs the device depends on what is scarce: the link, or its arithmetic. So there are three
rankings.
"""

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.jit import native
from moe_offload.scheduling.arrangement import ARGUMENTS, Layer, arguments, finish, read_layer, sort_by, write_plan
from moe_offload.scheduling.compiling import planning
from moe_offload.scheduling.layer_plan import LayerCosts, LayerPlan, LayerState

EXACT = 10
_WINDOW = 6  # experts on either side of the cut that may change sides
_EVALUATED = 4096  # experts that the search near the cut may go through, in all its trials


@native
def _try_all(layer: Layer, best: NDArray[np.bool_]) -> None:
    active = len(best)
    chosen = np.zeros(active, np.bool_)
    least = np.inf
    for mask in range(1 << active):
        fetched = 0
        for i in range(active):
            chosen[i] = mask >> i & 1
            fetched += i >= layer.coming and chosen[i]
        if fetched > layer.room:
            continue
        seconds, saved, _, _ = finish(layer, chosen)
        if seconds - saved < least:
            least = seconds - saved
            best[:] = chosen


@native
def _cut(layer: Layer, ranking: NDArray[np.int64], count: int, chosen: NDArray[np.bool_]) -> None:
    """The first `count` of a ranking on the device; of the host's experts among them as many as there is room for."""
    chosen[:] = False
    room = layer.room
    for rank in range(count):
        i = ranking[rank]
        if i < layer.coming:
            chosen[i] = True
        elif room > 0:
            chosen[i] = True
            room -= 1


@native
def _rank(layer: Layer, kind: int, keys: NDArray[np.float64], ranking: NDArray[np.int64]) -> int:
    """Rank the experts by the price of CPU time at which the device is the better place; how many need no price."""
    free = 0
    for i in range(len(keys)):
        on_link = 0.0 if i < layer.coming else layer.copy
        if kind == 0:
            device = on_link  # the link decides
        elif kind == 1:
            device = layer.gpu[i]  # the device's arithmetic decides
        else:
            device = max(on_link, layer.gpu[i])
        total = device + layer.cpu[i]
        keys[i] = (device - layer.value[i]) / total if total > 0.0 else -layer.value[i]
        free += keys[i] < 0.0
        ranking[i] = i
    sort_by(keys, ranking)
    return free


@native
def _search(layer: Layer, best: NDArray[np.bool_]) -> None:
    active = len(best)
    chosen = np.zeros(active, np.bool_)
    keys = np.empty(active)
    ranking = np.empty(active, np.int64)
    kept = np.empty(active, np.int64)
    least = np.inf
    middle = 0
    for kind in range(3):
        low = _rank(layer, kind, keys, ranking)
        high = active
        while low < high:  # the first cut with which the device ends no sooner than the CPU
            count = (low + high) // 2
            _cut(layer, ranking, count, chosen)
            _, _, cpu, device = finish(layer, chosen)
            if device >= cpu:
                high = count
            else:
                low = count + 1
        for count in (low - 1, low, low + 1, active):
            if 0 <= count <= active:
                _cut(layer, ranking, count, chosen)
                seconds, saved, _, _ = finish(layer, chosen)
                if seconds - saved < least:
                    least = seconds - saved
                    best[:] = chosen
                    kept[:] = ranking
                    middle = count
    chosen[: layer.coming] = True  # as static placement has it: never worse than that
    chosen[layer.coming :] = False
    seconds, saved, _, _ = finish(layer, chosen)
    if seconds - saved < least:
        least = seconds - saved
        best[:] = chosen
    _improve(layer, kept, middle, least, best)


@native
def _improve(layer: Layer, ranking: NDArray[np.int64], cut: int, least: float, best: NDArray[np.bool_]) -> None:
    """Let experts near the cut change sides, one or two at a time, while that helps."""
    active = len(best)
    fetched = 0
    for i in range(layer.coming, active):
        fetched += best[i]
    first, last = max(0, cut - _WINDOW), min(active, cut + _WINDOW)
    left = _EVALUATED // active
    helped = True
    while helped and left > 0:
        helped = False
        for one in range(first, last):
            for two in range(one, last):
                i, j = ranking[one], ranking[two]
                if i != j and best[i] == best[j]:
                    continue
                more = 0
                if i >= layer.coming:
                    more += -1 if best[i] else 1
                if j >= layer.coming and j != i:
                    more += -1 if best[j] else 1
                if left == 0 or fetched + more > layer.room:
                    continue
                best[i] = not best[i]
                if j != i:
                    best[j] = not best[j]
                seconds, saved, _, _ = finish(layer, best)
                left -= 1
                if seconds - saved < least:
                    least = seconds - saved
                    fetched += more
                    helped = True
                else:
                    best[i] = not best[i]
                    if j != i:
                        best[j] = not best[j]


@planning(f"Tuple((float64, int64, int64))({ARGUMENTS}, int8[::1], int64[::1], int64[::1])")
def _plan(  # type: ignore[no-untyped-def]
    rows, where, ready, value, cpu, gpu, copy, cpu_start, gpu_start, join, link_busy, gpu_busy, room,
    action, gpu_order, fetch_order,
):  # fmt: skip
    layer = read_layer(rows, where, ready, value, cpu, gpu, copy, cpu_start, gpu_start, join, link_busy, gpu_busy, room)
    best = np.zeros(len(rows), np.bool_)
    if len(rows) <= EXACT:
        _try_all(layer, best)
    else:
        _search(layer, best)
    seconds, _, _, _ = finish(layer, best)
    ran, fetched = write_plan(layer, best, action, gpu_order, fetch_order)
    return seconds, ran, fetched


def plan_makespan(state: LayerState, costs: LayerCosts) -> LayerPlan:
    """The plan with the least makespan, less what fetched experts save later, that was found."""
    active = len(state.rows)
    action, orders = np.empty(active, np.int8), np.empty((2, active), np.int64)
    seconds, ran, fetched = _plan(*arguments(state, costs), action, orders[0], orders[1])
    return LayerPlan(action, orders[0, :ran], orders[1, :fetched], seconds)
