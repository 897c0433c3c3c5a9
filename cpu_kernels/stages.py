"""Several jobs in one launch: a chain of stages that every thread walks through.

The stage protocol. A stage is a job `void(int64 thread, int64 args)` on a block of memory that begins with counters,
each on a cache line of its own, zero before a launch. Threads draw job numbers from a counter and count finished jobs
in another; the stage returns when all of its jobs are done, so that whatever comes next may read all of its results.
Nobody waits for a particular thread: one that comes late finds all jobs drawn and passes on to the next stage, so
a chain finishes with fewer threads than were asked for.

Memory of a chain, all int64: the number of stages, then for each the address of its job, of its block, and how many
counters the block begins with.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.atomics import call_job
from moe_offload.cpu_kernels.kernel_cache import compile_job, compiled
from moe_offload.cpu_kernels.memory import load_i64, store_i64
from moe_offload.cpu_kernels.team import Team, aligned_bytes

LINE = 64
_STAGE_BYTES = 24


class Stage(NamedTuple):
    """One link of a chain: addresses of its job and block, and the block's counter lines."""

    job: int
    block: int
    counters: int


def _run_chain(thread: int, args: int) -> None:
    for stage in range(load_i64(args)):
        at = args + 8 + _STAGE_BYTES * stage
        call_job(load_i64(at), thread, load_i64(at + 8))


@compiled("void(int64)")
def _reset(args: int) -> None:
    """Zero every counter of a chain."""
    for stage in range(load_i64(args)):
        at = args + 8 + _STAGE_BYTES * stage
        block = load_i64(at + 8)
        for line in range(load_i64(at + 16)):
            store_i64(0, block + LINE * line)


COMPILED = (_reset,)


@cache
def chain_job() -> Any:
    """The compiled job of every chain. Kept for good: machine code goes with the object that holds it."""
    _reset.load()
    return compile_job(_run_chain, "void(int64,int64)", "chain")


class Chain:
    """Stages that run one after the other. The caller keeps their blocks alive."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._job = int(chain_job().address)
        words = [len(stages), *(word for stage in stages for word in stage)]
        self._memory: NDArray[np.uint8] = aligned_bytes(8 * len(words))
        self._memory.view(np.int64)[:] = words
        self._args = int(self._memory.ctypes.data)

    def run(self, team: Team, meanwhile: Callable[[], None] | None = None) -> None:
        """Run all stages in one launch; meanwhile: see `Team.launch`.

        The caller holds whatever guards the blocks; the team's lock is taken here.
        """
        with team.lock:
            _reset(self._args)
            team.launch(self._job, self._args, meanwhile)
