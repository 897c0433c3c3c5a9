"""From router logits to the argument block of a layer of experts, as one stage.

    phase 1   per token: the K experts with the largest probability, and their weights
    phase 2   one thread groups the (token, expert) pairs by expert, as grouping.group_tokens does, and writes what
              depends on them into the experts' block

Weights: softmax over all experts, then the largest K, brought to a sum of 1 if the model does so (Qwen, OLMoE,
Mixtral); or the softmax of the largest K logits (gpt-oss). Of equal logits the lower expert comes first.
"""

import math
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import experts_block as experts_word
from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.layout import WeightType
from moe_offload.cpu_kernels.memory import (
    TYPE_CODES,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
)
from moe_offload.cpu_kernels.packed_experts import guided_cuts
from moe_offload.cpu_kernels.team import aligned_bytes
from moe_offload.cpu_kernels.vector_ops import copy_vector, round_all

Routing = Literal["softmax", "softmax_normed", "softmax_of_chosen"]

LINE = 64
COUNTERS = 4
_NEXT_TOKEN, _DONE_TOKEN, _NEXT_GROUP, _DONE_GROUP = range(0, 4 * LINE, LINE)
(
    TOKENS,
    EXPERT_COUNT,
    CHOICES,  # K
    LOGITS,  # f32 [T, E], overwritten
    CHOSEN,  # i32 [T, K]
    CHOSEN_WEIGHTS,  # f32 [T, K]
    NORMED,  # 1: weights are divided by their sum
    OF_CHOSEN,  # 1: softmax of the chosen logits
    ROUND,  # code of the type that weights are rounded to
    RESIDUAL,  # f32 [T, H]: what the output begins with ...
    OUT,  # f32 [T, H]
    HIDDEN,  # H
    CURSOR,  # i64 [E]
    BLOCK,  # the experts' argument block
    CUTS,  # int64 [R + 1, 2]: for each number of active experts its number of jobs, and the address of their cuts
) = range(4 * LINE, 4 * LINE + 15 * 8, 8)
BYTES = (CUTS + 8 + LINE - 1) // LINE * LINE


@native
def _choose(args: int, token: int) -> None:
    experts, choices = load_i64(args + EXPERT_COUNT), load_i64(args + CHOICES)
    logits = load_i64(args + LOGITS) + 4 * experts * token
    chosen = load_i64(args + CHOSEN) + 4 * choices * token
    weights = load_i64(args + CHOSEN_WEIGHTS) + 4 * choices * token
    of_chosen = load_i64(args + OF_CHOSEN) != 0
    largest = load_f32(logits)
    for e in range(1, experts):
        value = load_f32(logits + 4 * e)
        if value > largest or value != value:
            largest = value
    total = 0.0
    if not of_chosen:
        for e in range(experts):
            total += math.exp(load_f32(logits + 4 * e) - largest)
    kept = 0.0
    for k in range(choices):
        best = 0
        top = -np.inf
        for e in range(experts):
            value = load_f32(logits + 4 * e)
            if value > top:
                best = e
                top = value
        probability = math.exp(top - largest)  # NaN among the logits makes every weight NaN
        store_f32(np.float32(-np.inf), logits + 4 * best)
        if not of_chosen:
            probability /= total
        kept += probability
        store_i32(best, chosen + 4 * k)
        store_f32(np.float32(probability), weights + 4 * k)
    if of_chosen or load_i64(args + NORMED) != 0:
        for k in range(choices):
            store_f32(np.float32(load_f32(weights + 4 * k) / np.float32(kept)), weights + 4 * k)
    round_all(weights, choices, load_i64(args + ROUND))


