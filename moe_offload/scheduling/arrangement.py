"""The best order for a given choice of where each expert runs, and how long it takes then.

All copies take equally long, so those experts are copied first that keep the device longest (Johnson's rule), and the
device takes what is there first. The choice is one flag per expert, on the device or not, in an order that suits this:
experts in slots, then those that are coming by their arrival, then the host's by their time on the device, longest
first.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.jit import native
from moe_offload.scheduling.compiling import planning
from moe_offload.scheduling.layer_plan import COMING, CPU, FETCH, GPU, HOST, SLOT, LayerCosts, LayerPlan, LayerState

Times = NDArray[np.float64]
Counts = NDArray[np.int64]
Places = NDArray[np.int8]
Choice = NDArray[np.bool_]
# rows, where, ready, value; tables of CPU and GPU; copy, cpu_start, gpu_start, join, link_busy, gpu_busy, room
ARGUMENTS = (
    "int64[::1], int8[::1], float64[::1], float64[::1],"
    " Array(float64,1,'C',readonly=True), Array(float64,1,'C',readonly=True),"
    " float64, float64, float64, float64, float64, float64, int64"
)


class Layer(NamedTuple):
    """A layer as compiled code sees it; arrays [A] in the order above, `order` their positions in the state."""

    order: Counts
    slots: int  # where the experts in slots end, and where the coming ones do
    coming: int
    cpu: Times
    gpu: Times
    ready: Times
    value: Times
    copy: float
    cpu_start: float
    gpu_start: float
    join: float
    link_busy: float
    gpu_busy: float
    room: int


@native
def _at_rows(table: Times, rows: int) -> float:
    last = len(table) - 1
    seconds: float = table[rows] if rows <= last else table[last] * rows / last
    return seconds


@native
def sort_by(keys: Times, ties: Times, order: Counts) -> None:
    """Sort the numbers in `order` by keys, then by `ties`, falling, then by themselves (Shell's sort: it is short)."""
    for gap in (57, 23, 10, 4, 1):
        for end in range(gap, len(order)):
            item = order[end]
            key, tie = keys[item], ties[item]
            place = end
            while place >= gap:
                other = order[place - gap]
                if keys[other] < key:
                    break
                if keys[other] == key and (ties[other] > tie or (ties[other] == tie and other < item)):
                    break
                order[place] = other
                place -= gap
            order[place] = item


@native
def read_layer(
    rows: Counts, where: Places, ready: Times, value: Times, cpu: Times, gpu: Times, copy: float, cpu_start: float,
    gpu_start: float, join: float, link_busy: float, gpu_busy: float, room: int,
) -> Layer:  # fmt: skip
    """A `Layer` from a state's and costs' fields."""
    active = len(rows)
    order = np.empty(active, np.int64)
    keys = np.empty(active)
    cpu_seconds, gpu_seconds = np.empty(active), np.empty(active)
    arrival, saving = np.empty(active), np.empty(active)
    slots = coming = end = 0
    for place in (SLOT, COMING, HOST):
        start = end
        for position in range(active):
            if where[position] == place:
                order[end] = position
                end += 1
                keys[position] = ready[position] if place == COMING else -_at_rows(gpu, rows[position])
        sort_by(keys, value, order[start:end])
        if place == SLOT:
            slots = end
        elif place == COMING:
            coming = end
    for i in range(active):
        position = order[i]
        cpu_seconds[i] = _at_rows(cpu, rows[position])
        gpu_seconds[i] = _at_rows(gpu, rows[position])
        arrival[i] = ready[position] if i >= slots else 0.0
        saving[i] = value[position] if i >= coming else 0.0
    return Layer(
        order, slots, coming, cpu_seconds, gpu_seconds, arrival, saving,
        copy, cpu_start, gpu_start, join, link_busy, gpu_busy, room,
    )  # fmt: skip


@native
def finish(layer: Layer, chosen: Choice) -> tuple[float, float, float, float]:
    """Makespan, its later savings, and when the CPU and the device end, with the chosen experts on the device."""
    device = layer.gpu_busy + layer.gpu_start
    cpu = layer.cpu_start
    link = layer.link_busy
    saved = 0.0
    on_device = 0
    active = len(chosen)
    for i in range(layer.slots):
        if chosen[i]:
            device += layer.gpu[i]
            on_device += 1
        else:
            cpu += layer.cpu[i]
    waiting = layer.slots
    for i in range(layer.coming, active):
        if not chosen[i]:
            cpu += layer.cpu[i]
            continue
        link += layer.copy
        while waiting < layer.coming and layer.ready[waiting] <= link:
            if chosen[waiting]:
                device = max(device, layer.ready[waiting]) + layer.gpu[waiting]
                on_device += 1
            else:
                cpu += layer.cpu[waiting]
            waiting += 1
        device = max(device, link) + layer.gpu[i]
        saved += layer.value[i]
        on_device += 1
    for i in range(waiting, layer.coming):
        if chosen[i]:
            device = max(device, layer.ready[i]) + layer.gpu[i]
            on_device += 1
        else:
            cpu += layer.cpu[i]
    if on_device == 0:
        device = layer.gpu_busy
    if on_device == active:
        return device, saved, 0.0, device
    return max(device, cpu) + layer.join, saved, cpu, device


@native
def write_plan(layer: Layer, chosen: Choice, action: Places, gpu_order: Counts, fetch_order: Counts) -> tuple[int, int]:
    """The plan of a choice, into arrays [A]; how many the device runs, and how many of those are fetched."""
    on_device = 0
    fetched = 0
    waiting = layer.slots
    active = len(chosen)
    for i in range(active):
        action[layer.order[i]] = CPU
    for i in range(layer.slots):
        if chosen[i]:
            action[layer.order[i]] = GPU
            gpu_order[on_device] = layer.order[i]
            on_device += 1
    link = layer.link_busy
    for i in range(layer.coming, active + 1):
        if i < active and not chosen[i]:
            continue
        link += layer.copy
        while waiting < layer.coming and (i == active or layer.ready[waiting] <= link):
            if chosen[waiting]:
                action[layer.order[waiting]] = GPU
                gpu_order[on_device] = layer.order[waiting]
                on_device += 1
            waiting += 1
        if i < active:
            action[layer.order[i]] = FETCH
            gpu_order[on_device] = fetch_order[fetched] = layer.order[i]
            on_device += 1
            fetched += 1
    return on_device, fetched


@planning(f"Tuple((float64, int64, int64))({ARGUMENTS}, boolean[::1], int8[::1], int64[::1], int64[::1])")
def _arrange(
    rows: Counts, where: Places, ready: Times, value: Times, cpu: Times, gpu: Times, copy: float, cpu_start: float,
    gpu_start: float, join: float, link_busy: float, gpu_busy: float, room: int,
    on_device: Choice, action: Places, gpu_order: Counts, fetch_order: Counts,
) -> tuple[float, int, int]:  # fmt: skip
    layer = read_layer(rows, where, ready, value, cpu, gpu, copy, cpu_start, gpu_start, join, link_busy, gpu_busy, room)
    chosen = np.empty(len(rows), np.bool_)
    for i in range(len(rows)):
        chosen[i] = on_device[layer.order[i]]
    seconds, _, _, _ = finish(layer, chosen)
    ran, fetched = write_plan(layer, chosen, action, gpu_order, fetch_order)
    return seconds, ran, fetched


COMPILED = (_arrange,)


def arguments(state: LayerState, costs: LayerCosts) -> tuple[Any, ...]:
    """The fields in the order of ARGUMENTS."""
    return (
        state.rows, state.where, state.ready, state.value, costs.cpu, costs.gpu,
        costs.copy, costs.cpu_start, costs.gpu_start, costs.join, state.link_busy, state.gpu_busy, state.room,
    )  # fmt: skip


def arrange(state: LayerState, costs: LayerCosts, on_device: Choice) -> LayerPlan:
    """The plan that runs the experts of a mask [A] on the device, in the best order, and the others on the CPU."""
    active = len(state.rows)
    action, orders = np.empty(active, np.int8), np.empty((2, active), np.int64)
    seconds, ran, fetched = _arrange(*arguments(state, costs), on_device, action, orders[0], orders[1])
    return LayerPlan(action, orders[0, :ran], orders[1, :fetched], seconds)
