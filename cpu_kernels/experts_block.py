"""What the argument blocks of all experts' jobs begin with. Offsets in bytes; counters lie on cache lines of their own.

A stage of routing (route.py) fills in the groups without knowing which kind of experts they are for. The blocks follow
the stage protocol: whoever prepares one zeroes its counters, and a thread that comes when all jobs are drawn finds
nothing to do.
"""

LINE = 64

# a pair of counters for each phase: jobs drawn, jobs done
NEXT_ROWS, DONE_ROWS, NEXT_FIRST, DONE_FIRST, NEXT_SECOND, DONE_SECOND = range(0, 6 * LINE, LINE)
COUNTERS = 6 * LINE

(
    TABLE,  # int64 [E, 6]: gate, up, down, gate bias, up bias, down bias
    EXPERTS,  # int32 [A]
    OFFSETS,  # int64 [A + 1]
    TOKENS,  # int32 [R]
    WEIGHTS,  # f32 [R]
    OUT,  # f32 [T, H]
    ACTIVE,  # A
    INPUTS,  # int64 [R] and more: address of each row's input
    INPUT_BASE,  # the first token's input ...
    INPUT_BYTES,  # ... and how far it is to the next one's
    MIDDLES,  # int64 [R] and more: address of each row's intermediate vector
    LOCAL,  # each thread's own memory ...
    LOCAL_BYTES,  # ... and how much of it
    FIRST_JOBS,  # jobs of the first matrices ...
    FIRST_CUTS,  # int64 [jobs + 1]: where each begins, in blocks of all active experts one behind the other
) = range(COUNTERS, COUNTERS + 15 * 8, 8)
END = FIRST_CUTS + 8
