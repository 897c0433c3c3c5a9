"""Decode attentions with random keys and values, and what they compute in float64."""

from dataclasses import dataclass, field
from typing import Any

import torch

from moe_offload.gpu_kernels.decode_attention import DecodeAttention, DecodeShape
from moe_offload.gpu_kernels.launch import Kernels

CPU = torch.device("cpu")
MULTIPROCESSORS = 30  # of a P40
# Half of the distance between neighbours of a type, as a part of a number: what its rounding costs.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one attention; `options` are keyword arguments of the launcher."""

    shape: DecodeShape
    query: torch.Tensor  # [B, Hq, D]
    keys: torch.Tensor  # [B, Hkv, T, D]
    values: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, kernels: Kernels, splits: int | None = None) -> torch.Tensor:
        attention = DecodeAttention(kernels, self.shape, MULTIPROCESSORS)
        return attention(self.query, self.keys, self.values, splits=splits, **self.options)

    def seen(self) -> torch.Tensor:
        """[B, T], without the mask's."""
        (batch, _, length, _), starts = self.keys.shape, self.options.get("starts")
        positions = torch.arange(length, device=self.keys.device)[None]
        seen = (positions >= length - (self.shape.window or length)).expand(batch, -1)
        return seen if starts is None else seen & (positions >= starts[:, None])

    def reference(self) -> torch.Tensor:
        """[B, Hq, Dv] in float64."""
        keys, values = self._exact(self.keys, "key_scales"), self._exact(self.values, "value_scales")
        logits = torch.einsum("bhd,bhtd->bht", self.query.double(), keys)
        logits *= self.shape.head_size**-0.5 if self.shape.scale is None else self.shape.scale
        if self.shape.softcap:
            logits = self.shape.softcap * torch.tanh(logits / self.shape.softcap)
        seen, mask, sinks = self.seen(), self.options.get("mask"), self.options.get("sinks")
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            logits, seen = logits + mask.double()[:, None], seen & (mask > -1e4)
        logits = logits.masked_fill(~seen[:, None], float("-inf"))
        every = logits if sinks is None else torch.cat([logits, _sink_logits(sinks, logits)], -1)
        top = every.amax(-1, keepdim=True).clamp(min=-1e30)
        sums = torch.exp(every - top).sum(-1, keepdim=True)
        weights = torch.exp(logits - top) / sums.masked_fill(sums == 0, 1.0)
        return torch.einsum("bht,bhtd->bhd", weights, values)

    def check(self, found: torch.Tensor) -> None:
        """Raises AssertionError unless `found` is right.

        The arithmetic is f32. A logit, of magnitude 10 at most here, is a sum in chains of 8 and a tree of 5, off by
        some 2^-24 of that, which is the part of itself that its weight is off by; exp2f and tanhf of a device may be
        off by two in the last place. Together less than 1e-5 of values of 1 (the CPU shows 2e-6); then the result is
        rounded to its type.
        """
        expected = self.reference()
        bound = 1e-5 + ROUNDING[found.dtype] * expected.abs()
        worst = ((found.double() - expected).abs() - bound).max()
        assert found.dtype == self.query.dtype and found.shape == expected.shape
        assert worst <= 0, f"{float(worst)} beyond the bound"

    def _exact(self, rows: torch.Tensor, scales: str) -> torch.Tensor:
        """Repeated for the query heads; what is not seen is 0: 0 times NaN would be NaN."""
        exact = rows.double()
        if scales in self.options:
            exact = exact * self.options[scales].double()[..., None]
        mask, seen = self.options.get("mask"), self.seen()
        if mask is not None:
            seen = seen & (mask if mask.dtype == torch.bool else mask > -1e4)
        exact = exact.masked_fill(~seen[:, None, :, None], 0.0)
        return exact.repeat_interleave(self.shape.group, 1)


def _sink_logits(sinks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return sinks.double()[None, :, None].expand(len(logits), -1, 1)


def make_case(
    shape: DecodeShape,
    batch: int,
    length: int,
    *,
    query_type: torch.dtype | None = None,
    scale_type: torch.dtype = torch.float32,
    starts: list[int] | None = None,
    mask: torch.Tensor | None = None,
    with_sinks: bool = False,
    seed: int = 0,
    device: torch.device = CPU,
) -> Case:
    """Random inputs; queries of the type of keys and values, or f32 where those are int8."""
    draw = torch.Generator().manual_seed(seed)
    int8 = shape.kv_type == torch.int8
    options: dict[str, Any] = {}
    query_type = query_type or (torch.float32 if int8 else shape.kv_type)
    query = torch.randn(batch, shape.q_heads, shape.head_size, generator=draw).to(query_type)
    both = []
    for name, size in (("key_scales", shape.head_size), ("value_scales", shape.value_size)):
        sizes = batch, shape.kv_heads, length, size
        if int8:
            both.append(torch.randint(-127, 128, sizes, generator=draw, dtype=torch.int8))
            options[name] = (torch.rand(sizes[:3], generator=draw) / 64 + 2.0**-10).to(scale_type).to(device)
        else:
            both.append(torch.randn(sizes, generator=draw).to(shape.kv_type))
    if starts is not None:
        options["starts"] = torch.tensor(starts, dtype=torch.int32, device=device)
    if mask is not None:
        options["mask"] = mask.to(device)
    if with_sinks:
        options["sinks"] = torch.randn(shape.q_heads, generator=draw).to(device)
    return Case(shape, query.to(device), both[0].to(device), both[1].to(device), options)
