"""A layer's experts as one job for the thread team: what all weight layouts have in common.

First phase: jobs are (expert, block of intermediate outputs). A thread takes the next number from
a shared counter, so that a core that is slower, or woke late, simply does fewer. It computes
act(gate x, up x) for all rows of the expert, while the block's weights come from memory once.
Second phase, after all first jobs are done (jobs are counted, not threads: a late thread holds
nobody up): jobs are stripes of output columns. The owner of a stripe adds every expert's rows in
ascending order, so nothing is atomic and the bits do not depend on who computed what.

H = hidden, I = intermediate, A active experts, R rows (a token with one of its experts).
"""

from collections.abc import Callable
from typing import Any

from moe_offload.cpu_kernels import block as word
from moe_offload.cpu_kernels.atomics import fetch_add, wait_for_count
from moe_offload.cpu_kernels.jit import native, specialised
from moe_offload.cpu_kernels.memory import (
    add_elements,
    add_scaled,
    element_bytes,
    load_f32,
    load_i32,
    load_i64,
)


@native
def expert_record(args: int, entry: int) -> int:
    """Address of the table's row for the expert at this position of the groups."""
    expert = load_i32(load_i64(args + word.EXPERTS) + 4 * entry)
    return load_i64(args + word.TABLE) + 48 * expert  # type: ignore[no-any-return]


def make_layer_job(key: str, middle: Any, matrix: Any, size: int, transposed: bool) -> Callable[[int, int], None]:
    """The job `(thread, args)`, to be compiled as "void(int64,int64)" under the name `key`.

    middle(args, record, start, count, begin, tokens, local): intermediate outputs start to
        start + count of `tokens` rows from `begin` on, stored where MIDDLES says.
    matrix(weights, stride, width, xs, tokens, depth, to, step): the layout's product, dense.
    """

    @specialised(key)
    def first(args: int, local: int, entry: int, start: int, count: int) -> None:
        record = expert_record(args, entry)
        chunk = load_i64(args + word.CHUNK)
        offsets = load_i64(args + word.OFFSETS) + 8 * entry
        begin, end = load_i64(offsets), load_i64(offsets + 8)
        while begin < end:
            tokens = min(chunk, end - begin)
            middle(args, record, start, count, begin, tokens, local)
            begin += tokens

    @specialised(key)
    def second(args: int, local: int, start: int, count: int) -> None:
        """Output columns start to start + count of every token: all experts, ascending."""
        intermediate, hidden = load_i64(args + word.INTERMEDIATE), load_i64(args + word.HIDDEN)
        chunk, code = load_i64(args + word.CHUNK), load_i64(args + word.BIAS_CODE)
        middles, out = load_i64(args + word.MIDDLES), load_i64(args + word.OUT)
        tokens_at, weights_at = load_i64(args + word.TOKENS), load_i64(args + word.WEIGHTS)
        stride = (hidden if transposed else intermediate) * size
        at = start * size if transposed else start * stride
        for entry in range(load_i64(args + word.ACTIVE)):
            record = expert_record(args, entry)
            down, down_bias = load_i64(record + 16) + at, load_i64(record + 40)
            offsets = load_i64(args + word.OFFSETS) + 8 * entry
            begin, end = load_i64(offsets), load_i64(offsets + 8)
            while begin < end:
                tokens = min(chunk, end - begin)
                xs = middles + 8 * begin
                matrix(down, stride, count, xs, tokens, intermediate, local, 4 * count)
                for t in range(tokens):
                    y = local + 4 * count * t
                    if down_bias != 0:
                        bias = down_bias + start * element_bytes(code)
                        add_elements(y, 1, count, bias, 1, code)
                    token = load_i32(tokens_at + 4 * (begin + t))
                    weight = load_f32(weights_at + 4 * (begin + t))
                    add_scaled(out + 4 * (token * hidden + start), count, y, weight)
                begin += tokens

    def run(thread: int, args: int) -> None:
        local = load_i64(args + word.LOCAL) + thread * load_i64(args + word.LOCAL_BYTES)
        width, block = load_i64(args + word.INTERMEDIATE), load_i64(args + word.FIRST_BLOCK)
        blocks = (width + block - 1) // block
        jobs = load_i64(args + word.ACTIVE) * blocks
        while True:
            job = fetch_add(args + word.NEXT_FIRST, 1)
            if job >= jobs:
                break
            entry = job // blocks
            start = (job - entry * blocks) * block
            first(args, local, entry, start, min(block, width - start))
            fetch_add(args + word.DONE_FIRST, 1)
        wait_for_count(args + word.DONE_FIRST, jobs)
        width, block = load_i64(args + word.HIDDEN), load_i64(args + word.SECOND_BLOCK)
        jobs = (width + block - 1) // block
        while True:
            start = fetch_add(args + word.NEXT_SECOND, 1) * block
            if start >= width:
                break
            second(args, local, start, min(block, width - start))
            fetch_add(args + word.DONE_SECOND, 1)
        wait_for_count(args + word.DONE_SECOND, jobs)

    return run


@native
def add_gate_up_bias(args: int, record: int, start: int, count: int, gate: int, up: int, step: int) -> None:
    """Add the biases (if any) of outputs start to start + count to one token's gates and ups.

    gate may be 0: the expert has none. `step` counts f32 between neighbouring gates (ups).
    """
    bias_step, code = load_i64(args + word.BIAS_STEP), load_i64(args + word.BIAS_CODE)
    gate_bias, up_bias = load_i64(record + 24), load_i64(record + 32)
    at = start * bias_step * element_bytes(code)
    if gate != 0 and gate_bias != 0:
        add_elements(gate, step, count, gate_bias + at, bias_step, code)
    if up_bias != 0:
        add_elements(up, step, count, up_bias + at, bias_step, code)
