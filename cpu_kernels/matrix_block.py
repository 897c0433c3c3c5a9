"""The argument block of a stage of matrices that take the same input. Offsets in bytes."""

LINE = 64

NEXT_ROWS, DONE_ROWS, NEXT_BLOCKS, DONE_BLOCKS = range(0, 4 * LINE, LINE)
COUNTERS = 4 * LINE

(
    ENTRIES,  # the matrices, ENTRY_BYTES each
    TOKENS,  # T
    X,  # f32 inputs, a row for each token ...
    X_STEP,  # ... so many bytes apart
    COLS,  # K
    PADDED,  # K filled up to whole records (packed) or K
    RECORDS,  # records of a block (packed)
    ROWS,  # what the product reads: integers, or f32 rows that a norm wrote
    ROW_BYTES,
    ROW_LIST,  # int64 [T + slack]: address of each token's row
    LOCAL,  # each thread's own memory ...
    LOCAL_BYTES,  # ... and how much of it
    RUN,  # blocks computed one after the other
    JOBS,
    CUTS,  # int64 [JOBS + 1], in blocks of all matrices one behind the other
    CHUNK,  # tokens taken at once
    BOTH_PLANES,  # with at most so many tokens activations go in in both planes
    NORM,  # f32 [K]: weight of a norm before the product; 0 = none
    NORM_BIAS,  # f32 [K]: then it is a LayerNorm; 0 = an RMSNorm
    EPSILON,  # f32 bits
    NORM_OUT,  # f32 rows, K each, for the normalised input
    ROUND,  # code of the type that results are rounded to (memory.TYPE_CODES; f32: not at all)
) = range(COUNTERS, COUNTERS + 22 * 8, 8)
BYTES = (COUNTERS + 22 * 8 + LINE - 1) // LINE * LINE

(
    WEIGHTS,  # address of the matrix
    FIRST,  # its first block in the order of all
    OUTPUTS,  # N
    OUT,  # f32 results, a row for each token ...
    OUT_STEP,  # ... so many bytes apart
    BIAS,  # f32 [N]; 0 = none
    ADD,  # f32 [T, N]: added to the rounded result, and rounded again (a residual); 0 = none
    ADD_STEP,
) = range(0, 64, 8)
ENTRY_BYTES = 64
