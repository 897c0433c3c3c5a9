"""The argument block of a layer of packed experts. Offsets in bytes; counters lie on cache lines of their own.

The block follows the stage protocol: whoever prepares it zeroes the counters, and a thread that comes when all jobs
are drawn finds nothing to do.
"""

LINE = 64

# a pair of counters for each phase: jobs drawn, jobs done
NEXT_ROWS, DONE_ROWS, NEXT_FIRST, DONE_FIRST, NEXT_SECOND, DONE_SECOND = range(0, 6 * LINE, LINE)
COUNTERS = 6 * LINE

# set by each call
(
    TABLE,  # int64 [E, 6]: gate, up, down, gate bias, up bias, down bias
    EXPERTS,  # int32 [A]
    OFFSETS,  # int64 [A + 1]
    TOKENS,  # int32 [R]
    WEIGHTS,  # f32 [R]
    HIDDEN_AT,  # f32 [T, H]
    OUT,  # f32 [T, H]
    ACTIVE,  # A
    TOKEN_COUNT,  # T
    ROWS,  # quantised hidden vectors, one for each token
    INPUTS,  # int64 [R + slack]: address of each row's quantised hidden vector
    MIDDLES,  # int64 [R + slack]: address of each row's quantised intermediate vector
    LOCAL,  # each thread's own memory ...
    LOCAL_BYTES,  # ... and how much of it
    RUN,  # blocks computed one after the other before anything else is done
    FIRST_JOBS,  # jobs of phase 2 ...
    FIRST_CUTS,  # int64 [jobs + 1]: where each begins, in blocks of all active experts one behind the other
    SECOND_JOBS,  # likewise of phase 3 ...
    SECOND_CUTS,  # ... in blocks of output columns
) = range(COUNTERS, COUNTERS + 19 * 8, 8)

# set by the kernel
CONSTANTS = SECOND_CUTS + 8
(
    HIDDEN,  # H
    INTERMEDIATE,  # I
    HIDDEN_PADDED,  # H filled up to whole records
    MIDDLE_PADDED,  # I likewise
    ROW_BYTES,  # of a quantised hidden vector
    MIDDLE_BYTES,  # of a quantised intermediate vector
    UP_RECORDS,  # records of a block of gate (up) ...
    DOWN_RECORDS,  # ... and of down
    ALPHA,  # f32 bits
    LIMIT,  # f32 bits
    CHUNK,  # rows taken at once
    BOTH_PLANES,  # an expert with at most so many rows takes activations in both planes
    PANELS_BYTES,  # of a thread's own memory, from its begin on: token panels for tiles
) = range(CONSTANTS, CONSTANTS + 13 * 8, 8)

BYTES = (CONSTANTS + 13 * 8 + LINE - 1) // LINE * LINE
