"""A thread team that borrows the threads of an OpenMP runtime already in the process: torch's.

Between two MoE layers torch runs attention on its own threads, and these go on spinning for some milliseconds after
each operation, in the hope of the next. A second team on the same cores then shares them with the spinners:
measured on 2 cores, experts read 18 to 23 GB/s between torch operations against 26 to 30 alone. So the jobs are
handed to the spinners themselves, through the entry point that compilers use for a parallel region:

    GOMP_parallel(function, data, threads, flags)

libgomp defines it; the runtimes of LLVM and Intel have it for compatibility. Each thread of the region draws a
ticket, which is its number. A job never waits for a particular thread, so a region that gets fewer threads than it
asked for (a nested one, or OMP_THREAD_LIMIT) still finishes.

Where this thread has something else to do first, the two halves of the same are called, which older compilers used:

    GOMP_parallel_start(function, data, threads)   the others begin
    GOMP_parallel_end()                            waits for them, when this thread has called `function` itself

The number of threads should be the one torch uses: the runtime would otherwise end and start threads at every change.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.atomics import call_job, fetch_add, load_acquire
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.team import LINE, Team, aligned_bytes

_JOB, _ARGS, _TICKET = 0, 8, LINE
_RUNTIMES = ("libgomp", "libomp", "libiomp")


def _enter(data: int) -> None:
    thread = fetch_add(data + _TICKET, 1)
    call_job(load_acquire(data + _JOB), thread, load_acquire(data + _ARGS))


def find_openmp_runtime(maps: Path = Path("/proc/self/maps")) -> str | None:
    """Path of an OpenMP runtime that this process has loaded, torch's own before others; None where there is none."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:  # not Linux
        return None
    rows = (line.split(maxsplit=5) for line in lines)
    paths = {row[5] for row in rows if len(row) == 6}
    found = [path for path in paths if Path(path).name.startswith(_RUNTIMES)]
    found.sort(key=lambda path: ("torch" not in path, path))
    return found[0] if found else None


def _halves(library: str) -> tuple[Any, Any] | None:
    """GOMP_parallel_start and GOMP_parallel_end; None in a runtime without them."""
    runtime = ctypes.CDLL(library)
    try:
        begin, end = runtime.GOMP_parallel_start, runtime.GOMP_parallel_end
    except AttributeError:
        return None
    begin.argtypes, end.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint], []
    begin.restype = end.restype = None
    return begin, end


class OpenMPTeam(Team):
    """A team on the threads of the OpenMP runtime at `library`.

    Raises OSError if the library cannot be opened, AttributeError if it has no GOMP_parallel.
    """

    def __init__(self, threads: int, library: str) -> None:
        super().__init__(threads)
        parallel = ctypes.CDLL(library).GOMP_parallel
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        self._parallel = parallel
        self._halves = _halves(library)
        self._entry: Any = compile_job(_enter, "void(int64)", "openmp")
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._entry.address)
        self._data: NDArray[np.uint8] = aligned_bytes(2 * LINE)
        self._words = self._data.view(np.int64)
        self._closed = False

    def launch(self, job: int, args: int, meanwhile: Callable[[], None] | None = None) -> None:
        with self.lock:
            if self._closed:
                raise RuntimeError("this OpenMPTeam is closed")
            self._words[_JOB // 8] = job
            self._words[_ARGS // 8] = args
            self._words[_TICKET // 8] = 0
            data = self._data.ctypes.data
            if meanwhile is not None and self._halves is not None:
                begin, end = self._halves
                begin(self._entry.address, data, self.threads)
                try:
                    meanwhile()
                finally:
                    self._enter(data)
                    end()
                return
            if meanwhile is not None:
                meanwhile()
            self._parallel(self._entry.address, data, self.threads, 0)

    def close(self) -> None:
        """Refuse further jobs. The threads are the runtime's and stay."""
        with self.lock:
            self._closed = True
