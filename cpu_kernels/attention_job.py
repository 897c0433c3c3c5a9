"""Decode attention as one job for the thread team.

A job is (sequence, KV head, chunk of its visible positions). A thread takes the next run of jobs
from a shared counter (neighbours in memory, so that what is read ahead at a chunk's end is not
lost), computes the softmax over each chunk block by block, and leaves the unfinished outputs,
greatest scores and sums in the job's slot. Whoever finishes the last chunk of a KV head
puts its chunks together in ascending order: no second phase, no thread is waited for by number.
Where chunks begin depends on the sequence alone, so the bits of a result depend neither on the
number of threads nor on who did what.
"""

from collections.abc import Callable
from itertools import accumulate

from moe_offload.cpu_kernels import attention_block as word
from moe_offload.cpu_kernels.atomics import exchange, fetch_add, wait_for_count
from moe_offload.cpu_kernels.attention_block import BLOCK, LEAST_CHUNK, MOST_CHUNKS, JobShape
from moe_offload.cpu_kernels.attention_memory import make_ask, make_copy, make_set
from moe_offload.cpu_kernels.attention_softmax import LEAST, LOG2E, make_softmax, make_weigh
from moe_offload.cpu_kernels.attention_tile import make_prepare, make_scores
from moe_offload.cpu_kernels.attention_values import make_mix, make_values
from moe_offload.cpu_kernels.jit import native, specialised
from moe_offload.cpu_kernels.memory import load_f32, load_i64, store_f32
from moe_offload.cpu_kernels.target import Target

RUNS_PER_THREAD = 8


@native
def _first_position(args: int, sequence: int) -> int:
    """The first position that the query of a sequence sees."""
    first = 0
    if load_i64(args + word.STARTS) != 0:
        first = load_i64(load_i64(args + word.STARTS) + 8 * sequence)
    window = load_i64(args + word.WINDOW)
    if window > 0:
        first = max(first, load_i64(load_i64(args + word.LENGTHS) + 8 * sequence) - window)
    return first


@native
def _visible(args: int, sequence: int) -> int:
    """How many positions it sees."""
    length = load_i64(load_i64(args + word.LENGTHS) + 8 * sequence)
    return max(0, length - _first_position(args, sequence))  # type: ignore[no-any-return]


