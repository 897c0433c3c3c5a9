"""The argument block of a layer of experts as stored: what all experts have (experts_block.py), and then this."""

from moe_offload.cpu_kernels.experts_block import *  # noqa: F403  # this block begins with those words
from moe_offload.cpu_kernels.experts_block import END, LINE

# set by each call
FIRST_BLOCK = END  # intermediate outputs of one job of the first phase
SECOND_BLOCK = END + 8  # output columns of one job of the second phase

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
