"""Measures what experts, copies and starts cost here: a few seconds, before the first token.

Everything is timed the way the engine will run it, through the accelerator and on its clocks, so the same code
calibrates a real device and a virtual one. Every figure is the median of repeats. Jobs have several experts, and
`ExpertBench` takes others at every call, so that weights come from memory and not from a cache. What a job costs
beyond its experts shows where jobs of one and of many experts differ. Measuring goes from few rows to many
while there is time; the longest job runs once in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Protocol

import numpy as np

from moe_offload.options import Progress
from moe_offload.scheduling.cost_model import CostModel
from moe_offload.transfer.accelerator import Accelerator, Work

POINTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # rows
_MANY = 8  # experts of a job that is to show what starting costs
_REPEATS = 15, 61  # at least, where there is time, and at most
_PRECISION = 0.02  # relative standard error of a median that is enough
_COPY_SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_COPIES = 4  # in a row; all but the first show what a copy costs when the host is not waited for
_JOIN_BYTES = 64 << 10
_LINK_SHARE = 0.15  # of the time


class ExpertBench(Protocol):
    """Runs experts for a calibration; the weights and rows do not matter, their sizes and formats do.

    Every call takes other experts than the one before, as far as there are any.
    """

    def kinds(self) -> Sequence[tuple[str, int]]:
        """The kinds of experts, and the bytes of each one's record."""

    def run_cpu(self, kind: str, rows: list[int]) -> None:
        """One CPU job through the accelerator's `run_host`, with an expert for each entry of `rows`."""

    def run_gpu(self, kind: str, rows: list[int]) -> None:
        """The same on `accelerator.compute`, from memory of the device. Does not wait."""


@dataclass(frozen=True, slots=True)
class _Jobs:
    """Seconds of jobs: {rows: (experts, seconds)}. start: what they cost beyond their experts. one: a job of one."""

    points: dict[int, tuple[int, float]]
    start: float
    one: float

    def per_expert(self, start: float) -> dict[int, float]:
        # whatever the start is thought to be, most of a job is its experts: noise must not make them free
        return {rows: max(seconds - start, 0.1 * seconds) / experts for rows, (experts, seconds) in self.points.items()}


def calibrate(
    accelerator: Accelerator, bench: ExpertBench, progress: Progress | None = None, *, seconds: float = 3.0
) -> CostModel:
    """Costs of this machine. Takes `seconds` of the accelerator's clock, and what the first run of every kernel takes.

    Nothing else may run on the accelerator meanwhile. Needs device memory for one copy as large as an expert.
    """
    kinds = list(bench.kinds())
    if not kinds:
        raise ValueError("no kind of expert to measure")
    steps, done = 1 + 2 * len(kinds), 0

    def report() -> None:
        nonlocal done
        if progress is not None:
            progress("measuring this machine", done, steps)
        done += 1

    def time_cpu(kind: str, rows: list[int]) -> float:
        started = accelerator.now()
        bench.run_cpu(kind, rows)
        return accelerator.now() - started

    def time_gpu(kind: str, rows: list[int]) -> float:
        return _on_device(accelerator, lambda: bench.run_gpu(kind, rows))

    report()
    latency, rate, join = _measure_link(accelerator, [nbytes for _, nbytes in kinds], _LINK_SHARE * seconds)
    share = (1 - _LINK_SHARE) * seconds / (2 * len(kinds))
    cpu: dict[str, _Jobs] = {}
    gpu: dict[str, _Jobs] = {}
    for kind, _ in kinds:
        for times, measure in ((cpu, time_cpu), (gpu, time_gpu)):
            report()
            times[kind] = _measure_jobs(partial(measure, kind), accelerator.now, share)
    report()
    cpu_start, gpu_start = _start(list(cpu.values())), _start(list(gpu.values()))
    model = CostModel(latency, rate, cpu_start=cpu_start, gpu_start=gpu_start, join=join)
    for kind, nbytes in kinds:
        model.add(kind, nbytes, cpu[kind].per_expert(cpu_start), gpu[kind].per_expert(gpu_start))
    return model


def _start(jobs: list[_Jobs]) -> float:
    """Of several kinds, the one with the shortest jobs shows it best."""
    return min(jobs, key=lambda job: job.one).start


