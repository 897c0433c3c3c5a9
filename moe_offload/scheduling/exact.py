"""The best choice for a layer, by branch and bound: exact for few experts, an improvement for more.

Experts are decided in the order in which the device would run them, so that a decision only adds to where each resource
ends. That order is not known before: an expert on the host arrives after those fetched before it, one that is coming at
its own time; whichever would be there first is decided first.

A branch is left where it can hold nothing better: not by either side's end so far, nor if both sides could share evenly
what is left, each expert taking the time of the side that is faster at it. Of two experts alike, the one that is there
sooner or saves more later is the one for the device; at batch 1 all are alike, and few choices are left.
"""

import numpy as np

from moe_offload.cpu_kernels.jit import native
from moe_offload.scheduling.arrangement import Choice, Layer, Times


@native
def _sum_behind(layer: Layer, active: int, either: Times, copied: Times, savings: Times) -> None:
    """Sums from an expert on: the faster side's time; of CPU and link for the host's experts; what they save."""
    either[active] = copied[active] = savings[active] = 0.0
    for i in range(active - 1, -1, -1):
        host = i >= layer.coming
        either[i] = either[i + 1] + min(layer.cpu[i], layer.gpu[i])
        copied[i] = copied[i + 1] + (min(layer.cpu[i], layer.copy) if host else 0.0)
        savings[i] = savings[i + 1] + (max(layer.value[i], 0.0) if host else 0.0)


@native
def branch_and_bound(layer: Layer, best: Choice, chosen: Choice, least: float, steps: int) -> int:
    """Improve the choice `best` of objective `least` in so many steps at most; those left, below 0: not exact."""
    active = len(best)
    either, copied, savings = np.empty(active + 1), np.empty(active + 1), np.empty(active + 1)
    _sum_behind(layer, active, either, copied, savings)
    guide = np.empty(active, np.bool_)
    for i in range(active):
        guide[i] = best[i]
    # what was decided before a depth: where each resource ends, what is saved, how many are fetched and on the CPU
    device, cpu, saved = np.empty(active + 1), np.empty(active + 1), np.empty(active + 1)
    fetched, on_cpu = np.empty(active + 1, np.int64), np.empty(active + 1, np.int64)
    waiting, tried = np.empty(active + 1, np.int64), np.empty(active + 1, np.int64)
    device[0], cpu[0], saved[0] = layer.gpu_busy, layer.cpu_start, 0.0
    fetched[0], on_cpu[0], waiting[0], tried[0] = 0, 0, layer.slots, 0
    depth = 0
    while depth >= 0:
        slot, coming = min(depth, layer.slots), waiting[depth]
        host = max(depth, layer.slots) - coming + layer.coming
        link = layer.link_busy + fetched[depth] * layer.copy
        if tried[depth] == 0:
            steps -= 1
            cpu_now = cpu[depth] if on_cpu[depth] > 0 else 0.0
            rest = either[slot] - either[layer.slots] + either[coming] - either[layer.coming] + either[host]
            end = max(cpu_now, device[depth])
            if depth < active:
                busy = link if fetched[depth] > 0 else 0.0
                end = max(end, 0.5 * (cpu_now + device[depth] + rest), 0.5 * (cpu_now + busy + copied[host]))
            if on_cpu[depth] > 0:
                end += layer.join
            bound = end - saved[depth] - savings[host]
            if steps < 0 or bound >= least:
                depth -= 1
                continue
            if depth == active:
                least = bound
                for i in range(active):
                    best[i] = chosen[i]
                depth -= 1
                continue
        elif tried[depth] == 2:
            depth -= 1
            continue
        i = host
        if depth < layer.slots:
            i = depth
        elif coming < layer.coming and (host == active or layer.ready[coming] <= link + layer.copy):
            i = coming
        on_device = guide[i] == (tried[depth] == 0)
        tried[depth] += 1
        below = depth + 1
        device[below], cpu[below], saved[below] = device[depth], cpu[depth], saved[depth]
        fetched[below], on_cpu[below] = fetched[depth], on_cpu[depth]
        if on_device:
            first = i == 0 or i == layer.slots or i == layer.coming
            if not first and not chosen[i - 1] and _alike(layer, i, i - 1):
                continue
            arrival = layer.ready[i]
            if i >= layer.coming:
                if fetched[depth] >= layer.room:
                    continue
                arrival = link + layer.copy
                fetched[below] += 1
                saved[below] += layer.value[i]
            idle = on_cpu[depth] == depth
            device[below] = max(device[depth] + (layer.gpu_start if idle else 0.0), arrival) + layer.gpu[i]
        else:
            cpu[below] += layer.cpu[i]
            on_cpu[below] += 1
        chosen[i] = on_device
        waiting[below] = coming + (layer.slots <= i < layer.coming)
        tried[below] = 0
        depth = below
    return steps


@native
def _alike(layer: Layer, one: int, other: int) -> bool:
    """Neighbours that take the same time; the first is there sooner or saves no less, by the order they are in."""
    same: bool = layer.cpu[one] == layer.cpu[other] and layer.gpu[one] == layer.gpu[other]
    return same
