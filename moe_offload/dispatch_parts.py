"""What the dispatcher works with: the pieces of one model, and the two protocols at its edges."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.cost_model import CostModel
from moe_offload.scheduling.forecast import Forecast
from moe_offload.transfer.accelerator import Accelerator, Buffer, Event
from moe_offload.transfer.copy_queue import CopyQueue
from moe_offload.transfer.device_slots import DeviceSlots
from moe_offload.transfer.expert_cache import ExpertCache


class LayerWork(Protocol):
    """Does one layer's work. Positions are those of the active experts."""

    def on_device(self, positions: NDArray[np.int64], slots: Sequence[int]) -> None:
        """Enqueue these experts on the compute stream; their bytes are in the slots by then."""

    def on_cpu(self, positions: NDArray[np.int64]) -> None:
        """Run these experts on the calling thread's team, and return when they are through."""

    def join(self, *, cpu: bool) -> None:
        """Enqueue what makes the layer's output of both shares; `cpu`: whether the CPU has one."""


class HostRecords(Protocol):
    """Expert records in host memory that copies may read."""

    def hold(self, layer: int, expert: int) -> Buffer:
        """The record, in host memory until `release`; read from disk where it is not here."""

    def release(self, layer: int, expert: int, after: Event | None = None) -> None:
        """The record may be replaced once `after` has passed."""

    def is_here(self, layer: int) -> NDArray[np.bool_]:
        """[E] which records are in host memory."""

    def read_ahead(self, keys: Iterable[tuple[int, int]]) -> int:
        """These will be asked for; how many are being read."""


class Parts(NamedTuple):
    """What the dispatcher works with; all of one model."""

    accelerator: Accelerator
    slots: DeviceSlots
    cache: ExpertCache
    queue: CopyQueue[tuple[int, int]]
    records: HostRecords
    costs: CostModel
    kinds: Sequence[str]  # [L] the cost model's name of each layer's experts
    record_bytes: Sequence[int]  # [L]
    forecast: Forecast
