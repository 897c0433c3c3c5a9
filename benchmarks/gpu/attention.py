"""Decode attention over keys and values in device memory: ours beside torch's, and as a share of the copy bandwidth.

One query position of one sequence, 32 query and 4 KV heads of 128 (Qwen3-30B-A3B). Torch runs
scaled_dot_product_attention with enable_gqa, and with the query heads of a KV head folded into query positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.few_tokens import Row
from benchmarks.gpu.timer import Call
from benchmarks.reporting import progress
from moe_offload.gpu_kernels.decode_attention import DecodeAttention, DecodeShape

Q_HEADS, KV_HEADS, HEAD = 32, 4, 128
_ROUNDED = 2e-2  # of the largest output: inputs and outputs are of 16 bits


class Caches(NamedTuple):
    """Keys and values [1, Hkv, T, D] of as many sequences as go beyond the cache; scales [1, Hkv, T] of int8."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scales: torch.Tensor | None

    @classmethod
    def make(cls, bench: Bench, context: int, dtype: torch.dtype) -> "Caches":
        generator = torch.Generator(bench.device).manual_seed(0)
        size = (1, KV_HEADS, context, HEAD)
        nbytes = 2 * KV_HEADS * context * HEAD * dtype.itemsize
        count = min(bench.calls(nbytes), bench.copies(nbytes, bench.sizes.calls))
        memory = torch.empty((2, count, *size), dtype=dtype, device=bench.device)
        if dtype == torch.int8:
            memory.random_(-127, 128, generator=generator)
            scales = torch.full(size[:3], 1 / 64, dtype=torch.float16, device=bench.device)
            return cls(list(memory[0]), list(memory[1]), scales)
        memory.normal_(generator=generator)
        return cls(list(memory[0]), list(memory[1]), None)

    @property
    def nbytes(self) -> int:
        """What one call reads."""
        scales = 0 if self.scales is None else 2 * self.scales.nbytes
        return self.keys[0].nbytes + self.values[0].nbytes + scales

    def plain(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The first sequence's, multiplied out."""
        scales = 1.0 if self.scales is None else self.scales[..., None].to(torch.float32)
        keys, values = (each[0].to(torch.float32) * scales for each in (self.keys, self.values))
        return keys.to(dtype), values.to(dtype)


def attention(bench: Bench, copy_gb_per_s: float) -> list[Row]:
    """Contexts and types of keys and values."""
    generator = torch.Generator(bench.device).manual_seed(1)
    query = torch.randn(1, Q_HEADS, HEAD, generator=generator, device=bench.device).to(bench.half)
    rows: list[Row] = []
    for context in bench.sizes.contexts:
        what = f"attention: {context} positions"
        progress(what)
        with bench.within_memory(what):
            rows += _rows(bench, query, context, copy_gb_per_s)
    return rows


def _rows(bench: Bench, query: torch.Tensor, context: int, copy_gb_per_s: float) -> list[Row]:
    contestants: dict[str, list[Call]] = {}
    sizes: dict[str, int] = {}
    for dtype in (bench.half, torch.int8):
        caches = Caches.make(bench, context, dtype)
        short = "int8" if dtype == torch.int8 else "bf16" if dtype == torch.bfloat16 else "f16"
        contestants[f"ours {short}"], sizes[f"ours {short}"] = _ours(bench, query, caches), caches.nbytes
        if dtype != torch.int8:
            for name, rival in (("gqa", _gqa), ("folded", _folded)):
                pairs = zip(caches.keys, caches.values, strict=True)
                contestants[f"torch {name} {short}"] = [partial(_run, rival, query, *pair) for pair in pairs]
                sizes[f"torch {name} {short}"] = caches.nbytes
    series = bench.times(**contestants)
    fastest = min(each.seconds for name, each in series.items() if name.startswith("torch"))
    rows: list[Row] = []
    for name, each in series.items():
        rate = sizes[name] / each.seconds / 1e9
        rows.append({
            "context": context, "kernel": name, "gb_per_s": round(rate, 1),
            "percent_of_copy": round(100 * rate / copy_gb_per_s, 1), "times_torch": round(fastest / each.seconds, 3),
            "times_the_cache": bench.times_the_cache(sizes[name] * len(contestants[name])), **each.to_dict(),
        })  # fmt: skip
    return rows


def _ours(bench: Bench, query: torch.Tensor, caches: Caches) -> list[Call]:
    """A call for each sequence; the first is checked."""
    shape = DecodeShape(Q_HEADS, KV_HEADS, HEAD, HEAD, caches.keys[0].dtype)
    ours = DecodeAttention(bench.kernels, shape, bench.processors)
    size = ours.workspace_size(1, caches.keys[0].shape[2])
    work = torch.empty(size, dtype=torch.float32, device=bench.device)

    def run(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return ours(query, keys, values, key_scales=caches.scales, value_scales=caches.scales, workspace=work)

    found = run(caches.keys[0], caches.values[0])
    expected = _folded(query.to(torch.float32), *caches.plain(torch.float32))
    off = (found.to(torch.float32) - expected).abs().max() / expected.abs().max()
    if not off <= _ROUNDED:
        raise RuntimeError(f"attention over {shape.kv_type} is off by {float(off):.1e} of the largest output")
    return [partial(_attend, run, *pair) for pair in zip(caches.keys, caches.values, strict=True)]


def _attend(
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], keys: torch.Tensor, values: torch.Tensor
) -> None:
    run(keys, values)


def _run(
    rival: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    rival(query, keys, values)


def _gqa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def _folded(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query.view(1, KV_HEADS, -1, HEAD), keys, values).view(query.shape)
