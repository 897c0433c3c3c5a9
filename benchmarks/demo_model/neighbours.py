"""How many threads to use on a machine that others use as well.

A parallel region ends when its slowest thread does: beside one busy neighbour on two cores, two
threads made 800 tokens/s and one made 3,000, because one of the two waits for a core while the
other spins.
"""

import os
import time
from pathlib import Path


class Neighbours:
    """Watches what other processes take, and answers with the threads that are left."""

    def __init__(self, every_s: float = 3.0) -> None:
        self.every_s = every_s
        self.cores = os.cpu_count() or 1
        self.threads = self.cores
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
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _iowait, *interrupts = map(int, fields)
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, own.user + own.system
