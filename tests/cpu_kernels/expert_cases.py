"""Experts with random weights in any layout, and what they compute in float64."""

from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import Activation, ExpertKernel, ExpertLayout, Groups, ThreadTeam

Floats = NDArray[np.float64]


def encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Stored elements of a type; bf16 as its bits, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "f32":
        return values
    if dtype == "f16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: NDArray[Any]) -> Floats:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def activate(activation: Activation, gate: Floats | None, up: Floats) -> Floats:
    """transformers' formulas in float64."""
    kind, alpha, limit = activation.kind, activation.alpha, activation.limit
    if gate is None:
        return activate(activation, up, np.ones_like(up))
    with np.errstate(all="ignore"):
        if kind in ("swiglu_oai", "silu_clamp"):
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            scale = alpha if kind == "swiglu_oai" else 1.0
            bump = 1.0 if kind == "swiglu_oai" else 0.0
            return (up + bump) * gate * _sigmoid(scale * gate)
        if kind == "silu_cap":
            return np.minimum(gate * _sigmoid(gate), limit) * np.clip(up, -limit, limit)
        if kind == "silu_softcap":
            soft_gate, soft_up = alpha * np.tanh(gate / alpha), limit * np.tanh(up / limit)
            return soft_gate * _sigmoid(gate) * soft_up
        single = {
            "silu": lambda x: x * _sigmoid(x),
            "gelu": lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2))),
            "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
            "gelu_quick": lambda x: x * _sigmoid(alpha * x),
            "relu": lambda x: np.maximum(x, 0),
            "relu2": lambda x: np.maximum(x, 0) ** 2,
        }
        result: Floats = single[kind](gate) * up
        return result


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


@dataclass
class Experts:
    """E experts laid out in memory as `layout` says, `shift` bytes off alignment."""

    layout: ExpertLayout
    activation: Activation
    table: NDArray[np.int64]
    gate: Floats  # [E, I, H], zeros without a gate
    up: Floats  # [E, I, H]
    down: Floats  # [E, H, I]
    biases: tuple[Floats, Floats, Floats]  # [E, I], [E, I], [E, H]
    memory: list[NDArray[np.uint8]]

    def reference(self, index: NDArray[np.int64], weight: NDArray[np.float32], hidden: NDArray[np.float32]) -> Floats:
        out = np.zeros(hidden.shape, np.float64)
        for t, k in np.ndindex(index.shape):
            e = index[t, k]
            if not 0 <= e < len(self.table):
                continue
            x = hidden[t].astype(np.float64)
            up = self.up[e] @ x + self.biases[1][e]
            gate = self.gate[e] @ x + self.biases[0][e] if self.layout.gated else None
            y = self.down[e] @ activate(self.activation, gate, up) + self.biases[2][e]
            out[t] += float(weight[t, k]) * y
        return out


def make_experts(
    layout: ExpertLayout,
    activation: Activation,
    count: int = 6,
    shift: int = 0,
    seed: int = 0,
) -> Experts:
    """Fused gate and up where the layout's stride leaves room for them, else apart."""
    rng = np.random.default_rng(seed)
    hidden, inner = layout.hidden_size, layout.intermediate_size
    memory: list[NDArray[np.uint8]] = []

    def place(stored: NDArray[Any]) -> int:
        room = np.zeros(stored.nbytes + 64 + shift, np.uint8)
        start = -room.ctypes.data % 64 + shift
        room[start : start + stored.nbytes] = np.frombuffer(stored.tobytes(), np.uint8)
        memory.append(room)
        return int(room.ctypes.data) + start

    def draw(*shape: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        return values

    table = np.zeros((count, 6), np.int64)
    gates, ups, downs = np.zeros((count, inner, hidden)), [], []
    biases = [np.zeros((count, inner)), np.zeros((count, inner)), np.zeros((count, hidden))]
    for e in range(count):
        gate, up = (encode(draw(inner, hidden), layout.dtype) for _ in range(2))
        down = encode(draw(hidden, inner), layout.dtype)
        gates[e] = decode(gate)
        ups.append(decode(up))
        downs.append(decode(down))
        table[e, 2] = place(down.T.copy() if layout.transposed else down)
        size = up.itemsize
        if not layout.gated:
            table[e, 1] = place(_with_stride(up.T if layout.transposed else up, layout))
        elif layout.gate_up_step == 2:  # gpt-oss: columns gate 0, up 0, gate 1, up 1, ...
            both = np.empty((hidden, 2 * inner), up.dtype)
            both[:, 0::2], both[:, 1::2] = gate.T, up.T
            table[e, 0] = place(both)
            table[e, 1] = table[e, 0] + size
        elif layout.transposed and layout.gate_up_stride == 2 * inner:
            table[e, 0] = place(np.concatenate([gate.T, up.T], axis=1))
            table[e, 1] = table[e, 0] + inner * size
        elif not layout.transposed and layout.gate_up_stride == 2 * hidden:  # rows alternate
            both = np.empty((2 * inner, hidden), up.dtype)
            both[0::2], both[1::2] = gate, up
            table[e, 0] = place(both)
            table[e, 1] = table[e, 0] + hidden * size
        else:
            for column, matrix in enumerate((gate, up)):
                rows = matrix.T if layout.transposed else matrix
                table[e, column] = place(_with_stride(rows, layout))
        if layout.bias:
            stored = [encode(draw(n), layout.bias_type) for n in (inner, inner, hidden)]
            for matrix, values in zip(biases, stored, strict=True):
                matrix[e] = decode(values)
            table[e, 5] = place(stored[2])
            if layout.bias_step == 2:
                both_biases = np.stack(stored[:2], axis=1)
                table[e, 3] = place(both_biases)
                table[e, 4] = table[e, 3] + both_biases.itemsize
            else:
                table[e, 3], table[e, 4] = place(stored[0]), place(stored[1])
            if not layout.gated:
                table[e, 3] = 0
    if not layout.gated:
        gates[:] = 0
    return Experts(
        layout,
        activation,
        table,
        gates,
        np.array(ups),
        np.array(downs),
        (biases[0], biases[1], biases[2]),
        memory,
    )


def _with_stride(rows: NDArray[Any], layout: ExpertLayout) -> NDArray[Any]:
    wide = np.zeros((len(rows), layout.row_stride), rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide


def route(tokens: int, choices: int, experts: int, seed: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    index = np.array([rng.permutation(experts)[:choices] for _ in range(tokens)], np.int64)
    weight = rng.random((tokens, choices), np.float32) + np.float32(0.1)
    return index.reshape(tokens, choices), weight


def run(
    kernel: ExpertKernel,
    experts: Experts,
    groups: Groups,
    hidden: NDArray[np.float32],
    team: ThreadTeam,
) -> NDArray[np.float32]:
    out = np.zeros_like(hidden)
    kernel(experts.table, groups, hidden, out, team)
    return out


def tolerance(reference: Floats) -> float:
    """f32 accumulation: a dot of n products errs by about sqrt(n) * 2^-24 of its terms' size.

    With n <= a few hundred that is 1e-6 of the output's scale; the factor left covers erf's and
    exp's 2e-7 and the second product. A wrong element or a weight read as bf16 instead of f32
    errs by 1e-3 and more.
    """
    return 1e-5 * max(1.0, float(np.abs(reference).max(initial=0.0)))
