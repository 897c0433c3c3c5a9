"""Decode attentions with random caches of any type, and what they compute in float64."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels.attention import AttentionShape, DecodeAttention
from tests.cpu_kernels.expert_cases import decode, encode

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one attention; queries are bf16 values if the shape says so."""

    shape: AttentionShape
    q: NDArray[np.float32]  # [B, Hq, D]
    keys: NDArray[Any]  # [B, Hkv, L, D], stored
    values: NDArray[Any]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64] | None = None
    sinks: NDArray[np.float32] | None = None
    key_scales: NDArray[np.float32] | None = None
    value_scales: NDArray[np.float32] | None = None

    def run(self, attention: DecodeAttention, team: ThreadTeam) -> NDArray[np.float32]:
        out = np.full((*self.q.shape[:2], self.shape.value_size), 7.0, np.float32)
        attention(
            self.q, self.keys, self.values, self.lengths, out, team, starts=self.starts, sinks=self.sinks,
            key_scales=self.key_scales, value_scales=self.value_scales,
        )  # fmt: skip
        return out

    def reference(self) -> Floats:
        s = self.shape
        keys, values = self.widen(self.keys, self.key_scales), self.widen(self.values, self.value_scales)
        out = np.zeros((*self.q.shape[:2], s.value_size))
        for b, length in enumerate(self.lengths):
            first = 0 if self.starts is None else int(self.starts[b])
            if s.window:
                first = max(first, int(length) - s.window)
            if first >= length:
                continue
            for h in range(s.q_heads):
                kv = h * s.kv_heads // s.q_heads
                scores = s.factor * (keys[b, kv, first:length] @ self.q[b, h].astype(np.float64))
                all_scores = scores if self.sinks is None else np.append(scores, self.sinks[h])
                peak = all_scores.max()
                weights = np.exp(scores - peak) / np.exp(all_scores - peak).sum()
                out[b, h] = weights @ values[b, kv, first:length]
        return out

    @staticmethod
    def widen(stored: NDArray[Any], scales: NDArray[np.float32] | None) -> Floats:
        return decode(stored) if scales is None else stored * scales[..., None].astype(np.float64)


def make_case(
    shape: AttentionShape, lengths: list[int], most: int | None = None, seed: int = 0, spread: float = 1.0
) -> Case:
    """Random inputs for sequences of these lengths in a cache of `most` positions; `spread` sharpens the softmax."""
    rng = np.random.default_rng(seed)
    batch, length = len(lengths), most or max(1, *lengths)
    q = (spread * rng.standard_normal((batch, shape.q_heads, shape.head_size))).astype(np.float32)
    if shape.q_is_bf16:
        q = decode(encode(q, "bf16")).astype(np.float32)

    def cache(width: int) -> NDArray[Any]:
        size = (batch, shape.kv_heads, length, width)
        if shape.dtype == "int8":
            return rng.integers(-127, 128, size, np.int8)
        return encode(rng.standard_normal(size).astype(np.float32), shape.dtype)

    case = Case(shape, q, cache(shape.head_size), cache(shape.value_size), np.array(lengths, np.int64))
    if shape.dtype != "int8":
        return case
    scales = (rng.random((2, batch, shape.kv_heads, length)) / 60).astype(np.float32)
    return replace(case, key_scales=scales[0], value_scales=scales[1])


def check(case: Case, out: NDArray[np.float32]) -> None:
    """f32 sums of any order, weights from scores that were rounded at their own size, and maybe to bf16."""
    wanted = case.reference()
    largest = max(1.0, float(np.abs(Case.widen(case.values, case.value_scales)).max(initial=0)))
    weights = 2**-8 if case.shape.bf16_weights else 0.0
    np.testing.assert_allclose(out, wanted, rtol=0, atol=(2e-5 + weights) * largest)
