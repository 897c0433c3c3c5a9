"""From one decoder layer of a fused step to the next: its result, rounded to the model's type, is the next input.

Behind the last layer the same stage applies the model's norm. It follows the stage protocol (stages.py).
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.layout import WeightType
from moe_offload.cpu_kernels.matrices import Norm
from moe_offload.cpu_kernels.matrix_job import normalise
from moe_offload.cpu_kernels.memory import TYPE_CODES, load_f32, load_i64
from moe_offload.cpu_kernels.packed_experts import float_bits
from moe_offload.cpu_kernels.stages import Stage
from moe_offload.cpu_kernels.team import aligned_bytes
from moe_offload.cpu_kernels.vector_ops import copy_vector, round_all

LINE = 64
COUNTERS = 2
_NEXT, _DONE = 0, LINE
(
    TOKENS,
    WIDTH,  # H
    SOURCE,  # f32 [T, H]
    TARGET,  # f32 [T, H]
    ROUND,  # code of the model's type
    NORM,  # f32 [H]; 0 = none
    NORM_BIAS,  # f32 [H]: then it is a LayerNorm
    EPSILON,  # f32 bits
) = range(2 * LINE, 2 * LINE + 8 * 8, 8)
BYTES = 3 * LINE


def _run(thread: int, args: int) -> None:
    tokens, width, code = load_i64(args + TOKENS), load_i64(args + WIDTH), load_i64(args + ROUND)
    norm, bias, epsilon = load_i64(args + NORM), load_i64(args + NORM_BIAS), load_f32(args + EPSILON)
    while True:
        token = fetch_add(args + _NEXT, 1)
        if token >= tokens:
            break
        at = load_i64(args + TARGET) + 4 * width * token
        copy_vector(at, width, load_i64(args + SOURCE) + 4 * width * token)
        round_all(at, width, code)
        if norm != 0:
            normalise(at, at, width, norm, bias, epsilon, code)
        fetch_add(args + _DONE, 1)
    wait_for_count(args + _DONE, tokens)


@cache
def hand_over_job() -> Any:
    """The compiled job."""
    return compile_job(_run, "void(int64,int64)", "hand_over")


class HandOver:
    """target = norm(round(source)), both f32 [T, H], which the caller keeps alive."""

    def __init__(
        self, source: NDArray[np.float32], target: NDArray[np.float32], rounding: WeightType, norm: Norm | None = None
    ) -> None:
        self._memory: NDArray[np.uint8] = aligned_bytes(BYTES)
        weight, epsilon, bias = norm if norm is not None else (0, 0.0, 0)
        self._memory.view(np.int64)[TOKENS // 8 : EPSILON // 8 + 1] = (
            *source.shape, source.ctypes.data, target.ctypes.data, TYPE_CODES[rounding], weight, bias,
            float_bits(epsilon),
        )  # fmt: skip

    @property
    def stage(self) -> Stage:
        return Stage(hand_over_job().address, int(self._memory.ctypes.data), COUNTERS)
