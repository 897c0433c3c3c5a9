"""The tokens behind a KV cache, so that it can be computed again when a device takes it along.

A history lies on the cache object as an attribute and follows what is done to the cache's rows. `reorder_cache` and its
like are replaced on that one object by functions that do both. These refer to the cache weakly: it is to be freed with
its last user, and its memory on the device with it. A deep copy of a cache gets a history of its own.
"""

import weakref
from typing import Any

import torch

_ATTRIBUTE = "_moe_offload_history"
_ROW_METHODS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


class TokenHistory:
    """ids [B, n] and their position_ids (None: counted from 0), of all positions in the cache.

    `device` counts the devices that have been lost: a cache of an earlier one is gone.
    """

    def __init__(self, device: int) -> None:
        self.ids: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.complete = True  # False: something went in that was not seen as tokens
        self.filled = True  # False: the cache was emptied, and these tokens are to go in again
        self.device = device

    def append(self, ids: torch.Tensor, positions: torch.Tensor | None) -> None:
        """These tokens went into the cache."""
        ids = ids.detach().to("cpu", copy=True)
        before = 0 if self.ids is None else self.ids.shape[1]
        if positions is None:
            positions = torch.arange(before, before + ids.shape[1])
        positions = positions.detach().to("cpu", copy=True).expand(ids.shape)
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)

    def cut(self, length: int) -> None:
        """The cache was cropped to `length` positions."""
        if self.ids is not None and self.positions is not None:
            self.ids, self.positions = self.ids[:, :length], self.positions[:, :length]

    def rows(self, name: str, argument: Any) -> None:
        """What the cache's method `name` does to its rows."""
        if self.ids is None or self.positions is None:
            return
        if name == "batch_repeat_interleave":
            self.ids = self.ids.repeat_interleave(argument, dim=0)
            self.positions = self.positions.repeat_interleave(argument, dim=0)
        else:
            chosen = torch.as_tensor(argument).to("cpu")
            self.ids, self.positions = self.ids[chosen], self.positions[chosen]


def history_of(cache: Any) -> TokenHistory | None:
    """The history of a cache that has one."""
    found: TokenHistory | None = cache.__dict__.get(_ATTRIBUTE)
    return found


def begin_history(cache: Any, device: int) -> TokenHistory:
    """Watch a cache from now on. What it holds already was not seen."""
    history = TokenHistory(device)
    history.complete = not cache.get_seq_length()
    cache.__dict__[_ATTRIBUTE] = history
    for name in _ROW_METHODS:
        cache.__dict__[name] = _Follower(name, cache)
    return history


class _Follower:
    """In the place of one of the cache's methods that change its rows."""

    def __init__(self, name: str, cache: Any) -> None:
        self._name, self._cache = name, weakref.ref(cache)

    def __call__(self, argument: Any) -> Any:
        cache = self._cache()
        assert cache is not None  # somebody calls its method
        history = history_of(cache)
        if history is not None:
            history.rows(self._name, argument)
        return getattr(type(cache), self._name)(cache, argument)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Follower":
        """The copy of the cache is in `memo` before what it holds is copied."""
        return _Follower(self._name, memo[id(self._cache())])