@native
def _chunk_positions(visible: int) -> int:
    even = (visible + MOST_CHUNKS - 1) // MOST_CHUNKS
    return max(LEAST_CHUNK, (even + BLOCK - 1) // BLOCK * BLOCK)


@native
def _chunks(args: int, sequence: int) -> int:
    """At least one: somebody has to write the zeros of a sequence that sees nothing."""
    visible = _visible(args, sequence)
    positions = _chunk_positions(visible)
    return max(1, (visible + positions - 1) // positions)  # type: ignore[no-any-return]


def make_attention_job(key: str, shape: JobShape, target: Target) -> Callable[[int, int], None]:
    """The job `(thread, args)`, to be compiled as "void(int64,int64)" under the name `key`."""
    keys, values, lanes = shape.keys, shape.values, target.lanes
    queries, groups, group, wide = shape.queries, shape.groups, shape.group, shape.wide
    scaled = keys.dtype == "int8"
    prepare_query = make_prepare(keys, shape.pair_scores)
    scores_of = make_scores(keys, wide, shape.pair_scores, values, target)
    softmax = make_softmax(wide, lanes, scaled, shape.pair_values)
    add_values = make_values(values, group, wide, shape.pair_values, keys, target)
    weigh = make_weigh(wide, lanes)
    mix = make_mix(values, 4 * shape.state_lanes)
    ask, fill, copy = make_ask(keys), make_set(lanes), make_copy(lanes)
    depth, width, row_bytes = keys.width, values.width, values.float_bytes
    query_bytes, output_bytes = shape.query_bytes, shape.output_bytes
    state_lanes, state_bytes = shape.state_lanes, shape.state_bytes
    slot_bytes, local_bytes = shape.slot_bytes, shape.local_bytes
    at_scores, at_key_scales, at_value_scales, at_corrections, at_sinks, at_weights, _ = accumulate(shape.local_parts)

    @specialised(key)
    def prepare(args: int, local: int, slot: int, sequence: int, head: int) -> None:
        """Bring the queries of a KV head into the order of its keys, and empty the slot."""
        number = sequence * load_i64(args + word.KV_HEADS) + head
        source = load_i64(args + word.QUERIES) + 4 * depth * queries * number
        for g in range(groups):
            there = min(group, queries - g * group)
            to = local + g * wide * query_bytes
            for r in range(there):
                prepare_query(source + 4 * depth * (g * group + r), to + r * query_bytes)
            fill(to + there * query_bytes, (wide - there) * query_bytes // 4, 0.0)
            state = slot + output_bytes + g * state_bytes
            fill(state, state_lanes, LEAST)
            fill(state + 4 * state_lanes, state_lanes, 0.0)
        fill(slot, output_bytes // 4, 0.0)

    @specialised(key)
    def attend(
        args: int, local: int, slot: int, sequence: int, head: int, begin: int, end: int, follows: bool, goes_on: bool
    ) -> None:
        """The chunk of positions begin to end; `follows`, `goes_on`: this thread did the one before, does the next."""
        k_step, v_step = load_i64(args + word.KEY_POSITION), load_i64(args + word.VALUE_POSITION)
        k = load_i64(args + word.KEYS) + begin * k_step
        k += sequence * load_i64(args + word.KEY_BATCH) + head * load_i64(args + word.KEY_HEAD)
        v = load_i64(args + word.VALUES) + begin * v_step
        v += sequence * load_i64(args + word.VALUE_BATCH) + head * load_i64(args + word.VALUE_HEAD)
        at_scale = 4 * begin + sequence * load_i64(args + word.SCALE_BATCH) + head * load_i64(args + word.SCALE_HEAD)
        factor = load_f32(args + word.FACTOR)
        if not follows:
            ask(k, k_step, min(BLOCK, end - begin))
        prepare(args, local, slot, sequence, head)
        while begin < end:
            n = min(BLOCK, end - begin)
            following = k + n * k_step if begin + n < end or goes_on else k
            if scaled:
                copy(load_i64(args + word.KEY_SCALES) + at_scale, local + at_key_scales, n)
                copy(load_i64(args + word.VALUE_SCALES) + at_scale, local + at_value_scales, n)
            for g in range(groups):
                prepared = local + g * wide * query_bytes
                state = slot + output_bytes + g * state_bytes
                scores, corrections = local + at_scores, local + at_corrections
                scores_of(prepared, k, k_step, n, factor, local + at_key_scales, scores, v, v_step)
                softmax(scores, n, state, corrections, local + at_value_scales)
                outputs = slot + g * group * row_bytes
                add_values(scores, v, v_step, n, outputs, corrections, following, k_step)
            begin += n
            k, v, at_scale = k + n * k_step, v + n * v_step, at_scale + 4 * n

    @specialised(key)
    def combine(args: int, local: int, slot: int, sequence: int, head: int, chunks: int) -> None:
        """Outputs of a KV head's queries from its chunks, whose slots follow each other."""
        out = load_i64(args + word.OUT) + 4 * width * queries * (sequence * load_i64(args + word.KV_HEADS) + head)
        sinks = load_i64(args + word.SINKS)
        weights = local + at_weights
        for g in range(groups):
            there = min(group, queries - g * group)
            for i in range(state_lanes):
                sink = LEAST
                if sinks != 0 and i % wide < there:
                    sink = max(LEAST, LOG2E * load_f32(sinks + 4 * (head * queries + g * group + i % wide)))
                store_f32(sink, local + at_sinks + 4 * i)
            weigh(slot + output_bytes + g * state_bytes, slot_bytes, chunks, local + at_sinks, weights)
            for r in range(there):
                query = g * group + r
                parts = slot + query * row_bytes
                mix(parts, slot_bytes, chunks, weights + 4 * r, out + 4 * width * query)

    def run(thread: int, args: int) -> None:
        local = load_i64(args + word.LOCAL) + thread * local_bytes
        slots, counters = load_i64(args + word.SLOTS), load_i64(args + word.COUNTERS)
        kv_heads = load_i64(args + word.KV_HEADS)
        jobs = 0
        for sequence in range(load_i64(args + word.BATCH)):
            jobs += kv_heads * _chunks(args, sequence)
        sequence, before = 0, 0  # the sequence of this thread's last job, and the jobs before it
        chunks = _chunks(args, sequence) if jobs > 0 else 1
        run = max(1, jobs // (RUNS_PER_THREAD * load_i64(args + word.THREADS)))
        while True:
            start = run * fetch_add(args + word.NEXT, 1)
            if start >= jobs:
                break
            stop = min(jobs, start + run)
            for job in range(start, stop):
                while job >= before + kv_heads * chunks:
                    before += kv_heads * chunks
                    sequence += 1
                    chunks = _chunks(args, sequence)
                head = (job - before) // chunks
                chunk = job - before - head * chunks
                visible = _visible(args, sequence)
                positions = _chunk_positions(visible)
                first = _first_position(args, sequence)
                begin, end = first + chunk * positions, first + min(visible, (chunk + 1) * positions)
                follows, goes_on = chunk > 0 and job > start, chunk + 1 < chunks and job + 1 < stop
                attend(args, local, slots + job * slot_bytes, sequence, head, begin, end, follows, goes_on)
                counter = counters + 8 * (sequence * kv_heads + head)
                if fetch_add(counter, 1) == chunks - 1:
                    exchange(counter, 0)  # ready for the next launch of the same block
                    combine(args, local, slots + (job - chunk) * slot_bytes, sequence, head, chunks)
                fetch_add(args + word.DONE, 1)
        wait_for_count(args + word.DONE, jobs)

    return run
