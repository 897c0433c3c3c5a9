"""What happens between the matrices of a network, as stages of a chain (cpu_kernels/stages.py): token by token.

    activate   y = silu(gate) * up, or silu(gate) alone
    look       scores of routers that choose by a bounded function of their logits; and what came before each token
    finish     scores become probabilities: p = sigmoid(slope * margin + shift), as predictor/network.py defines it

All arrays are f32 rows, a fixed number of bytes apart.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.attention_softmax import LOG2E, exp2
from moe_offload.cpu_kernels.emit import F32, I32, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.memory import clear, load_f32, load_i64, store_f32
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.vector_ops import add_scaled, add_vector, copy_vector
from moe_offload.predictor.compiling import stage_job
from moe_offload.predictor.network import DECAY
from moe_offload.predictor.trace import DISTANCES, SHARPNESS

LINE = 64
COUNTERS = 2
_NEXT, _DONE = 0, LINE
TOKENS = COUNTERS * LINE

# activate
GATE, UP, STEP, UNITS, OUT, OUT_STEP = range(TOKENS + 8, TOKENS + 7 * 8, 8)  # UP 0: none
# look
(
    INPUTS,  # rows that begin with the logits
    INPUTS_STEP,
    EXPERTS_OF_LOOK,  # E
    SELECT,  # LINEAR, SIGMOID or SOFTMAX
    SELECTION,  # [D, E] added to what is bounded
    PROJECTED,  # P
    STATE,  # bytes from a row's begin to the token's state [P]; what came before it is to lie behind
    LENGTH,  # tokens of each sequence, one behind the other
    KEEP,  # [sequences, P] what came before the first and, afterwards, before the next token; 0: nothing is known
) = range(TOKENS + 8, TOKENS + 10 * 8, 8)
LINEAR, SIGMOID, SOFTMAX = range(3)
# finish
(
    SCORES,  # [T, D, E]; what it is made of is added to it:
    SCORES_STEP,
    LOOK,  # [T, D, E] where there are no units, else 0
    LOOK_STEP,
    BIAS,  # [D, E]
    EXPERTS,
    CHOICES,  # K
    SLOPE,  # [2, D]: without and with knowledge of the token before
    SHIFT,
    KNOWN,  # int64 [T]
    PROBABILITIES,  # [T, D, E], dense
    TOP,  # f32 [T, K + 1] to work in
) = range(TOKENS + 8, TOKENS + 13 * 8, 8)
BYTES = (TOKENS + 13 * 8 + LINE - 1) // LINE * LINE

_silu_gated = make_activate("silu", True, 1, current_target().lanes)
_silu = make_activate("silu", False, 1, current_target().lanes)


def _sigmoid(em: Emitter, target: Value, count: Value, source: Value, slope: Value, shift: Value) -> None:
    lanes = em.target.lanes
    kind = vector(F32, lanes)
    zero, one = em.const(kind, 0.0), em.const(kind, 1.0)

    def value(x: Value) -> Value:
        x = em.fma(x, em.splat(slope, kind), em.splat(shift, kind))
        positive = em.b.fcmp_ordered(">", x, zero)
        e = exp2(em, em.b.fmul(em.b.select(positive, em.b.fneg(x), x), em.const(kind, LOG2E)))
        return em.b.fdiv(em.b.select(positive, one, e), em.b.fadd(one, e))

    def vectors(i: Value, _: list[Value]) -> list[Value]:
        at = em.mul(i, 4)
        em.store(value(em.load(kind, em.add(source, at))), em.add(target, at))
        return []

    def rest(i: Value, _: list[Value]) -> list[Value]:
        at = em.mul(i, 4)
        found = value(em.splat(em.load(F32, em.add(source, at)), kind))
        em.store(em.b.extract_element(found, em.const(I32, 0)), em.add(target, at))
        return []

    whole = em.floor_to(count, lanes)
    em.loop(0, whole, lanes, [], vectors)
    em.loop(whole, count, 1, [], rest)


# target[i] = sigmoid(slope * source[i] + shift)
sigmoid = micro_kernel("sigmoid", "iiiff:v", _sigmoid)


@native
def middle(scores: int, experts: int, choices: int, top: int) -> float:
    """Between the K-th largest of f32 scores and the next; K < E. top: room for K + 1 values."""
    kept = 0
    for e in range(experts):
        value = load_f32(scores + 4 * e)
        if kept > choices:
            if not value > load_f32(top + 4 * choices):
                continue
        else:
            kept += 1
        at = kept - 1
        while at > 0 and value > load_f32(top + 4 * (at - 1)):
            store_f32(load_f32(top + 4 * (at - 1)), top + 4 * at)
            at -= 1
        store_f32(value, top + 4 * at)
    return (load_f32(top + 4 * (choices - 1)) + load_f32(top + 4 * choices)) / 2  # type: ignore[no-any-return]


@native
def _activate_token(args: int, t: int) -> None:
    gate, up = load_i64(args + GATE), load_i64(args + UP)
    at, units = load_i64(args + STEP) * t, load_i64(args + UNITS)
    out = load_i64(args + OUT) + load_i64(args + OUT_STEP) * t
    if up != 0:
        _silu_gated(gate + at, up + at, out, units, 0.0, 0.0)
    else:
        _silu(gate + at, gate + at, out, units, 0.0, 0.0)


@native
def _softmax(at: int, count: int) -> None:
    largest = load_f32(at)
    for i in range(1, count):
        largest = max(largest, load_f32(at + 4 * i))
    total = 0.0
    for i in range(count):
        value = math.exp(load_f32(at + 4 * i) - largest)
        total += value
        store_f32(np.float32(value), at + 4 * i)
    for i in range(count):
        store_f32(np.float32(load_f32(at + 4 * i) / total), at + 4 * i)


@native
def _look_token(args: int, t: int) -> None:
    row, experts = load_i64(args + INPUTS) + load_i64(args + INPUTS_STEP) * t, load_i64(args + EXPERTS_OF_LOOK)
    count = DISTANCES * experts
    if load_i64(args + SELECT) == SIGMOID:
        sigmoid(row, count, row, 1.0, 0.0)
    else:
        for d in range(DISTANCES):
            _softmax(row + 4 * experts * d, experts)
    add_vector(row, count, load_i64(args + SELECTION))
    for i in range(count):
        store_f32(load_f32(row + 4 * i) * SHARPNESS, row + 4 * i)


@native
def _remember(args: int) -> None:
    """One token after the other, since each adds to what the next one gets."""
    tokens, projected, length = load_i64(args + TOKENS), load_i64(args + PROJECTED), load_i64(args + LENGTH)
    keep = load_i64(args + KEEP)
    for t in range(tokens):
        state = load_i64(args + INPUTS) + load_i64(args + INPUTS_STEP) * t + load_i64(args + STATE)
        if keep == 0:
            clear(state + 4 * projected, projected)
        else:
            recent = keep + 4 * projected * (t // length)
            copy_vector(state + 4 * projected, projected, recent)
            add_scaled(recent, projected, recent, np.float32(DECAY - 1))
            add_scaled(recent, projected, state, np.float32(1 - DECAY))


@native
def _finish_token(args: int, t: int) -> None:
    experts, choices = load_i64(args + EXPERTS), load_i64(args + CHOICES)
    scores, size = load_i64(args + SCORES) + load_i64(args + SCORES_STEP) * t, DISTANCES * experts
    look = load_i64(args + LOOK)
    if look != 0:
        copy_vector(scores, size, look + load_i64(args + LOOK_STEP) * t)
    add_vector(scores, size, load_i64(args + BIAS))
    top = load_i64(args + TOP) + 4 * (choices + 1) * t
    first = 4 * DISTANCES * load_i64(load_i64(args + KNOWN) + 8 * t)
    for d in range(DISTANCES):
        slope, shift = (
            load_f32(load_i64(args + SLOPE) + first + 4 * d),
            load_f32(load_i64(args + SHIFT) + first + 4 * d),
        )
        at, out = scores + 4 * experts * d, load_i64(args + PROBABILITIES) + 4 * (size * t + experts * d)
        if choices < experts:
            sigmoid(out, experts, at, slope, shift - slope * middle(at, experts, choices, top))
        else:
            for e in range(experts):
                store_f32(1.0, out + 4 * e)


def _activate(thread: int, args: int) -> None:
    tokens = load_i64(args + TOKENS)
    while True:
        token = fetch_add(args + _NEXT, 1)
        if token >= tokens:
            break
        _activate_token(args, token)
        fetch_add(args + _DONE, 1)
    wait_for_count(args + _DONE, tokens)


def _look(thread: int, args: int) -> None:
    jobs = 1 + (load_i64(args + TOKENS) if load_i64(args + SELECT) != LINEAR else 0)
    while True:
        job = fetch_add(args + _NEXT, 1)
        if job >= jobs:
            break
        if job > 0:
            _look_token(args, job - 1)
        elif load_i64(args + PROJECTED) > 0:
            _remember(args)
        fetch_add(args + _DONE, 1)
    wait_for_count(args + _DONE, jobs)


def _finish(thread: int, args: int) -> None:
    tokens = load_i64(args + TOKENS)
    while True:
        token = fetch_add(args + _NEXT, 1)
        if token >= tokens:
            break
        _finish_token(args, token)
        fetch_add(args + _DONE, 1)
    wait_for_count(args + _DONE, tokens)


@cache
def activate_job() -> Any:
    """The compiled job."""
    return stage_job(_activate, "predictor-activate")


@cache
def look_job() -> Any:
    """The compiled job."""
    return stage_job(_look, "predictor-look")


@cache
def finish_job() -> Any:
    """The compiled job."""
    return stage_job(_finish, "predictor-finish")
