"""Decides, before a model's forward, which layers' KV cache is on the device, and moves them.

The division with the expert slots is made for a context with room to grow, so that most steps find nothing to do. What
is on the device is counted in the accelerator's budget before it gets there: an accelerator that has no more makes a
layer go to the host. Memory of a cache that nobody holds any more is given back at the next forward.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers.cache_utils import DynamicCache

from moe_offload.attention_layers import NAMES, AttentionLayer
from moe_offload.decode_layer import plain_cache
from moe_offload.host_cache import host_layers, place_layers
from moe_offload.scheduling.memory_share import LayerKv, MemoryShare, ShareDemand, reshare
from moe_offload.transfer.accelerator import Accelerator, OutOfDeviceMemoryError

_STEP = 256  # positions: a context is expected to grow to the next multiple, and by a quarter
_NAME = "KV cache"


class AttentionCosts(Protocol):
    """Seconds of one step's attention of a layer, all that belongs to it included, on either side."""

    def host(self, layer: int, batch: int, length: int) -> float: ...

    def device(self, layer: int, batch: int, length: int) -> float: ...


class ExpertSlots(Protocol):
    """The other side of the device's memory. What it has allocated is in the accelerator's `used`."""

    @property
    def slot_bytes(self) -> int: ...

    @property
    def count(self) -> int:
        """How many there are now."""
        ...

    def seconds(self) -> NDArray[np.float64]:
        """What the first, the second, ... slot saves in a step, as many as there can be."""
        ...

    def resize(self, count: int) -> None:
        """Have so many. OutOfDeviceMemoryError: there are as many as before, or fewer."""
        ...


