"""What a scheduler is told about one MoE layer of one token batch, and what it answers.

Letters: A active experts (those with at least one token), T tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Where an active expert's weights are, and what a plan does with it.
HOST, COMING, SLOT = 0, 1, 2
CPU, GPU, FETCH = 0, 1, 2


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Measured seconds of one kind of expert (shape and format) on this machine.

    cpu, gpu [N + 1]: seconds of an expert with n rows, among others in one job; index 0 is 0, and n > N costs in
    proportion to entry N. `copy`: seconds of one expert over the link. `cpu_start`, `gpu_start`: seconds for starting a
    job of any size on either. `join`: seconds to bring the CPU's share of the output to the device, paid once where
    both work.
    """

    cpu: NDArray[np.float64]
    gpu: NDArray[np.float64]
    copy: float
    cpu_start: float = 0.0
    gpu_start: float = 0.0
    join: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer before it is planned; arrays are [A], in the order of `experts`.

    rows: tokens of each expert, at least 1. where: HOST, COMING (being copied, or waiting to be) or SLOT. ready:
    seconds from now until an expert can be used on the device; 0 in a SLOT, meaningless on the HOST. value: seconds
    that having this expert on the device saves later, net of what has to make room for it; for HOST experts. link_busy,
    gpu_busy: seconds until the link (the device) is through with what it was given already. room: slots that fetched
    experts may take, all at once.
    """

    layer: int
    tokens: int
    experts: NDArray[np.int32]
    rows: NDArray[np.int64]
    where: NDArray[np.int8]
    ready: NDArray[np.float64]
    value: NDArray[np.float64]
    link_busy: float = 0.0
    gpu_busy: float = 0.0
    room: int = 1 << 30


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Who computes which expert: positions into the state's arrays.

    action [A]: CPU, GPU (from its slot, or when its copy has arrived) or FETCH. gpu_order: positions with GPU or FETCH
    in the order that the device runs them. fetch_order: positions with FETCH in the order of their copies. seconds: the
    makespan that the plan expects.
    """

    action: NDArray[np.int8]
    gpu_order: NDArray[np.int64]
    fetch_order: NDArray[np.int64]
    seconds: float


class Planner(Protocol):
    """Makes plans. Pure: the same state and costs give the same plan."""

    def __call__(self, state: LayerState, costs: LayerCosts) -> LayerPlan: ...


def curve(table: NDArray[np.float64], rows: int) -> float:
    """Seconds at `rows`, from a table as of `LayerCosts`."""
    last = len(table) - 1
    return float(table[rows] if rows <= last else table[last] * rows / last)
