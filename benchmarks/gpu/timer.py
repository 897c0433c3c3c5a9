"""How long the device works on calls, apart from how long the host takes to ask for them.

A sample is some calls one behind the other, each with inputs of its own, so that together they are more than the cache
holds. On a card a kernel that only waits goes ahead of them: while it runs the host puts all calls on the stream, and
two events around them see the device's time alone. Whether the host was done before the waiting ended is asked
afterwards; if not, the wait is made longer. Calls that wait for the device themselves can never be done before: they
are told apart by `host_bound`, and their figure is the time that they really take.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Protocol

import torch

from benchmarks.reporting import spread

Call = Callable[[], None]
_FIRST_WAIT, _LONGEST_WAIT = 1 << 21, 1 << 27  # cycles: 1 ms and 70 ms at 2 GHz
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one call: the mean of those of a sample. host_bound: the device waited for the host in between."""

    seconds: float
    host_bound: bool = False


class Timer(Protocol):
    """Times calls that put work on the device, and makes them repeatable without the host."""

    def sample(self, calls: Sequence[Call]) -> Sample:
        """Run `calls` in order; waits for the device before and behind them."""

    def captured(self, call: Call) -> Call:
        """The same work as a CUDA graph, where there are some. `call` must not wait for the device."""

    def finish(self) -> None:
        """Wait for the device."""


class CudaTimer:
    """Events on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._wait = device, _FIRST_WAIT
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def sample(self, calls: Sequence[Call]) -> Sample:
        wait = self._wait
        while True:
            found = self._sample(calls, wait)
            if not found.host_bound:
                self._wait = wait
                return found
            if wait >= _LONGEST_WAIT:
                return found
            wait *= 4

    def _sample(self, calls: Sequence[Call], wait: int) -> Sample:
        self.finish()
        torch.cuda._sleep(wait)  # type: ignore[no-untyped-call]
        self._start.record()
        for call in calls:
            call()
        self._end.record()
        host_bound = bool(self._start.query())  # type: ignore[no-untyped-call]
        self._end.synchronize()
        return Sample(float(self._start.elapsed_time(self._end)) / 1e3 / len(calls), host_bound)

    def captured(self, call: Call) -> Call:
        call()  # what is compiled or allocated at the first call cannot be captured
        self.finish()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return partial(_replay, graph, call)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """`call` is here for the tensors that the graph works on: they live as long as it."""
    graph.replay()


class WallTimer:
    """The host's clock, for kernels that run on the CPU: to try the benchmark, not to measure."""

    def sample(self, calls: Sequence[Call]) -> Sample:
        started = time.perf_counter()
        for call in calls:
            call()
        return Sample((time.perf_counter() - started) / len(calls))

    def captured(self, call: Call) -> Call:
        return call

    def finish(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Series:
    """Samples of one contestant."""

    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> float:
        """Median seconds of one call."""
        return median(sample.seconds for sample in self.samples)

    @property
    def host_bound(self) -> bool:
        """Whether the device waited for the host in most of the samples."""
        return 2 * sum(sample.host_bound for sample in self.samples) > len(self.samples)

    def to_dict(self) -> dict[str, float | bool]:
        """For JSON, in microseconds."""
        values = spread([sample.seconds * 1e6 for sample in self.samples])
        return {f"us_{key}" if key != "n" else "samples": round(value, 2) for key, value in values.items()} | {
            "host_bound": self.host_bound
        }


def take_turns(timer: Timer, contestants: dict[str, Sequence[Call]], rounds: int) -> dict[str, Series]:
    """Every contestant once a round, so that what changes meanwhile (clocks, heat) changes for all; warm-up apart."""
    for calls in contestants.values():
        for _ in range(_WARM_UP):
            timer.sample(calls)
    taken: dict[str, list[Sample]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, calls in contestants.items():
            taken[name].append(timer.sample(calls))
    return {name: Series(tuple(samples)) for name, samples in taken.items()}


def host_seconds(timer: Timer, calls: Sequence[Call], rounds: int) -> float:
    """Median seconds that the host takes to ask for one call, with an idle device at the beginning."""
    times = []
    for turn in range(rounds + _WARM_UP):
        timer.finish()
        started = time.perf_counter()
        for call in calls:
            call()
        if turn >= _WARM_UP:
            times.append((time.perf_counter() - started) / len(calls))
    timer.finish()
    return median(times)
