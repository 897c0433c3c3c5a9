"""The machine's read limit: what every percentage in a benchmark refers to.

No single loop reads fastest everywhere (one wide stream was 10 to 15 % slower than several narrow
ones on one Xeon, and the reverse elsewhere), so the limit is the best of a few pure read kernels
on all threads of a team, over memory that no cache holds.
"""

import mmap
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moe_offload.cpu_kernels.emit import I32, I64, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.memory import load_i64, store_i64
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team, aligned_bytes

_MIB = 1 << 20
_START, _SHARE, _SINK = 0, 8, 64  # argument block: address, bytes per thread, a line per thread
_UNROLL_BYTES = 256


class _Reader(NamedTuple):
    streams: int
    width: int  # bytes of one load
    prefetch: int  # bytes ahead; 0 = leave it to the hardware


def _readers() -> list[_Reader]:
    widest = current_target().lanes * 4
    widths = sorted({widest, min(widest, 32)})
    return [
        _Reader(streams, width, prefetch) for streams in (1, 2, 4) for width in widths for prefetch in (0, 1024, 2048)
    ]


def _make_read(reader: _Reader) -> Any:
    """Intrinsic (address, bytes): xor of everything there, so that no load can be dropped."""
    lanes = vector(I32, reader.width // 4)
    loads = _UNROLL_BYTES // reader.width

    def emit(em: Emitter, address: Value, size: Value) -> Value:
        part = em.b.udiv(size, em.i64(reader.streams))
        streams = [em.add(address, em.mul(part, s)) for s in range(reader.streams)]

        def body(i: Value, sums: list[Value]) -> list[Value]:
            for stream in streams:
                at = em.add(stream, i)
                for n in range(loads):
                    offset = n * reader.width
                    if reader.prefetch and offset % 64 == 0:
                        em.prefetch(at, offset + reader.prefetch)
                    sums[n % len(sums)] = em.b.xor(sums[n % len(sums)], em.load(lanes, at, offset))
            return sums

        sums = em.loop(0, part, _UNROLL_BYTES, [em.const(lanes, 0)] * 4, body)
        total = sums[0]
        for other in sums[1:]:
            total = em.b.xor(total, other)
        return em.b.zext(em.b.extract_element(total, em.const(I32, 0)), I64)

    return micro_kernel("read", "ii:i", emit)


@cache
def _job(reader: _Reader) -> Any:
    read = _make_read(reader)

    def read_share(thread: int, args: int) -> None:
        share = load_i64(args + _SHARE)
        total = read(load_i64(args + _START) + thread * share, share)
        store_i64(total, args + _SINK * (1 + thread))

    key = f"{reader.streams}x{reader.width}-{reader.prefetch}"
    return compile_job(read_share, "void(int64,int64)", key)


def measure_read_bandwidth(team: Team, mib: int = 1024, seconds: float = 1.0) -> float:
    """Read limit of the team's threads in GB/s (1e9): the best kernel's median over cold memory.

    `mib` should be several times the last-level cache; each sample reads another part of it.
    """
    with ReadLimit(team, mib) as limit:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            limit.sample()
        return limit.gb_per_s()


class ReadLimit:
    """Samples to be interleaved with a benchmark's own: the limit moves with the neighbours."""

    def __init__(self, team: Team, mib: int = 1024) -> None:
        self._team = team
        self._memory = mmap.mmap(-1, mib * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # a limit: the best pages the system gives
        self._view = np.frombuffer(self._memory, np.uint8)
        self._view[:: mmap.PAGESIZE] = 1  # all of it has to be real, or one zero page is read
        self._args = aligned_bytes(_SINK * (1 + team.threads)).view(np.int64)
        align = _UNROLL_BYTES * 4 * team.threads
        self._size = min(64 * _MIB, mib * _MIB // 4) // align * align
        self._parts = mib * _MIB // self._size
        self._part = 0
        self._times: dict[_Reader, list[float]] = {reader: [] for reader in _readers()}
        for reader in self._times:
            _job(reader)

    def sample(self) -> None:
        """Time every read kernel once."""
        for reader, times in self._times.items():
            times.append(self._timed(_job(reader)))

    def _timed(self, job: Any) -> float:
        self._part = (self._part + 1) % self._parts
        with self._team.lock:
            self._args[0] = self._view.ctypes.data + self._part * self._size
            self._args[1] = self._size // self._team.threads
            launch: Callable[[int, int], None] = self._team.launch
            address, args = job.address, self._args.ctypes.data
            started = time.perf_counter()
            launch(address, args)
            return time.perf_counter() - started

    def gb_per_s(self) -> float:
        """The best kernel's median."""
        medians = [float(np.median(times)) for times in self._times.values() if times]
        if not medians:
            raise RuntimeError("no sample yet: call sample() first")
        return self._size / min(medians) / 1e9

    def __enter__(self) -> "ReadLimit":
        return self

    def __exit__(self, *_: object) -> None:
        del self._view
        self._memory.close()