def _on_device(accelerator: Accelerator, enqueue: Callable[[], None]) -> float:
    """Seconds from when the device could begin until it is through; waiting for it is not counted."""
    begin = accelerator.compute.record(timed=True)
    enqueue()
    end = accelerator.compute.record(timed=True)
    end.synchronize()
    return max(end.time() - begin.time(), 1e-9)


def _repeated(run: Callable[[], float], now: Callable[[], float], seconds: float) -> float:
    """The median of as many runs as fit in `seconds`, or as it takes to know it well."""
    stop = now() + seconds
    times = [run()]
    while now() < stop and len(times) < _REPEATS[1]:
        times.append(run())
        if len(times) >= _REPEATS[0]:
            middle = median(times)
            spread = 1.48 * median(abs(time - middle) for time in times)
            if 1.25 * spread < _PRECISION * middle * len(times) ** 0.5:
                break
    return max(median(times), 1e-9)


def _measure_jobs(run: Callable[[list[int]], float], now: Callable[[], float], seconds: float) -> _Jobs:
    run([1] * _MANY)  # compiles, allocates, wakes up clocks
    first = run([POINTS[-1]])
    stop = now() + seconds
    one = _repeated(partial(run, [1]), now, seconds / 8)
    many = _repeated(partial(run, [1] * _MANY), now, seconds / 8)
    start = min(max(one - (many - one) / (_MANY - 1), 0.0), one)
    points = {1: (_MANY, many)}
    for place, rows in enumerate(POINTS[1:], 1):
        left = max(stop - now(), 0.0)
        share = left / (len(POINTS) - place)
        slowest = 2 * max(time / experts for experts, time in points.values())  # twice the rows of the last point
        experts = next((n for n in (_MANY, 4, 2) if _REPEATS[0] * n * slowest < share), 1)
        if experts * slowest > left:
            points.setdefault(POINTS[-1], (1, first))
            break
        points[rows] = (experts, _repeated(partial(run, [rows] * experts), now, share))
    return _Jobs(points, start, one)


def _measure_link(accelerator: Accelerator, records: list[int], seconds: float) -> tuple[float, float, float]:
    """Latency, bytes per second, and the seconds of a small launch that reads host memory."""
    room = max(*records, min(_COPY_SIZES[-1], (accelerator.budget - accelerator.used) // 2), _JOIN_BYTES)
    sizes = sorted({*records, *(size for size in _COPY_SIZES if size <= room)})
    device = accelerator.allocate(room, "calibration")
    try:
        arena = accelerator.host_arena(room)
        try:
            host = arena.take(room, "calibration")
            host.host(write=True)

            def copy(size: int, count: int) -> float:
                def enqueue() -> None:
                    for _ in range(count):
                        accelerator.copy_in(device.part(0, size), host.part(0, size), accelerator.compute)

                return _on_device(accelerator, enqueue)

            def join() -> None:
                source, target = host.part(0, _JOIN_BYTES), device.part(0, _JOIN_BYTES)
                work = Work(link_bytes=_JOIN_BYTES)
                accelerator.launch(accelerator.compute, _read_mapped, [source], [target], work, "join")

            copy(sizes[0], 1)
            _on_device(accelerator, join)
            share = seconds / (2 * len(sizes) + 1)
            times = []
            for size in sizes:
                first = _repeated(partial(copy, size, 1), accelerator.now, share)
                all_of_them = _repeated(partial(copy, size, 1 + _COPIES), accelerator.now, share)
                times.append(max((all_of_them - first) / _COPIES, 0.1 * first))
            joining = _repeated(partial(_on_device, accelerator, join), accelerator.now, share)
            accelerator.compute.synchronize()
        finally:
            arena.close()
    finally:
        accelerator.free(device)
    return *fit_link(sizes, times), joining


def fit_link(sizes: list[int], times: list[float]) -> tuple[float, float]:
    """Latency and bytes per second with the least relative errors."""
    size, time = np.array(sizes, np.float64), np.array(times)
    (latency, per_byte), *_ = np.linalg.lstsq(np.stack([1 / time, size / time], 1), np.ones(len(size)))
    if latency < 0 or per_byte <= 0:
        latency, per_byte = 0.0, float(np.median(time / size))
    return float(latency), float(1 / per_byte)


def _read_mapped(source: Any, target: Any) -> None:
    target.copy_(source)