class KvPlacement:
    """The placement of one model's KV caches. `hook` is a forward pre-hook with kwargs.

    itemsize: bytes of an element of keys and values, as far as is known before there are any. Only transformers' own
    growing caches are placed and counted; others (static, quantised, offloaded) are left where they are.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Sequence[AttentionLayer],
        costs: AttentionCosts,
        slots: ExpertSlots,
        itemsize: int,
    ) -> None:
        self.accelerator, self.layers, self.costs, self.slots = accelerator, tuple(layers), costs, slots
        self.share: MemoryShare | None = None
        self._bytes = [layer.width * itemsize for layer in self.layers]  # of a position of one sequence
        self._held: list[tuple[weakref.ref[Any], int]] = []  # caches, and what is counted for them
        self._made_for: tuple[Any, int, int] = (lambda: None, 0, -1)  # cache, batch, expected length
        self._measured = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Place the cache that a forward is about to use. One that the model makes for itself is placed at the next."""
        cache = kwargs.get("past_key_values")
        tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        if tokens is None and args:
            tokens = args[0]
        if tokens is not None and isinstance(cache, DynamicCache) and plain_cache(cache):
            self.before_forward(cache, tokens.shape[0], self._length(cache) + tokens.shape[1])

    def before_forward(self, cache: Any, batch: int, length: int) -> None:
        """Place a cache's layers for a forward after which it has `length` positions of `batch` sequences."""
        made_for, made_batch, expected = self._made_for
        if made_for() is cache and made_batch == batch and length <= expected and self._measured:
            return
        self._forget_the_dead()
        measured = self._measure(cache)
        if made_for() is cache and made_batch == batch and length <= expected and not measured:
            return
        expected = (length + length // 4) // _STEP * _STEP + _STEP
        demand = self._demand(cache, batch, length, expected)
        self._apply(cache, reshare(self.share, demand), demand)
        self._made_for = weakref.ref(cache), batch, expected

    def reconsider(self) -> None:
        """Divide anew at the next forward: costs, slots or the budget have changed."""
        self._made_for = (lambda: None, 0, -1)

    def close(self) -> None:
        """Bring caches that are alive to the device and stop counting them."""
        for reference, nbytes in self._held:
            cache = reference()
            if cache is not None:
                place_layers(cache, [False] * len(self.layers))
            self.accelerator.reserve(-nbytes, _NAME)
        self._held.clear()
        self.reconsider()

    def _demand(self, cache: Any, batch: int, length: int, expected: int) -> ShareDemand:
        ours = self._is_ours()
        layers = tuple(
            LayerKv(nbytes * batch, ours and layer.schedulable, _window(cache, layer.index))
            for layer, nbytes in zip(self.layers, self._bytes, strict=True)
        )
        free = self.accelerator.budget - self.accelerator.used
        return ShareDemand(
            layers,
            length,
            expected,
            lambda layer, n: self.costs.host(layer, batch, n),
            lambda layer, n: self.costs.device(layer, batch, n),
            self.slots.seconds(),
            self.slots.slot_bytes,
            max(0, free + self._held_for(cache) + self.slots.count * self.slots.slot_bytes),
        )

    def _apply(self, cache: Any, share: MemoryShare, demand: ShareDemand) -> None:
        """Have what leaves the device leave first, count what comes, then let it come."""
        on_host = [not here for here in share.kv_on_device]
        place_layers(cache, [a or b for a, b in zip(on_host, self._on_host_now(cache), strict=True)])
        if share.slots < self.slots.count:
            self.slots.resize(share.slots)
        share = self._count(cache, share, demand)
        place_layers(cache, [not here for here in share.kv_on_device])
        if share.slots > self.slots.count:
            try:
                self.slots.resize(share.slots)
            except OutOfDeviceMemoryError:
                share = MemoryShare(share.kv_on_device, self.slots.count)
        self.share = share

    def _count(self, cache: Any, share: MemoryShare, demand: ShareDemand) -> MemoryShare:
        """Count the cache in the budget; with the layers that save least on the host where there is not enough."""
        here = list(share.kv_on_device)
        movable = [index for index, layer in enumerate(demand.layers) if here[index] and layer.movable]
        movable.sort(key=demand.saved, reverse=True)
        held = self._held_for(cache)
        while True:
            nbytes = demand.kv_bytes(here)
            try:
                self.accelerator.reserve(nbytes - held, _NAME)
                break
            except OutOfDeviceMemoryError:
                if not movable:
                    raise
                here[movable.pop()] = False
        self._held = [each for each in self._held if each[0]() is not cache] + [(weakref.ref(cache), nbytes)]
        if here != list(share.kv_on_device):
            place_layers(cache, [not each for each in here])
        return MemoryShare(tuple(here), share.slots)

    def _held_for(self, cache: Any) -> int:
        return sum(nbytes for reference, nbytes in self._held if reference() is cache)

    def _forget_the_dead(self) -> None:
        alive = [each for each in self._held if each[0]() is not None]
        dead = [each for each in self._held if each not in alive]
        if dead:
            self.accelerator.reserve(-sum(nbytes for _, nbytes in dead), _NAME)
            self._held = alive

    def _measure(self, cache: Any) -> bool:
        """Take the layers' sizes from what the cache holds, where it does; whether they are others than was thought."""
        before, self._measured = list(self._bytes), False
        for index, layer in enumerate(cache.layers[: len(self.layers)]):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is not None and values is not None and keys.dim() == 4 and keys.numel():
                self._bytes[index] = (keys.nbytes + values.nbytes) // (keys.shape[0] * keys.shape[2])
                self._measured = True
        return self._bytes != before

    def _is_ours(self) -> bool:
        """Whether attention still goes through our function: the user may have named another one since."""
        modules = [layer.module for layer in self.layers if layer.schedulable]
        return all(module.config._attn_implementation in NAMES.values() for module in modules[:1])

    def _on_host_now(self, cache: Any) -> list[bool]:
        now = host_layers(cache)[: len(self.layers)]
        return now + [False] * (len(self.layers) - len(now))

    def _length(self, cache: Any) -> int:
        index = next((layer.index for layer in self.layers if layer.schedulable), 0)
        return int(cache.layers[index].get_seq_length()) if index < len(cache.layers) else 0


def _window(cache: Any, index: int) -> int:
    """Positions that the cache's layer keeps; one that was made without a config keeps all, whatever the model sees."""
    return int(getattr(cache.layers[index], "sliding_window", None) or 0) if index < len(cache.layers) else 0
