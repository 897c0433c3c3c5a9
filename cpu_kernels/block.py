"""The argument block of a layer of experts as stored: what all experts have (experts_block.py), and then this."""

from moe_offload.cpu_kernels.experts_block import (
    ACTIVE as ACTIVE,
)
from moe_offload.cpu_kernels.experts_block import (
    COUNTERS as COUNTERS,
)
from moe_offload.cpu_kernels.experts_block import (
    DONE_FIRST as DONE_FIRST,
)
from moe_offload.cpu_kernels.experts_block import (
    DONE_ROWS as DONE_ROWS,
)
from moe_offload.cpu_kernels.experts_block import (
    DONE_SECOND as DONE_SECOND,
)
from moe_offload.cpu_kernels.experts_block import (
    END as END,
)
from moe_offload.cpu_kernels.experts_block import (
    EXPERTS as EXPERTS,
)
from moe_offload.cpu_kernels.experts_block import (
    FIRST_CUTS as FIRST_CUTS,
)
from moe_offload.cpu_kernels.experts_block import (
    FIRST_JOBS as FIRST_JOBS,
)
from moe_offload.cpu_kernels.experts_block import (
    INPUT_BASE as INPUT_BASE,
)
from moe_offload.cpu_kernels.experts_block import (
    INPUT_BYTES as INPUT_BYTES,
)
from moe_offload.cpu_kernels.experts_block import (
    INPUTS as INPUTS,
)
from moe_offload.cpu_kernels.experts_block import (
    LINE as LINE,
)
from moe_offload.cpu_kernels.experts_block import (
    LOCAL as LOCAL,
)
from moe_offload.cpu_kernels.experts_block import (
    LOCAL_BYTES as LOCAL_BYTES,
)
from moe_offload.cpu_kernels.experts_block import (
    MIDDLES as MIDDLES,
)
from moe_offload.cpu_kernels.experts_block import (
    NEXT_FIRST as NEXT_FIRST,
)
from moe_offload.cpu_kernels.experts_block import (
    NEXT_ROWS as NEXT_ROWS,
)
from moe_offload.cpu_kernels.experts_block import (
    NEXT_SECOND as NEXT_SECOND,
)
from moe_offload.cpu_kernels.experts_block import (
    OFFSETS as OFFSETS,
)
from moe_offload.cpu_kernels.experts_block import (
    OUT as OUT,
)
from moe_offload.cpu_kernels.experts_block import (
    TABLE as TABLE,
)
from moe_offload.cpu_kernels.experts_block import (
    TOKENS as TOKENS,
)
from moe_offload.cpu_kernels.experts_block import (
    WEIGHTS as WEIGHTS,
)

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
