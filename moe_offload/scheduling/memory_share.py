"""Device memory divided between KV cache and expert slots, by the seconds that each saves in a step.

A layer's KV cache on the device saves the difference between attention there and on the CPU; a slot saves what its
expert costs elsewhere, times how often it is wanted: less with every further slot. Layers of one size are taken in the
order of what they save, so a division is a number of layers of each size and as many slots as fit beside them. Models
have one or two sizes: all combinations are looked at, and the best is the optimum.

The division is made for a context that has room to grow, and kept as long as it fits and no other is better by a
bound: moving costs, and a context grows with every token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

_MOST_COMBINATIONS = 50_000


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's KV cache. position_bytes: of all sequences together. movable: whether it may be in host memory.
    window: positions that it keeps, 0 = all.
    """

    position_bytes: int
    movable: bool = True
    window: int = 0

    def nbytes(self, length: int) -> int:
        return self.position_bytes * (min(length, self.window) if self.window else length)


@dataclass(frozen=True, slots=True)
class ShareDemand:
    """What the division is made of.

    length: positions now; expected: positions that there is to be memory for. host_seconds, device_seconds: of
    (layer, length), one step's attention. slot_seconds: what the first, the second, ... slot saves in a step, as many
    as there can be. budget: bytes for both, in all.
    """

    layers: tuple[LayerKv, ...]
    length: int
    expected: int
    host_seconds: Callable[[int, int], float]
    device_seconds: Callable[[int, int], float]
    slot_seconds: NDArray[np.float64]
    slot_bytes: int
    budget: int

    def __post_init__(self) -> None:
        if not 0 <= self.length <= self.expected:
            raise ValueError(f"a context of {self.length} positions cannot be expected to have {self.expected}")
        if self.slot_bytes < 1:
            raise ValueError(f"a slot has at least one byte, got {self.slot_bytes}")

    def kv_bytes(self, on_device: Sequence[bool]) -> int:
        """Bytes of the layers on the device and, for whatever layer is being computed, of a second copy: it grows by
        concatenation, or its past is copied in.
        """
        sizes = [layer.nbytes(self.expected) for layer in self.layers]
        return sum(size for size, here in zip(sizes, on_device, strict=True) if here) + max(sizes, default=0)

    def saved(self, layer: int) -> float:
        """Seconds that a layer's cache on the device saves, halfway to the expected length."""
        length = (self.length + self.expected) // 2
        return self.host_seconds(layer, length) - self.device_seconds(layer, length)

    def slots_beside(self, kv_bytes: int) -> int:
        """As many slots as fit and are of use."""
        return max(0, min(len(self.slot_seconds), (self.budget - kv_bytes) // self.slot_bytes))


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """Who has the device's memory: the layers whose KV cache is there, and the number of expert slots."""

    kv_on_device: tuple[bool, ...]
    slots: int


def benefit(share: MemoryShare, demand: ShareDemand) -> float:
    """Seconds that a step saves with this division, against none of both on the device."""
    movable = zip(share.kv_on_device, demand.layers, strict=True)
    layers = [index for index, (here, layer) in enumerate(movable) if here and layer.movable]
    return sum(map(demand.saved, layers)) + float(demand.slot_seconds[: share.slots].sum())


def divide(demand: ShareDemand, prefer: Sequence[bool] = ()) -> MemoryShare:
    """The best division; among layers that save the same, those in `prefer` are taken.

    Where not even the layers that cannot move fit, the others are on the host and there are no slots.
    """
    groups = _groups(demand, prefer)
    sizes = [np.cumsum([0, *(demand.layers[layer].nbytes(demand.expected) for layer in group)]) for group in groups]
    gains = [np.cumsum([0.0, *map(demand.saved, group)]) for group in groups]
    fixed = demand.kv_bytes([not layer.movable for layer in demand.layers])
    nbytes = reduce(np.add.outer, sizes, np.array(fixed))
    saved = reduce(np.add.outer, gains, np.array(0.0))
    by_slots = np.cumsum([0.0, *demand.slot_seconds])
    slots = np.clip((demand.budget - nbytes) // demand.slot_bytes, 0, len(demand.slot_seconds))
    total = np.where(nbytes <= demand.budget, saved + by_slots[slots], -np.inf)
    taken = np.unravel_index(int(total.argmax()), total.shape)
    here = [not layer.movable for layer in demand.layers]
    for group, count in zip(groups, taken, strict=True):
        for layer in group[: int(count)]:
            here[layer] = True
    return MemoryShare(tuple(here), int(slots[taken]))


def reshare(previous: MemoryShare | None, demand: ShareDemand, least_gain: float = 0.05) -> MemoryShare:
    """The division for a demand that has changed: the previous one, with fewer slots where it must be, unless the best
    one saves more by a share of `least_gain`, or the layers' caches do not fit any more.
    """
    if previous is None or len(previous.kv_on_device) != len(demand.layers):
        return divide(demand)
    best = divide(demand, previous.kv_on_device)
    here = tuple(kept or not layer.movable for kept, layer in zip(previous.kv_on_device, demand.layers, strict=True))
    nbytes = demand.kv_bytes(here)
    if nbytes > demand.budget:
        return best
    kept = MemoryShare(here, min(previous.slots, demand.slots_beside(nbytes)))
    now = benefit(kept, demand)
    return best if benefit(best, demand) > now + least_gain * abs(now) else kept


def _groups(demand: ShareDemand, prefer: Sequence[bool]) -> list[list[int]]:
    """Movable layers in the order that they are taken in, by size; all in one row, by what a byte saves, where there
    are too many combinations.
    """
    by_size: dict[int, list[int]] = {}
    for index, layer in enumerate(demand.layers):
        if layer.movable:
            by_size.setdefault(layer.nbytes(demand.expected), []).append(index)
    kept = {index for index, here in enumerate(prefer) if here}
    saved = {index: demand.saved(index) for group in by_size.values() for index in group}
    groups = [sorted(group, key=lambda i: (-saved[i], i not in kept, i)) for group in by_size.values()]
    if np.prod([len(group) + 1.0 for group in groups]) <= _MOST_COMBINATIONS:
        return groups
    sizes = {index: size for size, group in by_size.items() for index in group}
    return [sorted(saved, key=lambda i: (-saved[i] / max(sizes[i], 1), i not in kept, i))]
