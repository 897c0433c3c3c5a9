"""Our own team of native threads.

A worker is a Python thread that enters a compiled loop once, without the GIL, and stays there.
A launch costs about half a microsecond, against 2 for OpenMP and 80 for an executor (measured),
survives fork, and may come from any Python thread. The mailbox, in words of int64, one cache
line for each that several threads write:

    SEQUENCE   the launcher adds 1: there is a job; also the futex word workers sleep on
    FINISHED   each worker adds 1 when its share of a job is done
    STOP       not 0: leave the loop
    SLEEPERS   workers in (or about to enter) the futex; only then does a launch wake anybody
    JOB, ARGS  address of the job `void(thread, args)` and what it gets
    SPIN       looks at SEQUENCE before a worker goes to sleep

The launcher works too, as thread 0, then waits for FINISHED: when a launch returns, no worker
touches its arguments any more. Workers look for about 30 us before they sleep: longer would take
the core from torch's own threads, and waking costs about 50 us.
"""

import atexit
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.atomics import (
    call_job,
    exchange,
    fetch_add,
    load_acquire,
    relax,
    sleep_while,
    wait_for_count,
    wake_all,
)
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.kernel_cache import compiled
from moe_offload.cpu_kernels.processors import cores_of_threads, pin_thread

LINE = 64  # bytes
SEQUENCE, FINISHED, STOP, SLEEPERS, JOB, ARGS, SPIN = (n * LINE for n in range(7))
_MAILBOX_BYTES = 7 * LINE
_SPIN_SECONDS = 30e-6


@compiled("void(int64,int64)")
def _work(box: int, thread: int) -> None:
    """A worker's life."""
    done = 0
    spin = load_acquire(box + SPIN)
    while True:
        looks = 0
        while load_acquire(box + SEQUENCE) == done:
            relax()
            looks += 1
            if looks > spin:
                # the order (count myself, look again, sleep) leaves no gap to be forgotten in
                fetch_add(box + SLEEPERS, 1)
                if load_acquire(box + SEQUENCE) == done:
                    sleep_while(box + SEQUENCE, done)
                fetch_add(box + SLEEPERS, -1)
                looks = 0
        done += 1
        if load_acquire(box + STOP) != 0:
            return
        call_job(load_acquire(box + JOB), thread, load_acquire(box + ARGS))
        fetch_add(box + FINISHED, 1)


@native
def _post_job(box: int, threads: int, job: int, args: int) -> int:
    goal = load_acquire(box + FINISHED) + threads - 1
    if threads > 1:
        exchange(box + JOB, job)
        exchange(box + ARGS, args)
        fetch_add(box + SEQUENCE, 1)
        if load_acquire(box + SLEEPERS) > 0:
            wake_all(box + SEQUENCE)
    return goal  # type: ignore[no-any-return]


@native
def _take_part(box: int, job: int, args: int, goal: int) -> None:
    call_job(job, 0, args)
    wait_for_count(box + FINISHED, goal)


@compiled("void(int64,int64,int64,int64)")
def _launch(box: int, threads: int, job: int, args: int) -> None:
    _take_part(box, job, args, _post_job(box, threads, job, args))


@compiled("int64(int64,int64,int64,int64)")
def _begin(box: int, threads: int, job: int, args: int) -> int:
    """Let the workers begin; what FINISHED will be when they are through."""
    return _post_job(box, threads, job, args)  # type: ignore[no-any-return]


@compiled("void(int64,int64,int64,int64)")
def _end(box: int, job: int, args: int, goal: int) -> None:
    _take_part(box, job, args, goal)


@compiled("void(int64)")
def _stop(box: int) -> None:
    exchange(box + STOP, 1)
    fetch_add(box + SEQUENCE, 1)
    wake_all(box + SEQUENCE)


@compiled("void(int64)")
def _look(times: int) -> None:
    for _ in range(times):
        relax()


COMPILED = (_work, _launch, _begin, _end, _stop, _look)


