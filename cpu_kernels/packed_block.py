"""The argument block of a layer of packed experts: what all experts have (experts_block.py), and then this."""

from moe_offload.cpu_kernels.experts_block import *  # noqa: F403  # this block begins with those words
from moe_offload.cpu_kernels.experts_block import END, LINE

# set by each call
(
    HIDDEN_AT,  # f32 [T, H]
    TOKEN_COUNT,  # T
    CHUNK,  # rows taken at once
    RUN,  # blocks computed one after the other before anything else is done
    SECOND_JOBS,  # jobs of the last matrix ...
    SECOND_CUTS,  # ... in blocks of output columns
) = range(END, END + 6 * 8, 8)

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
    BOTH_PLANES,  # an expert with at most so many rows takes activations in both planes
    PANELS_BYTES,  # of a thread's own memory, from its begin on: token panels for tiles
) = range(CONSTANTS, CONSTANTS + 12 * 8, 8)

BYTES = (CONSTANTS + 12 * 8 + LINE - 1) // LINE * LINE
