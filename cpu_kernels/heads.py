"""The small work between the projections and the attention of a decode step, as one stage.

For each token: clip (OLMoE), norm of the queries and keys (per head, or over all heads at once), rotary embedding of
their first 2 * half elements, and the new key and value go into the KV cache as elements of its type. Queries stay
where they are, in f32.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.layout import WeightType
from moe_offload.cpu_kernels.matrix_job import normalise
from moe_offload.cpu_kernels.memory import TYPE_CODES, load_f32, load_i64, store_f32
from moe_offload.cpu_kernels.packed_experts import float_bits
from moe_offload.cpu_kernels.team import aligned_bytes
from moe_offload.cpu_kernels.vector_ops import rotate, round_all, store_as

LINE = 64
COUNTERS = 2
_NEXT, _DONE = 0, LINE
(
    TOKENS,
    QUERIES,  # f32 [T, Hq, D]
    KEYS,  # f32 [T, Hkv, D]
    VALUES,  # f32 [T, Hkv, D]
    Q_HEADS,
    KV_HEADS,
    HEAD_SIZE,
    HALF,  # elements i and i + half are turned together; 0 = none
    COS,  # f32 [T, cos_step / 4]
    SIN,
    COS_STEP,  # bytes from token to token; 0 = the same for all
    Q_NORM,  # f32 weights; 0 = none
    K_NORM,
    WHOLE,  # 1: the norm goes over all heads at once
    EPSILON,  # f32 bits
    CLIP,  # f32 bits; 0 = not at all
    ROUND,  # code of the model's type
    CACHE_CODE,  # code of the cache's type
    KEY_CACHE,  # address of position 0 of sequence 0, head 0
    VALUE_CACHE,
    CACHE_BATCH,  # bytes from sequence to sequence ...
    CACHE_HEAD,
    CACHE_POSITION,
    POSITION,  # where the new keys and values go
) = range(2 * LINE, 2 * LINE + 24 * 8, 8)
BYTES = (POSITION + 8 + LINE - 1) // LINE * LINE


class HeadsShape(NamedTuple):
    """What a layer's attention does between its projections. Norm weights are addresses of f32, 0 without."""

    q_heads: int
    kv_heads: int
    head_size: int
    half: int
    q_norm: int = 0
    k_norm: int = 0
    whole: bool = False
    epsilon: float = 1e-6
    clip: float = 0.0


@native
def _clip(x: int, count: int, limit: float) -> None:
    for i in range(count):
        value = load_f32(x + 4 * i)
        if value > limit:
            value = limit
        elif value < -limit:
            value = -limit
        store_f32(value, x + 4 * i)


@native
def _prepare(args: int, x: int, heads: int, norm: int, token: int, turned: bool) -> None:
    """Norm, clip and rotation of one token's heads at x."""
    size, code = load_i64(args + HEAD_SIZE), load_i64(args + ROUND)
    epsilon, clip = load_f32(args + EPSILON), load_f32(args + CLIP)
    whole = load_i64(args + WHOLE)
    if norm != 0 and whole != 0:
        normalise(x, x, heads * size, norm, 0, epsilon, code)
    if clip > 0:
        _clip(x, heads * size, clip)
        round_all(x, heads * size, code)  # the limit itself
    cos = load_i64(args + COS) + token * load_i64(args + COS_STEP)
    sin = load_i64(args + SIN) + token * load_i64(args + COS_STEP)
    for head in range(heads):
        at = x + 4 * size * head
        if norm != 0 and whole == 0:
            normalise(at, at, size, norm, 0, epsilon, code)
        if turned:
            rotate(at, load_i64(args + HALF), cos, sin, code)


@native
def _store(args: int, x: int, cache: int, token: int) -> None:
    """One token's KV heads at x into a cache."""
    size, code = load_i64(args + HEAD_SIZE), load_i64(args + CACHE_CODE)
    to = cache + token * load_i64(args + CACHE_BATCH) + load_i64(args + POSITION) * load_i64(args + CACHE_POSITION)
    for head in range(load_i64(args + KV_HEADS)):
        store_as(to + head * load_i64(args + CACHE_HEAD), size, x + 4 * size * head, code)


def _run(thread: int, args: int) -> None:
    size, jobs = load_i64(args + HEAD_SIZE), 3 * load_i64(args + TOKENS)
    q_heads, kv_heads = load_i64(args + Q_HEADS), load_i64(args + KV_HEADS)
    while True:
        job = fetch_add(args + _NEXT, 1)
        if job >= jobs:
            break
        token = job // 3
        part = job - 3 * token
        if part == 0:
            x = load_i64(args + QUERIES) + 4 * size * q_heads * token
            _prepare(args, x, q_heads, load_i64(args + Q_NORM), token, load_i64(args + HALF) > 0)
        elif part == 1:
            x = load_i64(args + KEYS) + 4 * size * kv_heads * token
            _prepare(args, x, kv_heads, load_i64(args + K_NORM), token, load_i64(args + HALF) > 0)
            _store(args, x, load_i64(args + KEY_CACHE), token)
        else:
            x = load_i64(args + VALUES) + 4 * size * kv_heads * token
            _prepare(args, x, kv_heads, 0, token, False)
            _store(args, x, load_i64(args + VALUE_CACHE), token)
        fetch_add(args + _DONE, 1)
    wait_for_count(args + _DONE, jobs)


@cache
def heads_job() -> Any:
    """The compiled job."""
    return compile_job(_run, "void(int64,int64)", "heads")


class HeadsStage:
    """The stage for a fixed number of tokens; `words` holds what changes from step to step."""

    def __init__(
        self, shape: HeadsShape, tokens: int, queries: int, keys: int, values: int, model_type: WeightType,
        cache_type: WeightType,
    ) -> None:  # fmt: skip
        self._memory: NDArray[np.uint8] = aligned_bytes(BYTES)
        self._words = self._memory.view(np.int64)
        fixed = {
            TOKENS: tokens, QUERIES: queries, KEYS: keys, VALUES: values,
            Q_HEADS: shape.q_heads, KV_HEADS: shape.kv_heads, HEAD_SIZE: shape.head_size, HALF: shape.half,
            Q_NORM: shape.q_norm, K_NORM: shape.k_norm, WHOLE: int(shape.whole),
            EPSILON: float_bits(shape.epsilon), CLIP: float_bits(shape.clip),
            ROUND: TYPE_CODES[model_type], CACHE_CODE: TYPE_CODES[cache_type],
        }  # fmt: skip
        for offset, value in fixed.items():
            self._words[offset // 8] = value

    @property
    def block(self) -> int:
        return int(self._memory.ctypes.data)

    def point(self, cos: int, sin: int, cos_step: int) -> None:
        """Where this step's rotary embedding lies: f32, cos_step bytes from token to token."""
        self._words[COS // 8 : COS // 8 + 3] = cos, sin, cos_step

    def place(self, keys: int, values: int, strides: tuple[int, int, int], position: int) -> None:
        """Where the new keys and values go; strides in bytes per sequence, head and position."""
        self._words[KEY_CACHE // 8 : POSITION // 8 + 1] = keys, values, *strides, position
