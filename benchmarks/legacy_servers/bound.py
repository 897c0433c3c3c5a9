"""The physical bound of a cell: bytes over link, CPU and card, whoever decides. No policy can be faster.

A step reads dense weights and keys on the card, and every active expert's weights once, on the card or on the CPU.
Experts that are not in a slot when they are wanted cross the link or are read by the CPU. Their number is the least
that any cache of so many slots can have on this routing, with its first content for free and all of the future known
(Belady, who may also let an expert pass by). The link works all the time; the CPU only beside experts, as it waits
for routers:

    around = dense bytes / card's rate
    experts >= (missed bytes - around * link) / (link + CPU), expert bytes / (card + CPU)
    step >= around + experts

Multiplications, launches and waits are not in it: small batches come near it, large ones on slow hosts cannot.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.servers.routing import Choices
from benchmarks.servers.shapes import Shape
from benchmarks.servers.simulation import CONTEXT
from moe_offload.transfer.server_profile import ServerProfile

Resource = Literal["card", "link and CPU", "card and CPU"]


@dataclass(frozen=True, slots=True)
class Bound:
    """tokens_per_second at most; active, missed: experts of a step, all layers, missed at least; limit: what binds."""

    tokens_per_second: float
    active: float
    missed: float
    limit: Resource


def fewest_misses(requests: Sequence[int], capacity: int) -> int:
    """Of any cache of so many experts that begins with what it likes and need not keep what is requested."""
    last: dict[int, int] = {}
    following = [len(requests)] * len(requests)
    for at in range(len(requests) - 1, -1, -1):
        following[at] = last.get(requests[at], len(requests))
        last[requests[at]] = at
    inside = {key: at for key, at in sorted(last.items(), key=lambda item: item[1])[:capacity]}
    farthest = [(-at, key) for key, at in inside.items()]
    heapq.heapify(farthest)
    misses = 0
    for at, key in enumerate(requests):
        if key in inside:
            inside[key] = following[at]
            heapq.heappush(farthest, (-following[at], key))
            continue
        misses += 1
        while farthest and inside.get(farthest[0][1]) != -farthest[0][0]:
            heapq.heappop(farthest)
        if farthest and -farthest[0][0] > following[at]:
            del inside[heapq.heappop(farthest)[1]]
            inside[key] = following[at]
            heapq.heappush(farthest, (-following[at], key))
    return misses


def bound_of(server: ServerProfile, shape: Shape, choices: Choices, slots: int) -> Bound:
    """Of steps [steps, L, T, K]."""
    steps, layers, batch, _ = choices.shape
    requests = [
        layer * shape.experts + int(expert)
        for step in choices
        for layer in range(layers)
        for expert in np.unique(step[layer])
    ]
    active, missed = len(requests) / steps, fewest_misses(requests, slots) / steps
    dense = 2 * (shape.dense_params + shape.head_params) + batch * CONTEXT * shape.kv_bytes
    return step_bound(server, shape, dense, active, missed, batch)


def step_bound(server: ServerProfile, shape: Shape, dense: int, active: float, missed: float, batch: int) -> Bound:
    """As above, of figures of a step; dense: bytes."""
    card, link, cpu = server.memory_gbs * 1e9, server.link_gbs * 1e9, host_rate(server, shape)
    around = dense / card
    by_link = max(missed * shape.expert_bytes - around * link, 0.0) / (link + cpu)
    by_card = active * shape.expert_bytes / (card + cpu)
    experts = max(by_link, by_card)
    limit: Resource = "card" if around > experts else "link and CPU" if by_link >= by_card else "card and CPU"
    return Bound(round(batch / (around + experts), 4), round(active, 2), round(missed, 2), limit)


def host_rate(server: ServerProfile, shape: Shape) -> float:
    """Bytes per second that the host reads of experts: its memory's rate, or what was measured if that is more."""
    measured = [
        table.nbytes / float(table.seconds[1])
        for table in server.expert_tables
        if table.describes(shape.expert_bytes, shape.flops_per_row)
    ]
    return max([server.host_read_gbs * 1e9, *measured])
