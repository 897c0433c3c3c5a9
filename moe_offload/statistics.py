"""What the engine counted: a running tally, and frozen snapshots whose difference is one generation."""

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals over calls of MoE layers.

    layer_calls: calls. rows: (token, expert) pairs computed. experts_run: experts read, once per call each.
    torch_experts: those of them that took the torch path. bytes_read: weights of the experts read. seconds: time in the
    experts, and timed_bytes: what was read in it; a fused decode step is counted without a time of its experts' own.
    """

    layer_calls: int = 0
    rows: int = 0
    experts_run: int = 0
    torch_experts: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    timed_bytes: int = 0

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def gigabytes_per_second(self) -> float:
        """Expert weights read per second of expert time, in GB/s (10^9 bytes)."""
        return self.timed_bytes / self.seconds / 1e9 if self.seconds else 0.0


class Statistics:
    """A tally that several threads add to; `snapshot()` at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layer_calls = self._rows = self._experts_run = self._torch_experts = self._bytes_read = 0
        self._seconds = 0.0
        self._timed_bytes = 0

    def add(self, rows: int, experts: int, torch_experts: int, bytes_read: int, seconds: float, calls: int = 1) -> None:
        """Calls of layers; 0 seconds: not timed. On the path of every token: plain additions, no object made."""
        with self._lock:
            self._layer_calls += calls
            self._rows += rows
            self._experts_run += experts
            self._torch_experts += torch_experts
            self._bytes_read += bytes_read
            self._seconds += seconds
            if seconds > 0:
                self._timed_bytes += bytes_read

    def snapshot(self) -> Counts:
        """The totals so far."""
        with self._lock:
            return Counts(
                self._layer_calls, self._rows, self._experts_run, self._torch_experts, self._bytes_read, self._seconds,
                self._timed_bytes,
            )  # fmt: skip
