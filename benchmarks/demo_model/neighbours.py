"""How many threads to use on a machine that others use as well.

A parallel region ends when its slowest thread does: beside one busy neighbour on two cores, two
threads are four times slower than one, because one of them waits for a core while the other spins.
"""

import os
import time

import psutil


class Neighbours:
    """Watches what other processes take, and answers with the threads that are left."""

    def __init__(self, every_s: float = 3.0) -> None:
        self.every_s = every_s
        self.cores = os.cpu_count() or 1
        self.threads = self.cores
        self._process = psutil.Process()
        self._last = self._reading()

    def free_threads(self) -> int:
        """Cores that others left idle since the last look, at least one."""
        now, others, own = self._reading()
        elapsed = now - self._last[0]
        if elapsed >= self.every_s:
            busy = (others - self._last[1] - (own - self._last[2])) / elapsed
            self.threads = max(1, self.cores - int(busy + 0.7))
            self._last = (now, others, own)
        return self.threads

    def _reading(self) -> tuple[float, float, float]:
        """Wall time, processor time of all processes, processor time of this one."""
        machine = psutil.cpu_times()
        own = self._process.cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        return time.monotonic(), busy, own.user + own.system
