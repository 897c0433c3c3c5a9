"""Decode attention over a KV cache in host memory: one query position for each sequence.

Letters: B sequences, Hq query heads, Hkv KV heads, D size of a query or key, Dv of a value.
"""

import ctypes
import struct
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import attention_block as word
from moe_offload.cpu_kernels.attention_block import JobShape, lines
from moe_offload.cpu_kernels.attention_job import make_attention_job
from moe_offload.cpu_kernels.attention_rows import CACHE_BYTES, CacheType, Rows, has_pair_dots
from moe_offload.cpu_kernels.attention_softmax import LOG2E
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team

_NUMPY_TYPES: dict[CacheType, Any] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32, "int8": np.int8}
_FIELDS = struct.Struct(f"={word.QUERIES}x{(word.SLOTS - word.QUERIES) // 8 + 1}q")  # counters are zero
_compiling = threading.Lock()


class Strides(NamedTuple):
    """Bytes from one sequence, KV head, position of a cache to the next."""

    batch: int
    head: int
    position: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The attention of one layer. Hq is a multiple of Hkv, the query heads of a KV head follow each other.

    `window`: positions that a query sees, its own included; 0 = all. `scale` multiplies the scores;
    None = 1 / sqrt(D).

    Two promises let CPUs that multiply bf16 pairs do so, on a bf16 or int8 cache: `q_is_bf16`, that
    queries are bf16 values widened to f32 (their low 16 bits are ignored, nothing is lost), and
    `bf16_weights`, that the softmax's weights may be rounded to bf16 before they meet the values, as
    torch does in bf16 models (on a bf16 cache the rounded weights still add up to 1).
    """

    q_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    dtype: CacheType
    window: int = 0
    scale: float | None = None
    q_is_bf16: bool = False
    bf16_weights: bool = False

    def __post_init__(self) -> None:
        if min(self.q_heads, self.kv_heads, self.head_size, self.value_size) < 1:
            raise ValueError(f"an attention needs at least one head and one element, got {self}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"{self.q_heads} query heads cannot share {self.kv_heads} KV heads evenly")
        if self.dtype not in CACHE_BYTES:
            raise ValueError(f"unknown cache type {self.dtype!r}; known are {', '.join(get_args(CacheType))}")
        if self.window < 0:
            raise ValueError(f"a window counts positions (0 = all), got {self.window}")

    @property
    def factor(self) -> float:
        return self.head_size**-0.5 if self.scale is None else self.scale


@cache
def _job(shape: JobShape) -> Any:
    sizes = f"{shape.queries}x{shape.keys.width}x{shape.values.width}"
    key = (
        f"attention-{shape.keys.dtype}-{sizes}{'-pair-scores' * shape.pair_scores}{'-pair-values' * shape.pair_values}"
    )
    return compile_job(make_attention_job(key, shape, current_target()), "void(int64,int64)", key)


class DecodeAttention:
    """out = softmax(scale * q K) V for one query position of each sequence.

    The cache is read where it lies: a position's D (Dv) elements are contiguous, the rest are
    strides. The result has the same bits for every number of threads. What a query does not see
    (beyond its sequence's length, before its start or window) is never read. A sequence that sees
    nothing gives zeros. NaN in what a query sees makes its outputs NaN.
    """

    def __init__(self, shape: AttentionShape) -> None:
        target = current_target()
        rows = [Rows(shape.dtype, width, target.lanes) for width in (shape.head_size, shape.value_size)]
        pairs = shape.dtype in ("bf16", "int8") and has_pair_dots(target)
        self.shape = shape
        self._job_shape = JobShape(
            shape.q_heads // shape.kv_heads, rows[0], rows[1], pairs and shape.q_is_bf16, pairs and shape.bf16_weights
        )
        self._factor = int.from_bytes(struct.pack("<f", shape.factor * LOG2E), "little")
        self._local_bytes = self._job_shape.local_bytes
        self._compiled: Any = None

    def load(self) -> None:
        """Compile the job or load it from the cache."""
        with _compiling:
            self._compiled = _job(self._job_shape)

    @property
    def job_address(self) -> int:
        """The C function `void(thread, args)`; needs load()."""
        if self._compiled is None:
            raise RuntimeError("load() the attention before its job's address is asked for")
        address: int = self._compiled.address
        return address

    def block_bytes(self, batch: int, max_length: int, threads: int) -> int:
        """Size of an argument block for up to `batch` sequences of up to max_length positions."""
        return self._job_shape.bytes(batch, self.shape.kv_heads, max_length, threads)

    def fill(
        self,
        args: int,
        *,
        queries: int,
        keys: int,
        values: int,
        out: int,
        lengths: int,
        batch: int,
        threads: int,
        key_strides: Strides,
        value_strides: Strides,
        starts: int = 0,
        sinks: int = 0,
        key_scales: int = 0,
        value_scales: int = 0,
        scale_strides: tuple[int, int] = (0, 0),
    ) -> None:
        """Write the argument block at `args`, on a cache line, for a team of `threads`.

        Addresses: queries f32 [B, Hq, D]; keys, values as their strides say; out f32 [B, Hq, Dv];
        lengths, starts (0 = all from the first position) int64 [B]; sinks (0 = none) f32 [Hq], logits
        that enter the denominator only; key_scales, value_scales (int8 only) f32 with contiguous
        positions and (batch, head) strides in bytes. Nothing is checked: lengths must not exceed the
        max_length that the block was made for. A launch reads addresses and lengths when it runs;
        before each further launch NEXT and DONE (attention_block) have to be zero again.
        """
        counter_bytes = lines(8 * batch * self.shape.kv_heads)
        counters = args + word.BYTES
        local = counters + counter_bytes
        slots = local + threads * self._local_bytes
        fields = _FIELDS.pack(
            queries, keys, values, out, lengths, starts, sinks, key_scales, value_scales,
            batch, threads, self.shape.kv_heads, self.shape.window, self._factor,
            *key_strides, *value_strides, *scale_strides, counters, local, slots,
        )  # fmt: skip
        ctypes.memmove(args, fields, len(fields))
        ctypes.memset(counters, 0, counter_bytes)

    def __call__(
        self,
        q: NDArray[np.float32],
        keys: NDArray[Any],
        values: NDArray[Any],
        lengths: NDArray[np.int64],
        out: NDArray[np.float32],
        team: Team,
        *,
        starts: NDArray[np.int64] | None = None,
        sinks: NDArray[np.float32] | None = None,
        key_scales: NDArray[np.float32] | None = None,
        value_scales: NDArray[np.float32] | None = None,
    ) -> None:
        """Write the attention of q [B, Hq, D] over keys [B, Hkv, L, D], values [B, Hkv, L, Dv] to out [B, Hq, Dv].

        bf16 caches come as uint16. int8 caches have scales f32 [B, Hkv, L], of equal strides: an
        element is its integer times the scale of its position. ValueError names what does not fit.
        """
        self._check(q, keys, values, lengths, out, starts, sinks, key_scales, value_scales)
        if self._compiled is None:
            self.load()
        batch, most = q.shape[0], keys.shape[2]
        scale_strides = key_scales.strides[:2] if key_scales is not None else (0, 0)
        with team.lock:
            args = team.scratch(self.block_bytes(batch, most, team.threads))
            self.fill(
                args,
                queries=q.ctypes.data,
                keys=keys.ctypes.data,
                values=values.ctypes.data,
                out=out.ctypes.data,
                lengths=lengths.ctypes.data,
                batch=batch,
                threads=team.threads,
                key_strides=Strides(*keys.strides[:3]),
                value_strides=Strides(*values.strides[:3]),
                starts=0 if starts is None else starts.ctypes.data,
                sinks=0 if sinks is None else sinks.ctypes.data,
                key_scales=0 if key_scales is None else key_scales.ctypes.data,
                value_scales=0 if value_scales is None else value_scales.ctypes.data,
                scale_strides=(scale_strides[0], scale_strides[1]),
            )
            team.launch(self.job_address, args)

    def _check(
        self,
        q: NDArray[np.float32],
        keys: NDArray[Any],
        values: NDArray[Any],
        lengths: NDArray[np.int64],
        out: NDArray[np.float32],
        starts: NDArray[np.int64] | None,
        sinks: NDArray[np.float32] | None,
        key_scales: NDArray[np.float32] | None,
        value_scales: NDArray[np.float32] | None,
    ) -> None:
        s, batch = self.shape, q.shape[0]
        most = keys.shape[2] if keys.ndim == 4 else 0
        stored = _NUMPY_TYPES[s.dtype]
        _dense("q", q, np.float32, (batch, s.q_heads, s.head_size))
        _dense("out", out, np.float32, (batch, s.q_heads, s.value_size))
        _rows("keys", keys, stored, (batch, s.kv_heads, most, s.head_size))
        _rows("values", values, stored, (batch, s.kv_heads, most, s.value_size))
        _dense("lengths", lengths, np.int64, (batch,))
        if starts is not None:
            _dense("starts", starts, np.int64, (batch,))
        if sinks is not None:
            _dense("sinks", sinks, np.float32, (s.q_heads,))
        if ((lengths < 0) | (lengths > most)).any() or (starts is not None and (starts < 0).any()):
            raise ValueError(f"lengths must lie in 0..{most} and starts must not be negative")
        if (s.dtype == "int8") != (key_scales is not None) or (s.dtype == "int8") != (value_scales is not None):
            raise ValueError(f"scales belong to int8 caches, and only to them; this one is {s.dtype}")
        if key_scales is not None and value_scales is not None:
            _rows("key_scales", key_scales, np.float32, (batch, s.kv_heads, most))
            _rows("value_scales", value_scales, np.float32, (batch, s.kv_heads, most))
            if key_scales.strides != value_scales.strides:
                raise ValueError("key_scales and value_scales must have equal strides")


def _rows(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} must be {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}")
    if array.size and array.strides[-1] != array.itemsize and array.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous along the last axis")


def _dense(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    _rows(name, array, dtype, shape)
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous")
