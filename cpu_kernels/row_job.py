"""Experts in row-major layout: a weight row is an output, and lies in memory in one piece."""

from collections.abc import Callable
from typing import Any

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.dot import make_dot
from moe_offload.cpu_kernels.jit import specialised
from moe_offload.cpu_kernels.layer_job import add_gate_up_bias, make_layer_job
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, ActivationKind, WeightType
from moe_offload.cpu_kernels.memory import load_f32, load_i64
from moe_offload.cpu_kernels.target import Target


def _most_tokens(target: Target) -> int:
    """4 rows x 4 tokens of sums, 4 weights and an input take 21 registers, x 2 tokens 13."""
    return 4 if target.registers >= 32 else 2


def make_tiles(key: str, dtype: WeightType, target: Target) -> tuple[Any, Any]:
    """Dot products of four weight rows, or of one, with any number of tokens."""
    lanes = target.lanes
    most = _most_tokens(target)
    dot_most, dot2, dot1 = (make_dot(dtype, 4, tokens, lanes) for tokens in (most, 2, 1))
    dot_single = make_dot(dtype, 1, 1, lanes)

    @specialised(key)
    def four(
        a: int,
        b: int,
        gap: int,
        xs: int,
        tokens: int,
        depth: int,
        to_a: int,
        to_b: int,
        to_gap: int,
        step_a: int,
        step_b: int,
    ) -> None:
        t = 0
        while tokens - t >= most:
            at_a, at_b = to_a + t * step_a, to_b + t * step_b
            dot_most(a, b, gap, xs + 8 * t, depth, at_a, at_b, to_gap, step_a, step_b)
            t += most
        while tokens - t >= 2:
            at_a, at_b = to_a + t * step_a, to_b + t * step_b
            dot2(a, b, gap, xs + 8 * t, depth, at_a, at_b, to_gap, step_a, step_b)
            t += 2
        if tokens - t >= 1:
            at_a, at_b = to_a + t * step_a, to_b + t * step_b
            dot1(a, b, gap, xs + 8 * t, depth, at_a, at_b, to_gap, step_a, step_b)

    @specialised(key)
    def one(row: int, xs: int, tokens: int, depth: int, to: int, step: int) -> None:
        """Only for what is left of an odd number of rows: not worth tiles of its own."""
        for t in range(tokens):
            dot_single(row, 0, 0, xs + 8 * t, depth, to + t * step, 0, 0, 0, 0)

    return four, one


def make_matrix(key: str, four: Any, one: Any) -> Any:
    """(weights, stride, rows, xs, tokens, depth, to, step): to[t][r] = weights[r] . x[t], in four streams."""

    @specialised(key)
    def matrix(weights: int, stride: int, rows: int, xs: int, tokens: int, depth: int, to: int, step: int) -> None:
        quarter = rows // 4
        gap = quarter * stride
        for r in range(quarter):
            a = weights + r * stride
            b = a + 2 * gap
            to_a = to + 4 * r
            to_b = to_a + 8 * quarter
            four(a, b, gap, xs, tokens, depth, to_a, to_b, 4 * quarter, step, step)
        for r in range(4 * quarter, rows):
            one(weights + r * stride, xs, tokens, depth, to + 4 * r, step)

    return matrix


def make_row_job(
    key: str, dtype: WeightType, gated: bool, kind: ActivationKind, target: Target
) -> Callable[[int, int], None]:
    """The job function `(thread, args)`; `key` names this specialisation."""
    size = ELEMENT_BYTES[dtype]
    four, one = make_tiles(key, dtype, target)
    matrix = make_matrix(key, four, one)
    activate = make_activate(kind, gated, 1, target.lanes)

    @specialised(key)
    def two_matrices(
        gate: int,
        up: int,
        stride: int,
        rows: int,
        xs: int,
        tokens: int,
        depth: int,
        to_gate: int,
        to_up: int,
        step_gate: int,
        step_up: int,
    ) -> None:
        """Likewise for gate and up together: two streams in each."""
        half = rows // 2
        gap = half * stride
        for r in range(half):
            a, b = gate + r * stride, up + r * stride
            to_a, to_b = to_gate + 4 * r, to_up + 4 * r
            four(a, b, gap, xs, tokens, depth, to_a, to_b, 4 * half, step_gate, step_up)
        for r in range(2 * half, rows):
            one(gate + r * stride, xs, tokens, depth, to_gate + 4 * r, step_gate)
            one(up + r * stride, xs, tokens, depth, to_up + 4 * r, step_up)

    @specialised(key)
    def middle(args: int, record: int, start: int, count: int, begin: int, tokens: int, local: int) -> None:
        hidden, stride = load_i64(args + word.HIDDEN), load_i64(args + word.ROW_STRIDE)
        alpha, limit = load_f32(args + word.ALPHA), load_f32(args + word.LIMIT)
        step = load_i64(args + word.MIDDLE_BYTES)
        xs = load_i64(args + word.INPUTS) + 8 * begin
        h = load_i64(load_i64(args + word.MIDDLES) + 8 * begin) + 4 * start
        gate, up = load_i64(record) + start * stride, load_i64(record + 8) + start * stride
        # gates are written where the result goes, ups beside them
        if gated:
            two_matrices(
                gate, up, stride, count, xs, tokens, hidden, h, local, step, 4 * count
            )  # fmt: skip
        else:
            matrix(up, stride, count, xs, tokens, hidden, h, step)
        for t in range(tokens):
            g = h + t * step
            u = local + t * 4 * count if gated else g
            add_gate_up_bias(args, record, start, count, g if gated else 0, u, 1)
            activate(g, u, g, count, alpha, limit)

    return make_layer_job(key, middle, matrix, size, transposed=False)