@native
def _group(args: int) -> None:
    tokens, experts, choices = load_i64(args + TOKENS), load_i64(args + EXPERT_COUNT), load_i64(args + CHOICES)
    chosen, weights = load_i64(args + CHOSEN), load_i64(args + CHOSEN_WEIGHTS)
    cursor, block = load_i64(args + CURSOR), load_i64(args + BLOCK)
    listed, offsets = load_i64(block + experts_word.EXPERTS), load_i64(block + experts_word.OFFSETS)
    rows, row_weights = load_i64(block + experts_word.TOKENS), load_i64(block + experts_word.WEIGHTS)
    inputs = load_i64(block + experts_word.INPUTS)
    for e in range(experts):
        store_i64(0, cursor + 8 * e)
    for row in range(tokens * choices):
        if load_f32(weights + 4 * row) != 0:
            at = cursor + 8 * load_i32(chosen + 4 * row)
            store_i64(load_i64(at) + 1, at)
    active = 0
    total = 0
    for e in range(experts):
        count = load_i64(cursor + 8 * e)
        if count > 0:
            store_i32(e, listed + 4 * active)
            store_i64(total, offsets + 8 * active)
            store_i64(total, cursor + 8 * e)
            active += 1
            total += count
    store_i64(total, offsets + 8 * active)
    base, size = load_i64(block + experts_word.INPUT_BASE), load_i64(block + experts_word.INPUT_BYTES)
    for k in range(choices):
        for t in range(tokens):
            weight = load_f32(weights + 4 * (choices * t + k))
            if weight != 0:
                at = cursor + 8 * load_i32(chosen + 4 * (choices * t + k))
                row = load_i64(at)
                store_i64(row + 1, at)
                store_i32(t, rows + 4 * row)
                store_f32(weight, row_weights + 4 * row)
                store_i64(base + t * size, inputs + 8 * row)
    cuts = load_i64(args + CUTS) + 16 * active
    store_i64(active, block + experts_word.ACTIVE)
    store_i64(load_i64(cuts), block + experts_word.FIRST_JOBS)
    store_i64(load_i64(cuts + 8), block + experts_word.FIRST_CUTS)


def _run(thread: int, args: int) -> None:
    tokens, hidden = load_i64(args + TOKENS), load_i64(args + HIDDEN)
    while True:
        token = fetch_add(args + _NEXT_TOKEN, 1)
        if token >= tokens:
            break
        _choose(args, token)
        at = 4 * hidden * token
        copy_vector(load_i64(args + OUT) + at, hidden, load_i64(args + RESIDUAL) + at)
        fetch_add(args + _DONE_TOKEN, 1)
    wait_for_count(args + _DONE_TOKEN, tokens)
    if fetch_add(args + _NEXT_GROUP, 1) == 0:
        _group(args)
        fetch_add(args + _DONE_GROUP, 1)
    wait_for_count(args + _DONE_GROUP, 1)


@cache
def route_job() -> Any:
    """The compiled job."""
    return compile_job(_run, "void(int64,int64)", "route")


class CutsTable:
    """The shares of phase 2 of packed experts, for every number of active experts up to `most`."""

    def __init__(self, blocks: int, unit: int, most: int, threads: int) -> None:
        unit = unit if blocks % unit == 0 else blocks
        cuts = [guided_cuts(blocks * active, threads, unit) for active in range(most + 1)]
        self._cuts = np.concatenate(cuts)
        starts = np.cumsum([0, *(each.size for each in cuts)])
        addresses = int(self._cuts.ctypes.data) + 8 * starts[:-1]
        self._table = np.stack([np.array([each.size - 1 for each in cuts]), addresses], axis=1).astype(np.int64)

    @property
    def address(self) -> int:
        return int(self._table.ctypes.data)


class RouteStage:
    """The stage for a fixed number of tokens."""

    def __init__(
        self, tokens: int, experts: int, choices: int, routing: Routing, rounding: WeightType, logits: int,
        residual: int, out: int, hidden_size: int, block: int, cuts: CutsTable,
    ) -> None:  # fmt: skip
        self._memory: NDArray[np.uint8] = aligned_bytes(BYTES)
        self._lists = aligned_bytes(8 * experts + 8 * tokens * choices)
        self._cuts = cuts
        lists = int(self._lists.ctypes.data)
        words = self._memory.view(np.int64)
        words[TOKENS // 8 : CUTS // 8 + 1] = (
            tokens, experts, choices, logits, lists + 8 * experts, lists + 8 * experts + 4 * tokens * choices,
            int(routing == "softmax_normed"), int(routing == "softmax_of_chosen"), TYPE_CODES[rounding],
            residual, out, hidden_size, lists, block, cuts.address,
        )  # fmt: skip

    @property
    def block(self) -> int:
        return int(self._memory.ctypes.data)
