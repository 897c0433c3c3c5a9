"""What a forecast is worth to a cache of experts: one sequence at a time, every expert the same size.

The tokens of a trace run layer by layer through a cache of C experts of all layers together. LRU loads what misses in
place of the least recently used. Belady, the oracle among caches that load on demand, knows the future and gives up
what is used last. With a predictor LRU goes on, but before each layer runs, experts of it and of the next ones are
loaded ahead where p * saving > cost: nearest layer first, most probable first, at most `copies` for each layer that
runs (what the link carries beside), and none in place of one that is expected before it. A copy is there when its layer
runs.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.interface import Predictor
from moe_offload.predictor.resampling import Ratio, ratio
from moe_offload.predictor.samples import sample_of
from moe_offload.predictor.trace import Trace

Wanted = list[list[list[list[int]]]]  # [layer][distance - 1][token]: experts worth loading ahead, most probable first


@dataclass(frozen=True, slots=True)
class HitRates:
    """Shares of requests that were found, by sequence. loaded: experts loaded ahead, per token; used: share of them."""

    capacity: int
    lru: Ratio
    belady: Ratio
    predicted: Ratio
    loaded: float
    used: float

    def to_dict(self) -> dict[str, Any]:
        """Shares as [value, low, high] of the 95 % interval."""
        return {
            "capacity": self.capacity,
            "lru": self.lru.interval().to_list(),
            "belady": self.belady.interval().to_list(),
            "predicted": self.predicted.interval().to_list(),
            "above_lru": self.predicted.above(self.lru).to_list(),
            "loaded_ahead_per_token": self.loaded,
            "used": None if np.isnan(self.used) else self.used,
        }


def hit_rates(
    predictor: Predictor,
    trace: Trace,
    sequences: Sequence[int] | NDArray[np.int64],
    *,
    capacity: int,
    copies: int,
    saving: float = 1.0,
    cost: float = 0.5,
    horizon: int = 3,
) -> HitRates:
    """Run a trace's decoded tokens through the caches. saving: of a hit; cost: of loading ahead, in the same unit."""
    info = trace.info
    if not info.top_k <= capacity <= info.layers * info.experts:
        raise ValueError(
            f"a cache of {capacity} experts: at least the {info.top_k} of a token, at most {info.layers * info.experts}"
        )
    if copies < 0 or not saving > 0 or not cost >= 0 or not 1 <= horizon <= info.distances:
        raise ValueError(
            f"{copies} copies, a saving of {saving}, a cost of {cost}, {horizon} layers ahead: none negative, "
            f"the saving above 0, 1 to {info.distances} layers"
        )
    sample = sample_of(trace, sequences, decode=True)
    first = np.arange(info.layers)[None, :, None] * info.experts
    requests = trace.experts[:, sample.tokens].astype(np.int64).transpose(1, 0, 2) + first  # [n, L, K]
    wanted: Wanted = [[] for _ in range(info.layers)]
    for layer in range(info.layers):
        for distance in range(1, min(horizon, layer + 1) + 1):
            p = predictor.probabilities(trace, layer, distance, sample.tokens, decode=True)
            wanted[layer].append(_ranked(p, cost / saving, layer * info.experts))
    found, loaded, used = ahead(requests.tolist(), wanted, capacity, copies)
    flat = requests.reshape(-1).tolist()
    tokens = len(sample.tokens)

    def rate(hits: list[bool] | NDArray[np.bool_]) -> Ratio:
        by_token = np.asarray(hits, np.float64).reshape(tokens, -1).sum(axis=1)
        return ratio(by_token, float(info.layers * info.top_k), sample.unit, sample.units)

    return HitRates(
        capacity,
        rate(lru(flat, capacity)),
        rate(belady(flat, capacity)),
        rate(found),
        loaded / max(tokens, 1),
        used / loaded if loaded else float("nan"),
    )


def lru(requests: Sequence[int], capacity: int) -> list[bool]:
    """Which requests a cache finds that gives up the least recently used."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for expert in requests:
        hits.append(expert in held)
        if hits[-1]:
            held.move_to_end(expert)
        else:
            if len(held) == capacity:
                held.popitem(last=False)
            held[expert] = None
    return hits


def belady(requests: Sequence[int], capacity: int) -> list[bool]:
    """Which requests a cache finds that gives up what is requested again last, or never."""
    never = len(requests)
    following = [never] * len(requests)
    seen: dict[int, int] = {}
    for at in range(len(requests) - 1, -1, -1):
        following[at] = seen.get(requests[at], never)
        seen[requests[at]] = at
    held: dict[int, int] = {}  # expert: its next request
    furthest: list[tuple[int, int]] = []  # (-next request, expert), some out of date
    hits = []
    for at, expert in enumerate(requests):
        hits.append(expert in held)
        if not hits[-1] and len(held) == capacity:
            while True:
                distance, victim = heapq.heappop(furthest)
                if held.get(victim) == -distance:
                    break
            del held[victim]
        held[expert] = following[at]
        heapq.heappush(furthest, (-following[at], expert))
    return hits


def ahead(requests: list[list[list[int]]], wanted: Wanted, capacity: int, copies: int) -> tuple[list[bool], int, int]:
    """As `lru`, with experts loaded ahead: which requests are found, how many experts were loaded ahead, and used."""
    held: OrderedDict[int, None] = OrderedDict()
    waiting: set[int] = set()  # loaded ahead and not requested yet
    hits: list[bool] = []
    loaded = used = 0
    layers = len(wanted)
    for token, of_layers in enumerate(requests):
        for layer in range(layers):
            near = [
                wanted[target][target - layer][token]
                for target in range(layer, layers)
                if target - layer < len(wanted[target])
            ]
            ranked = [expert for each in near for expert in each]
            rank = {expert: at for at, expert in enumerate(ranked)}
            left = copies
            for at, expert in enumerate(ranked):
                if not left:
                    break
                if expert in held:
                    continue
                if len(held) == capacity:
                    victim = next((each for each in held if each not in rank), None)
                    if victim is None:
                        victim = next((each for each in reversed(ranked[at + 1 :]) if each in held), None)
                    if victim is None:
                        break
                    del held[victim]
                    waiting.discard(victim)
                held[expert] = None
                waiting.add(expert)
                loaded, left = loaded + 1, left - 1
            for expert in of_layers[layer]:
                hits.append(expert in held)
                if hits[-1]:
                    held.move_to_end(expert)
                else:
                    if len(held) == capacity:
                        waiting.discard(held.popitem(last=False)[0])
                    held[expert] = None
                used += expert in waiting
                waiting.discard(expert)
    return hits, loaded, used


def _ranked(p: NDArray[np.float32], least: float, first: int) -> list[list[int]]:
    """Of each token, the experts with p > least, most probable first, as ids."""
    token, expert = np.nonzero(p > least)
    order = np.lexsort((-p[token, expert], token))
    ends = np.cumsum(np.bincount(token, minlength=len(p)))
    experts = (expert[order] + first).tolist()
    return [experts[begin:end] for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
