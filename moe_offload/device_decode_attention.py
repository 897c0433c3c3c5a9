"""Decode attention on the device by our kernel, where torch has no good one for the card.

torch's fast attention ("flash") is for compute capability 8.0 and later, f16 and bf16, values as wide as keys, and
knows no sinks. Without it one query position is left to kernels that give a block to each head and sequence, most of
the card without work, or to a chain of operations that first repeats the keys for every query head. What our kernel
does not know goes to the function that stood there before.

The mask is read by the kernel, where it lies: finding the first visible position here would wait for the device.

Which of the two is faster was not measured on a card.
"""

import logging
from typing import Any

import torch

from moe_offload.gpu_kernels.decode_attention import (
    CHUNK,
    KV_TYPES,
    LARGEST_HEAD,
    NUMBER_TYPES,
    DecodeAttention,
    DecodeShape,
    aligned,
)
from moe_offload.gpu_kernels.launch import KernelError, Kernels

logger = logging.getLogger(__name__)

_FLASH = (8, 0)  # compute capability


def prefers_kernel(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, value_size: int, *, sinks: bool
) -> bool:
    """Whether a decode step over keys and values of `dtype` is our kernel's, on a card of this compute capability."""
    sizes = head_size, value_size
    if dtype not in KV_TYPES or not all(0 < size <= LARGEST_HEAD and size % CHUNK == 0 for size in sizes):
        return False
    return sinks or capability < _FLASH or dtype == torch.float32 or head_size != value_size


class DeviceDecode:
    """Our kernel for the attentions of one model, compiled when it is first asked for."""

    def __init__(
        self, kernels: Kernels, device: torch.device, capability: tuple[int, int], multiprocessors: int
    ) -> None:
        self._kernels, self.device = kernels, device
        self._capability, self._multiprocessors = capability, multiprocessors
        self._made: dict[DecodeShape, DecodeAttention] = {}
        self._broken = False
        self.calls = 0

    @classmethod
    def on(cls, kernels: Kernels | None, device: torch.device) -> "DeviceDecode | None":
        """For a CUDA device; None without kernels."""
        if kernels is None or device.type != "cuda":
            return None
        card = torch.cuda.get_device_properties(device)
        return cls(kernels, device, (card.major, card.minor), card.multi_processor_count)

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        scale: float | None, sinks: torch.Tensor | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """[B, 1, Hq, Dv] of queries [B, Hq, 1, D] over keys and values [B, Hkv, T, .]; None for what is torch's."""
        batch, q_heads, _, size = query.shape
        kv_heads, length, value_size = key.shape[1], key.shape[2], value.shape[3]
        if not prefers_kernel(self._capability, key.dtype, size, value_size, sinks=sinks is not None):
            return None
        if any(each is not None and each.device != self.device for each in (query, key, value, mask, sinks)):
            return None  # a copy of the model, elsewhere
        row = _mask_row(mask, batch, length)
        if (mask is not None and row is None) or not length or q_heads % kv_heads or query.stride(3) != 1:
            return None
        if not aligned(key) or not aligned(value):
            return None
        attention = self._attention(DecodeShape(q_heads, kv_heads, size, value_size, key.dtype, scale))
        if attention is None:
            return None
        self.calls += 1
        return attention(query[:, :, 0], key, value, mask=row, sinks=sinks)[:, None]

    def _attention(self, shape: DecodeShape) -> DecodeAttention | None:
        if shape not in self._made and not self._broken:
            try:
                self._made[shape] = DecodeAttention(self._kernels, shape, self._multiprocessors)
            except KernelError as error:
                self._broken = True
                logger.warning("decode attention on the device is left to torch: %s", error)
        return self._made.get(shape)


class Sinks:
    """A module's sinks, one more logit for each head: f32 on one device, read again where they have changed."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: None for that of the module."""
        self._device = device
        self._last: tuple[Any, int, torch.Tensor | None] = None, 0, None

    def of(self, module: Any) -> torch.Tensor | None:
        sinks = module.sinks
        if sinks is None:
            return None
        version, last = 0 if sinks.is_inference() else sinks._version, self._last
        if last[0] is not sinks or last[1] != version:
            device = sinks.device if self._device is None else self._device
            copied = sinks.detach().to(device, torch.float32, copy=True).contiguous()
            self._last = last = sinks, version, copied  # at once: there may be other threads
        return last[2]


def _mask_row(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """[B or 1, T] of a mask [B or 1, 1, 1, at least T] for all heads; None for others."""
    if mask is None or mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] < length:
        return None
    if mask.shape[0] not in (1, batch) or mask.stride(3) != 1 or mask.dtype not in (torch.bool, *NUMBER_TYPES):
        return None
    return mask[:, 0, 0, :length]
