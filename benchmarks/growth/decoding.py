"""A decode step on a virtual server whose KV cache lies where the product's division of device memory puts it."""

from typing import Any

from benchmarks.growth.axes import Cell
from benchmarks.servers.routing import Choices
from benchmarks.servers.simulation import Simulation, no_function
from moe_offload.scheduling.layer_plan import LayerCosts, LayerPlan, LayerState, Planner
from moe_offload.scheduling.memory_share import MemoryShare
from moe_offload.scheduling.policies import Policy
from moe_offload.transfer.accelerator import Work

Planned = tuple[LayerState, LayerCosts]


class Recorder:
    """A planner that keeps the latest states it was asked about, for them to be timed afterwards."""

    def __init__(self, planner: Planner, most: int) -> None:
        self._planner, self._most = planner, most
        self.seen: list[Planned] = []

    def __call__(self, state: LayerState, costs: LayerCosts) -> LayerPlan:
        self.seen.append((state, costs))
        del self.seen[: -self._most]
        return self._planner(state, costs)


class GrownSimulation(Simulation):
    """As `Simulation`, with any context and layers whose KV cache is in host memory: the CPU attends to those."""

    def __init__(
        self, server: str, cell: Cell, share: MemoryShare, policy: Policy, choices: Choices, seen: int
    ) -> None:
        super().__init__(server, cell.shape, policy, choices, seen, guarded=False, slots=share.slots)
        self._positions = cell.context * cell.batch
        self._kv_on_device = share.kv_on_device

    def step(self) -> None:
        """One token of every sequence."""
        for _ in range(self.shape.layers):
            call = self._calls[self._next]
            self._next += 1
            here = self._kv_on_device[call.layer]
            if not here:
                self._attend_on_host()
            self._layers.begin(self.batch, self._positions if here else 0, call.rows)
            self.dispatcher.run(call.layer, call.experts, call.rows, self.batch, self._layers)
        self._layers.end(self.batch)
        self.dispatcher.end_step()

    def _attend_on_host(self) -> None:
        """Queries come over, the CPU reads the layer's keys and values; its answer goes back with what is launched."""
        accelerator: Any = self.accelerator
        queries = Work(link_bytes=self.batch * self.shape.record.hidden_size * 4, rows=())
        accelerator.launch(accelerator.compute, no_function, (), (), queries, "queries")
        accelerator.compute.synchronize()
        cache = self._positions * self.shape.kv_bytes // self.shape.layers
        accelerator.run_host(lambda: None, Work(cache, 0, (1,)))
