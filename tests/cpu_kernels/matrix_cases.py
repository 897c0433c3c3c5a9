"""Matrices with random weights in any stored type, and what they compute in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES
from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel
from moe_offload.cpu_kernels.packed_experts import both_planes
from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix, pack_mxfp4, unpack_matrix
from moe_offload.cpu_kernels.team import aligned_bytes
from tests.cpu_kernels.expert_cases import decode, encode

Floats = NDArray[np.float64]
# Puts bytes somewhere in memory.
Place = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

# What a group's largest activation is divided by to give the largest rounding error of its others: 16 bits are
# 32512 steps, rounded to the nearest; 8 bits are their upper byte, rounded (activation_rows.py).
STEPS = {"f32": np.inf, "int16": 2 * 32512.0, "int8": 32512 / 128.5}


def on_a_line(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    memory = aligned_bytes(content.size)
    memory[:] = content
    return memory


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix as it lies in memory, and the weights [N, K] that it stands for."""

    memory: NDArray[np.uint8]
    weights: Floats
    bias: NDArray[np.float32] | None

    def entry(self, **more: int) -> Matrix:
        bias = 0 if self.bias is None else int(self.bias.ctypes.data)
        return Matrix(int(self.memory.ctypes.data), len(self.weights), bias, **more)


def make_matrix(
    rng: np.random.Generator, rows: int, cols: int, dtype: str, group: int = 32, bias: bool = False,
    place: Place = on_a_line,
) -> Stored:  # fmt: skip
    """mxfp4 takes whole groups of 32 inputs."""
    values = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
    added = rng.standard_normal(rows).astype(np.float32) if bias else None
    if dtype in ELEMENT_BYTES:
        stored = encode(values, dtype)
        return Stored(place(np.frombuffer(stored.tobytes(), np.uint8)), decode(stored), added)
    layout = PackedMatrix(rows, cols, dtype, group)  # type: ignore[arg-type]
    out = np.zeros(layout.nbytes, np.uint8)
    if dtype == "mxfp4":
        exponents = rng.integers(118, 126, (rows, cols // 32)).astype(np.uint8)
        pack_mxfp4(rng.integers(0, 16, (rows, cols)).astype(np.uint8), exponents, layout, out)
    else:
        pack_matrix(values, layout, out)
    return Stored(place(out), unpack_matrix(out, layout).astype(np.float64), added)


def reference(matrix: Stored, x: NDArray[Any]) -> Floats:
    y: Floats = x.astype(np.float64) @ matrix.weights.T
    return y if matrix.bias is None else y + matrix.bias


def precision(activations: str, dtype: str, tokens: int) -> float:
    """The entry of STEPS that a product takes."""
    if dtype in ELEMENT_BYTES:
        return STEPS["f32"]
    if activations == "auto":
        return STEPS["int16" if tokens <= both_planes(dtype, "auto") else "int8"]
    return STEPS[activations]


def bound(matrix: Stored, x: NDArray[np.float32], steps: float, group: int) -> Floats:
    """How far [T, N] results may be off: rounded activations, and f32 sums of K terms in some order."""
    weights, wide = np.abs(matrix.weights), np.abs(x.astype(np.float64))
    tops = np.concatenate(
        [np.broadcast_to(wide[:, c : c + group].max(1, keepdims=True), wide[:, c : c + group].shape)
         for c in range(0, wide.shape[1], group)], axis=1,
    )  # fmt: skip
    added = 0 if matrix.bias is None else np.abs(matrix.bias)
    sums = wide @ weights.T + added
    result: Floats = 1.01 * tops @ weights.T / steps + (2e-7 * np.sqrt(x.shape[1]) + 3e-7) * sums + 1e-30
    return result


def run(
    kernel: MatrixKernel, matrices: Sequence[Stored], x: NDArray[np.float32], team: ThreadTeam, gap: int = 0
) -> list[NDArray[np.float32]]:
    """Results in rows that are `gap` elements apart; what is between them has to stay untouched."""
    rooms = [np.full((len(x), len(m.weights) + gap), -7, np.float32) for m in matrices]
    outs = [room[:, : len(m.weights)] for room, m in zip(rooms, matrices, strict=True)]
    kernel([m.entry() for m in matrices], x, outs, team)
    for room, m in zip(rooms, matrices, strict=True):
        assert np.all(room[:, len(m.weights) :] == -7)
    return outs
