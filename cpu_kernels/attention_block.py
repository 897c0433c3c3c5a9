"""What a decode attention is compiled for, and the memory that its job works in.

The argument block begins with its fields (offsets below, in bytes). The counters that threads race
for lie on cache lines of their own; whoever launches a prepared block again sets both to zero
before. Behind the fields lie, in this order, one counter for each (sequence, KV head), each
thread's own memory, and a slot for each job's result.
"""

from dataclasses import dataclass

from moe_offload.cpu_kernels.attention_rows import Rows

LINE = 64
BLOCK = 64  # positions between two looks at the greatest score: a block's K and V stay in L2
TILE = 16  # most positions of a tile: by so much buffers of a block are longer
LEAST_CHUNK = 512  # positions of a job
MOST_CHUNKS = 64  # of a sequence; beyond that chunks grow
MOST_QUERIES = 8  # taken at once; of more, groups take turns

# counters: runs of jobs given out, jobs finished
NEXT, DONE = 0, LINE

(
    QUERIES,  # f32 [B, Hq, D]
    KEYS,  # rows of D stored elements
    VALUES,  # rows of Dv stored elements
    OUT,  # f32 [B, Hq, Dv]
    LENGTHS,  # int64 [B]: positions of each sequence, the query's own included
    STARTS,  # int64 [B]: first position that counts (left padding); 0 = none
    SINKS,  # f32 [Hq]: logits that enter the denominator only; 0 = none
    KEY_SCALES,  # f32, positions contiguous (int8 only)
    VALUE_SCALES,  # likewise
    BATCH,  # B
    THREADS,  # of the team: how long the runs are
    KV_HEADS,  # Hkv
    WINDOW,  # positions that a query sees, its own included; 0 = all
    FACTOR,  # f32 bits: what scores are multiplied with, log2(e) included
    KEY_BATCH,  # strides of the keys in bytes ...
    KEY_HEAD,
    KEY_POSITION,
    VALUE_BATCH,  # ... of the values ...
    VALUE_HEAD,
    VALUE_POSITION,
    SCALE_BATCH,  # ... and of both arrays of scales
    SCALE_HEAD,
    COUNTERS,  # int64 [B, Hkv]: chunks finished; 0 between launches, the last chunk sees to it
    LOCAL,  # each thread's own memory
    SLOTS,  # each job's result
) = range(2 * LINE, 2 * LINE + 25 * 8, 8)

BYTES = (SLOTS + 8 + LINE - 1) // LINE * LINE


def lines(size: int) -> int:
    """`size` bytes up to whole cache lines."""
    return -(-size // LINE) * LINE


def most_chunks(max_length: int) -> int:
    """The most chunks that a sequence of up to max_length positions is cut into."""
    return max(1, min(MOST_CHUNKS, -(-max_length // LEAST_CHUNK)))


@dataclass(frozen=True, slots=True)
class JobShape:
    """What a job is compiled for."""

    queries: int  # query heads of a KV head
    keys: Rows
    values: Rows
    pair_scores: bool  # by products of bf16 pairs of a row
    pair_values: bool  # by products of bf16 pairs of neighbouring positions

    @property
    def groups(self) -> int:
        """Turns that the queries of a KV head are taken in."""
        return -(-self.queries // MOST_QUERIES)

    @property
    def group(self) -> int:
        """Queries of a group; the last one may have fewer."""
        return -(-self.queries // self.groups)

    @property
    def wide(self) -> int:
        """The power of two that a group is filled up to where queries lie side by side."""
        return 1 << (self.group - 1).bit_length()

    @property
    def state_lanes(self) -> int:
        """f32 lanes of a group's greatest scores, and of its sums of weights."""
        return max(self.wide, self.keys.lanes)

    @property
    def state_bytes(self) -> int:
        """Greatest scores, then sums of weights, of a group."""
        return 2 * 4 * self.state_lanes

    @property
    def query_bytes(self) -> int:
        """A query, prepared for the products."""
        return self.keys.float_bytes // (2 if self.pair_scores else 1)

    @property
    def output_bytes(self) -> int:
        """Unfinished outputs of all groups."""
        return self.groups * self.group * self.values.float_bytes

    @property
    def slot_bytes(self) -> int:
        """A job's result: outputs of all queries, then the state of each group."""
        return lines(self.output_bytes + self.groups * self.state_bytes)

    @property
    def local_parts(self) -> tuple[int, ...]:
        """Bytes of each part of a thread's own memory, in order."""
        return (
            lines(self.groups * self.wide * self.query_bytes),  # prepared queries
            (BLOCK + TILE) * self.wide * 4,  # scores, then weights
            (BLOCK + TILE) * 4,  # scales of keys
            (BLOCK + TILE) * 4,  # scales of values
            lines(4 * self.state_lanes),  # corrections of a block
            lines(4 * self.state_lanes),  # sinks
            lines(MOST_CHUNKS * 4 * self.state_lanes),  # weights of chunks
        )

    @property
    def local_bytes(self) -> int:
        return lines(sum(self.local_parts))

    def bytes(self, batch: int, kv_heads: int, max_length: int, threads: int) -> int:
        """The whole block, counters and slots included."""
        heads = batch * kv_heads
        slots = heads * most_chunks(max_length) * self.slot_bytes
        return BYTES + lines(8 * heads) + threads * self.local_bytes + slots
