"""Room to grow for a KV cache layer.

transformers' DynamicLayer grows by concatenation: every token copies the whole cache (8 MB a layer at 4096 positions
of 4 heads of 128 in bf16). Here the cache gets a buffer with room, and its `keys` and `values` are views of the part
that is filled: the same contents, shapes and types, so that everything else that reads or changes the cache (crop,
beam reordering, a prefill in between) goes on working. What it leaves behind is recognised by its address; anything
that is not a view of the buffer any more is copied into a new one, and so is what was cropped: somebody may still look
at the positions behind it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

_ATTRIBUTE = "_moe_offload_room"
_LEAST = 256  # positions


@dataclass(slots=True)
class Room:
    """Buffers of one cache layer, of which it shows the first `filled` positions.

    `owner` is the cache layer's id: a shallow copy of it shares the attribute, but must not share the buffer.
    No reference: a cache is to be freed with its last user, not when the garbage collector comes by.
    """

    owner: int
    keys: torch.Tensor  # [B, Hkv, capacity, D]
    values: torch.Tensor
    filled: int  # positions ever written
    shown_keys: torch.Tensor | None = None  # the views that the cache layer was given
    shown_values: torch.Tensor | None = None

    # what does not change, read once
    where: tuple[int, int, int] = field(init=False)  # addresses of keys and values, capacity
    shape: tuple[int, int, int] = field(init=False)  # B, Hkv, D
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        batch, heads, capacity, size = self.keys.shape
        self.where = self.keys.data_ptr(), self.values.data_ptr(), capacity
        self.shape, self.dtype = (batch, heads, size), self.keys.dtype


def known_room(layer: Any) -> Room | None:
    """The room of a cache layer that nothing has changed since it was filled, with a position to spare."""
    room: Room | None = layer.__dict__.get(_ATTRIBUTE)
    if room is None or room.owner != id(layer) or room.filled == room.where[2]:
        return None
    return room if layer.keys is room.shown_keys and layer.values is room.shown_values else None


def make_room(layer: Any) -> Room:
    """Buffers that hold the cache layer's keys and values at their beginning, and at least one position more."""
    keys, values = layer.keys, layer.values
    room: Room | None = layer.__dict__.get(_ATTRIBUTE)
    length = keys.shape[2]
    if room is not None and room.owner == id(layer) and room.filled == length < room.keys.shape[2]:
        if _begins(keys, room.keys) and _begins(values, room.values):
            return room
    capacity = max(_LEAST, (length + length // 4) // 64 * 64 + 128)
    room = Room(id(layer), _roomy(keys, capacity), _roomy(values, capacity), length)
    layer.__dict__[_ATTRIBUTE] = room
    return room


def fill_to(layer: Any, room: Room, length: int) -> None:
    """The first `length` positions of the buffers are the cache's content now."""
    layer.keys = room.shown_keys = room.keys.narrow(2, 0, length)
    layer.values = room.shown_values = room.values.narrow(2, 0, length)
    room.filled = length


def _begins(view: torch.Tensor, buffer: torch.Tensor) -> bool:
    return (
        view.data_ptr() == buffer.data_ptr()
        and view.stride() == buffer.stride()
        and view.shape[:2] == buffer.shape[:2]
        and view.shape[3] == buffer.shape[3]
    )


def _roomy(filled: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, length, size = filled.shape
    buffer = torch.empty((batch, heads, capacity, size), dtype=filled.dtype)
    buffer[:, :, :length] = filled
    return buffer
