"""What is done to a KV cache when a forward fails half way: taken back, or emptied to be filled again.

Layers that simply hold keys and values are cropped. Windows that have moved on and recurrent states cannot be, nor can
what a lost device held: such a cache is emptied, and filled again from the tokens (token_history.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from moe_offload.decode_layer import plain_cache
from moe_offload.host_cache import HostLayer


def take_back(cache: Cache, length: int) -> bool:
    """Have a cache hold `length` positions again, of which a failed forward added more to some layers; False where it
    cannot be done.
    """
    if any(type(layer) not in (DynamicLayer, HostLayer) for layer in cache.layers):
        return False
    for layer in cache.layers:
        excess = layer.get_seq_length() - length
        if excess > 0:  # as a number of positions to go: the one meaning that all versions of transformers know
            layer.crop(-excess)
    return True


def can_be_emptied(cache: Any) -> bool:
    """Whether `empty` knows the cache."""
    return isinstance(cache, DynamicCache | StaticCache) and plain_cache(cache)


def empty(cache: Cache, config: PreTrainedConfig) -> None:
    """Have a cache hold nothing, as when it was made: its layers are new, and nothing of the old ones is touched."""
    if isinstance(cache, StaticCache):
        lengths = [int(layer.max_cache_len) for layer in cache.layers if hasattr(layer, "max_cache_len")]
        made: Cache = StaticCache(config=config, max_cache_len=max(lengths))
    else:
        made = DynamicCache(config=config)
    cache.layers[:] = made.layers


def padding_mask(mask: Any, length: int) -> torch.Tensor | None:
    """[B, length] which of the first positions are tokens, from any mask that transformers gives a forward; None: all.

    Raises ValueError where that cannot be told.
    """
    if isinstance(mask, Mapping):
        if "full_attention" not in mask:
            raise ValueError("a mask of windows alone does not tell padding")
        mask = mask["full_attention"]
    if mask is None:
        return None
    if not torch.is_tensor(mask) or mask.dim() not in (2, 4):
        raise ValueError(f"no mask of tokens: {type(mask).__name__}")
    if mask.dim() == 4:  # [B, 1, queries, keys]: what the last query sees
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    found: torch.Tensor = mask[:, :length].to("cpu")
    return found
