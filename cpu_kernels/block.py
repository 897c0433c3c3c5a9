"""The argument block of a layer's job: what the launcher writes and every thread reads.

Offsets in bytes. The counters that threads race for lie on cache lines of their own.
"""

LINE = 64

# counters
NEXT_FIRST, DONE_FIRST, NEXT_SECOND = 0, LINE, 2 * LINE

# set by each call
(
    TABLE,  # int64 [E, 6]: gate, up, down, gate bias, up bias, down bias
    EXPERTS,  # int32 [A]
    OFFSETS,  # int64 [A + 1]
    TOKENS,  # int32 [R]
    WEIGHTS,  # f32 [R]
    INPUTS,  # int64 [R]: address of each row's hidden vector
    MIDDLES,  # int64 [R]: address of each row's intermediate vector
    OUT,  # f32 [T, H]
    ACTIVE,  # A
    LOCAL,  # each thread's own memory ...
    LOCAL_BYTES,  # ... and how much of it
    FIRST_BLOCK,  # intermediate outputs of one job of the first phase
    SECOND_BLOCK,  # output columns of one job of the second phase
) = range(3 * LINE, 3 * LINE + 13 * 8, 8)

# set by the kernel's layout and activation
CONSTANTS = SECOND_BLOCK + 8
(
    HIDDEN,  # H
    INTERMEDIATE,  # I
    MIDDLE_BYTES,  # bytes from one intermediate vector to the next
    ROW_STRIDE,  # bytes from one gate (up) row to its next
    BIAS_STEP,  # elements between neighbouring gate (up) biases
    BIAS_CODE,  # memory.TYPE_CODES
    ALPHA,  # f32 bits
    LIMIT,  # f32 bits
    CHUNK,  # rows taken at once: their inputs stay in the core's cache
) = range(CONSTANTS, CONSTANTS + 9 * 8, 8)

BYTES = (CONSTANTS + 9 * 8 + LINE - 1) // LINE * LINE