def _looks_per_spin() -> int:
    """How many looks last _SPIN_SECONDS: the pause takes 4 to 140 cycles, by the CPU."""
    _look(100)
    fastest = min(_timed_look(2000) for _ in range(3))
    return max(100, int(2000 * _SPIN_SECONDS / fastest))


def _timed_look(times: int) -> float:
    started = time.perf_counter()
    _look(times)
    return time.perf_counter() - started


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins on a cache line; pages come from the kernel as they are used."""
    memory = np.zeros(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size]


class Team(ABC):
    """`threads` threads, the caller included, that run one compiled job at a time, and memory for the jobs.

    Launches from several Python threads take turns.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a team needs at least 1 thread, got {threads}")
        self.threads = threads
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.RLock()  # held from filling a job's arguments to its end
        self._scratch = aligned_bytes(0)

    @abstractmethod
    def launch(self, job: int, args: int, meanwhile: Callable[[], None] | None = None) -> None:
        """Run the C function `void(thread, args)` at address `job` on every thread; returns when all have finished.

        meanwhile: called by this thread when the others have begun, before it takes part itself. What it raises is
        raised when all have finished.
        """

    @abstractmethod
    def close(self) -> None:
        """Take no more jobs. Closing twice is fine."""

    def scratch(self, size: int) -> int:
        """Address of `size` bytes on a cache line, owned by the team, valid under its lock."""
        if self._scratch.size < size:
            self._scratch = aligned_bytes(size + size // 4)
        return self._scratch.ctypes.data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ThreadTeam(Team):
    """A team with threads of its own.

    Workers start with the first launch, and anew in a forked child. Launches from several Python
    threads take turns. With one thread there is no worker and nothing to wait for.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._closed = False
        _teams.add(self)

    def _reset(self) -> None:
        super()._reset()
        self._workers: list[threading.Thread] = []
        self._mailbox = aligned_bytes(_MAILBOX_BYTES)
        self._box: int = self._mailbox.ctypes.data
        self._stopper: Any = None

    def launch(self, job: int, args: int, meanwhile: Callable[[], None] | None = None) -> None:
        with self.lock:
            if not self._workers and self.threads > 1:
                self._start()
            if meanwhile is None:
                _launch(self._box, self.threads, job, args)
                return
            goal = _begin(self._box, self.threads, job, args)
            try:
                meanwhile()
            finally:
                _end(self._box, job, args, goal)

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("this ThreadTeam is closed")
        self._mailbox[SPIN : SPIN + 8].view(np.int64)[0] = _looks_per_spin()
        work, mailbox = _work.load(), self._mailbox

        cpus = cores_of_threads(self.threads)

        def enter(thread: int) -> None:
            if cpus:
                pin_thread(cpus[thread])
            work(mailbox.ctypes.data, thread)  # keeps the mailbox alive while it is looked at

        for thread in range(1, self.threads):
            # daemon: the interpreter joins other threads before atexit could stop them
            worker = threading.Thread(target=enter, args=(thread,), name=f"moe-offload-{thread}", daemon=True)
            worker.start()
            self._workers.append(worker)
        self._stopper = weakref.finalize(self, _stop.load(), self._box)
        self._stopper.atexit = False  # _close_all does it, in order

    def close(self) -> None:
        """Stop and join the workers. A closed team stays closed; closing twice is fine."""
        with self.lock:
            self._closed = True
            if self._stopper is not None:
                self._stopper()
            for worker in self._workers:
                worker.join()
            self._workers.clear()


_teams: weakref.WeakSet[ThreadTeam] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for team in list(_teams):
        # a daemon thread may hold the lock in a launch that nobody waits for: leave it be
        if team.lock.acquire(timeout=1.0):
            try:
                team.close()
            finally:
                team.lock.release()


def _forget_workers() -> None:
    """In a forked child: threads and locks stayed with the parent."""
    for team in list(_teams):
        if team._stopper is not None:
            team._stopper.detach()
        team._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
