"""The argument block of a layer of packed experts: what all experts have (experts_block.py), and then this."""

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
