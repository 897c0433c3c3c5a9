"""KV cache layers in host memory, and moving layers between there and the device while a generation runs.

A `HostLayer` keeps its keys and values in buffers with room, so that a step copies the new positions only. What
`update` returns is what attention is to read: for one new position the host's tensors (the CPU kernel reads them where
they lie); for several, a prompt or the check of a guess, tensors on the device, where many queries belong: the new
ones as they came, behind a copy of the past, where there is one, that lives as long as the layer computes.

On the virtual accelerator everything is CPU memory, so that no tensor's `device` says which side it belongs to. What
`update` returns is marked (`origin_of`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from moe_offload.decode_layer import plain_cache
from moe_offload.kv_room import Room, fill_to

_ORIGIN = "_moe_offload_origin"
_LEAST = 256  # positions
_HOST = torch.device("cpu")


class Origin(NamedTuple):
    """Where the keys and values that attention reads lie, and how many bytes went over the link for them."""

    on_host: bool
    link_bytes: int


def origin_of(keys: torch.Tensor) -> Origin | None:
    """Of keys that a `HostLayer` returned; None for others."""
    return getattr(keys, _ORIGIN, None)


class HostLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, Hkv, length, D] in host memory; `home` is the device that they come from."""

    keys: Any
    values: Any
    home = _HOST
    _room: Room | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.home = key_states.device
        self.keys, self.values, self.device = self.keys.to(_HOST), self.values.to(_HOST), _HOST

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        moved = key_states.nbytes + value_states.nbytes
        if self._extends(key_states, value_states, past):
            room = self._room_for(key_states, value_states, past)
            on_host = _on_host(key_states, value_states) if new == 1 else (key_states, value_states)
            for buffer, states in zip((room.keys, room.values), on_host, strict=True):
                buffer.narrow(2, past, new).copy_(states)
            fill_to(self, room, past + new)
        else:  # gradients, types that have to be promoted: as transformers does it
            super().update(key_states.to(_HOST), value_states.to(_HOST))
        if new == 1:
            setattr(self.keys, _ORIGIN, Origin(True, moved))
            return self.keys, self.values
        keys, values = key_states, value_states
        if past:
            before = self.keys.narrow(2, 0, past), self.values.narrow(2, 0, past)
            keys = torch.cat([before[0].to(key_states.device), key_states], dim=-2)
            values = torch.cat([before[1].to(key_states.device), value_states], dim=-2)
            moved += before[0].nbytes + before[1].nbytes
        setattr(keys, _ORIGIN, Origin(False, moved))
        return keys, values

    def reset(self) -> None:
        super().reset()
        self._room = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices.to(_HOST))

    def _extends(self, keys: torch.Tensor, values: torch.Tensor, past: int) -> bool:
        """Whether writing the new positions behind the old ones is all that there is to do."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad or self.keys.requires_grad):
            return False
        if keys.dtype != self.keys.dtype or values.dtype != self.values.dtype:
            return False
        return not past or all(
            old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]
            for old, new in ((self.keys, keys), (self.values, values))
        )

    def _room_for(self, keys: torch.Tensor, values: torch.Tensor, past: int) -> Room:
        """Buffers that hold the past, with space for the new positions.

        What the layer holds may be no view of the buffers any more (reordered, cropped: somebody may still look at what
        lies behind), and the buffers of a copied layer are the original's: a copy is made then.
        """
        room, length = self._room, past + keys.shape[2]
        if room is not None and room.owner == id(self) and length <= room.where[2]:
            if self.keys is room.shown_keys and self.values is room.shown_values:
                return room
        capacity = max(_LEAST, (length + length // 4) // 64 * 64 + 128)
        buffers = _roomy(keys, self.keys, past, capacity), _roomy(values, self.values, past, capacity)
        self._room = room = Room(id(self), *buffers, past)
        return room


def place_layers(cache: Any, on_host: Sequence[bool]) -> int:
    """Make the plain layers of a cache host layers, or plain ones again, as `on_host` says; bytes that were moved.

    In place, whatever they hold. Layers of other kinds (sliding windows, linear attention, latents with an index) and
    other caches (static, quantised, offloaded by transformers) stay as they are.
    """
    if not plain_cache(cache):
        return 0
    wanted = max((index + 1 for index, host in enumerate(on_host) if host), default=0)
    if cache.layer_class_to_replicate is DynamicLayer:  # layers appear as they are used
        cache.layers.extend(DynamicLayer() for _ in range(wanted - len(cache.layers)))
    moved = 0
    for index, (layer, host) in enumerate(zip(cache.layers, on_host, strict=False)):
        if type(layer) is (DynamicLayer if host else HostLayer):
            cache.layers[index] = _moved(layer, host)
            moved += _nbytes(layer)
    return moved


def host_layers(cache: Any) -> list[bool]:
    """Which layers of a cache are in host memory."""
    return [type(layer) is HostLayer for layer in cache.layers]


def _moved(layer: Any, to_host: bool) -> DynamicLayer:
    moved = HostLayer() if to_host else DynamicLayer()
    moved.__dict__.update({name: value for name, value in vars(layer).items() if name not in ("home", "_room")})
    if layer.is_initialized:
        device = _HOST if to_host else layer.home
        if to_host:
            moved.home = layer.keys.device
        # a copy also where both are CPU memory: it leaves the room behind
        moved.keys, moved.values = layer.keys.to(device, copy=True), layer.values.to(device, copy=True)
        moved.device = device
    return moved


def _nbytes(layer: Any) -> int:
    return int(layer.keys.nbytes + layer.values.nbytes) if layer.is_initialized else 0


def _on_host(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One position's keys and values; from a device both in one copy, since each copy is a wait."""
    if keys.device == _HOST or keys.shape != values.shape:
        return keys, values
    both = torch.stack((keys, values)).to(_HOST)
    return both[0], both[1]


def _roomy(new: torch.Tensor, old: torch.Tensor, past: int, capacity: int) -> torch.Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
        buffer = torch.empty((*new.shape[:2], capacity, new.shape[3]), dtype=new.dtype)
    if past:
        buffer[:, :, :past] = old
    return buffer
