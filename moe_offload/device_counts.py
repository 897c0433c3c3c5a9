"""What running on two devices is measured by: per layer where experts ran, and where the time went."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.layer_plan import FETCH, GPU


class LayerTimes(NamedTuple):
    """Points on the host's clock within one layer."""

    began: float
    planned: float
    enqueued: float
    ahead: float  # prefetches queued; the CPU's job begins
    ran: float  # the CPU's job is through
    ended: float


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """Totals of one layer. gpu_experts ran from a slot, fetched_experts were copied on demand first; rows likewise."""

    calls: int
    cpu_experts: int
    gpu_experts: int
    fetched_experts: int
    cpu_rows: int
    gpu_rows: int
    cpu_seconds: float
    resident: int  # slots that the layer's experts have now


class DeviceCounts:
    """A running tally of the dispatcher, one thread at a time."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.steps = 0
        self.device_seconds = 0.0
        self.step_seconds = 0.0
        self.exposed_seconds = 0.0  # the device waited for copies, and nothing else worked
        self._calls = np.zeros(layers, np.int64)
        self._experts = np.zeros((layers, 3), np.int64)  # CPU, from a slot, fetched
        self._rows = np.zeros((layers, 2), np.int64)
        self._cpu_seconds = np.zeros(layers)
        self._resident = np.zeros(layers, np.int64)
        self.seconds = dict.fromkeys(("plan", "enqueue", "look ahead", "cpu experts", "join"), 0.0)

    def add(
        self,
        layer: int,
        times: LayerTimes,
        action: NDArray[np.int8],
        rows: NDArray[np.int64],
        cpu: NDArray[np.int64],
        slots: NDArray[Any],
    ) -> None:
        """One call of a layer: what was planned, and the positions `cpu` that the CPU ran in the end."""
        fetched = int(np.count_nonzero(action == FETCH))
        on_gpu = int(np.count_nonzero(action == GPU))
        turned_away = len(cpu) - (len(action) - fetched - on_gpu)
        by_cpu = int(rows[cpu].sum())
        self._calls[layer] += 1
        self._experts[layer] += (len(cpu), on_gpu, fetched - turned_away)
        self._rows[layer] += (by_cpu, int(rows.sum()) - by_cpu)
        self._cpu_seconds[layer] += times.ran - times.ahead
        self._resident[layer] = np.count_nonzero(slots >= 0)
        for name, start, end in zip(self.seconds, times, times[1:], strict=False):
            self.seconds[name] += end - start

    def layer(self, layer: int) -> LayerCounts:
        """What was counted of one layer."""
        cpu, gpu, fetched = self._experts[layer].tolist()
        cpu_rows, gpu_rows = self._rows[layer].tolist()
        return LayerCounts(
            int(self._calls[layer]), cpu, gpu, fetched, cpu_rows, gpu_rows, float(self._cpu_seconds[layer]),
            int(self._resident[layer]),
        )  # fmt: skip
