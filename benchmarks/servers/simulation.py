"""One cell: a policy runs a model's decode steps (or a prompt) on a virtual server.

The code under test is the product's: `Dispatcher`, cache, copy queue, planner, prefetcher, guard and calibration, on a
ghost `VirtualAccelerator`. Simulated is what lies around it:

- attention, norms, router and shared experts: `DENSE_LAUNCHES` kernels a layer that read their f16 weights and the KV
  cache of `CONTEXT` positions, on the device; the output head once a step
- hidden states and the router's answer to the host, the CPU's share back: kernels over mapped memory
- experts on the device: `EXPERT_LAUNCHES` kernels for all experts of a job (grouped kernels)
- experts in host memory, all of them

The cache of experts has what the card holds besides f16 weights, KV cache and `WORKSPACE`, at most half of the experts,
so that no large card makes a cell trivial. Before the first step the forecast has seen the routing of the warm-up part,
and every cache holds the experts that were used most in it, those that are kept for good as well as those that adapt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.servers.routing import Choices
from benchmarks.servers.shapes import Shape
from moe_offload.dispatch_parts import Parts
from moe_offload.dispatcher import Dispatcher
from moe_offload.scheduling.calibration import calibrate
from moe_offload.scheduling.cost_model import CostModel
from moe_offload.scheduling.forecast import Forecast, PerfectForecast, RoutedCall
from moe_offload.scheduling.guard import Guard
from moe_offload.scheduling.policies import Policy, find_policy, plan_static
from moe_offload.scheduling.recent_use import RecentUse
from moe_offload.transfer.accelerator import Buffer, Event, HostArena, OutOfDeviceMemoryError, Work
from moe_offload.transfer.copy_queue import CopyQueue
from moe_offload.transfer.device_slots import DeviceSlots
from moe_offload.transfer.eviction import make_eviction
from moe_offload.transfer.expert_cache import ExpertCache
from moe_offload.transfer.server_profile import ServerProfile, find_profile
from moe_offload.transfer.virtual import VirtualAccelerator

CONTEXT = 512  # positions of each sequence
MOST = 0.5  # of the experts that the cache holds
WORKSPACE = 512 << 20
DENSE_LAUNCHES = 10
EXPERT_LAUNCHES = 3
FORESEEN = 8  # steps that the oracle knows
NEXT_ONLY = "oracle-next"  # an oracle that knows the next call of every layer, and nothing beyond
STREAM_SLOTS = 8  # of a static placement that fetches: where fetched experts take turns


def no_function(*_: object) -> None:
    """A ghost calls nothing."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How many are for what: known beforehand, for the forecast and the first placement; run, not counted; counted."""

    seen: int
    warm: int
    counted: int

    @property
    def total(self) -> int:
        """Steps of routing needed."""
        return self.seen + self.warm + self.counted


class Result(NamedTuple):
    """Simulated. busy: share of the time that copies in, kernels and the CPU's experts took. hits: of wanted experts,
    on the device or on their way. verdict: the guard's, where there is one.
    """

    tokens_per_second: float
    seconds_per_step: float
    slots: int
    hits: float
    busy: dict[str, float]
    verdict: str | None


class _Records:
    """All experts in host memory; one stands for all, as a ghost has no bytes."""

    def __init__(self, arena: HostArena, shape: Shape) -> None:
        self._record = arena.take(shape.expert_bytes, "record")
        self._record.host(write=True)
        self._all_here = np.ones(shape.experts, np.bool_)

    def hold(self, layer: int, expert: int) -> Buffer:
        return self._record

    def release(self, layer: int, expert: int, after: Event | None = None) -> None:
        pass

    def is_here(self, layer: int) -> NDArray[np.bool_]:
        return self._all_here

    def read_ahead(self, keys: object) -> int:
        return 0


class _Layers:
    """The model around the experts, and a `LayerWork`."""

    def __init__(self, accelerator: VirtualAccelerator, shape: Shape, slots: DeviceSlots, arena: HostArena) -> None:
        self._accelerator, self._shape, self._slots = accelerator, shape, slots
        self._out = accelerator.allocate(4096, "output")
        self._hidden, self._cpu_out = arena.take(4096, "hidden states"), arena.take(4096, "output of the CPU's experts")
        self._rows: NDArray[np.int64] = np.empty(0, np.int64)
        self._nbytes = shape.expert_bytes
        self._sent = 0
        self._on_device = False  # whether the device has a share of the layer

    def begin(self, tokens: int, positions: int, rows: NDArray[np.int64]) -> None:
        """Everything of a layer before its experts; `positions` of KV cache are read in all."""
        shape, accelerator = self._shape, self._accelerator
        params = shape.dense_params // shape.layers
        seen = positions * shape.kv_bytes // shape.layers
        # one entry that multiplies, one that only reads
        for nbytes, flops, launches in ((2 * params, 2 * params, DENSE_LAUNCHES), (seen, 0, 0)):
            work = Work(nbytes, flops, (tokens,), launches=launches)
            accelerator.launch(accelerator.compute, no_function, (), (), work, "attention")
        self._sent = tokens * shape.record.hidden_size * 4
        work = Work(link_bytes=self._sent, rows=())
        accelerator.launch(accelerator.compute, no_function, (), (self._hidden,), work, "export")
        accelerator.compute.synchronize()
        self._rows, self._on_device = rows, False

    def end(self, sequences: int) -> None:
        """The output head, and the wait for its answer."""
        params = self._shape.head_params
        work = Work(2 * params, 2 * params, (sequences,), launches=2)
        self._accelerator.launch(self._accelerator.compute, no_function, (), (), work, "head")
        self._accelerator.compute.synchronize()

    def on_device(self, positions: NDArray[np.int64], slots: Sequence[int]) -> None:
        """As of `LayerWork`, like the next two."""
        shape, self._on_device = self._shape, True
        reads = [self._slots.buffer(slot).part(0, self._nbytes) for slot in slots]
        work = Work(self._nbytes, shape.flops_per_row, self._rows[positions], launches=EXPERT_LAUNCHES)
        self._accelerator.launch(self._accelerator.compute, no_function, reads, (self._out,), work, "experts")

    def on_cpu(self, positions: NDArray[np.int64]) -> None:
        work = Work(self._nbytes, self._shape.flops_per_row, self._rows[positions])
        self._accelerator.run_host(lambda: None, work)
        self._cpu_out.host(write=True)

    def join(self, *, cpu: bool) -> None:
        reads = [buffer for buffer, used in ((self._out, self._on_device), (self._cpu_out, cpu)) if used]
        work = Work(link_bytes=self._sent if cpu else 0, rows=())
        self._accelerator.launch(self._accelerator.compute, no_function, reads, (self._out,), work, "join")


class _Bench:
    """Experts to calibrate with."""

    def __init__(self, accelerator: VirtualAccelerator, shape: Shape) -> None:
        self._accelerator, self._shape = accelerator, shape

    def kinds(self) -> Sequence[tuple[str, int]]:
        return [(self._shape.kind, self._shape.expert_bytes)]

    def run_cpu(self, kind: str, rows: list[int]) -> None:
        self._accelerator.run_host(lambda: None, Work(self._shape.expert_bytes, self._shape.flops_per_row, rows))

    def run_gpu(self, kind: str, rows: list[int]) -> None:
        work = Work(self._shape.expert_bytes, self._shape.flops_per_row, rows, launches=EXPERT_LAUNCHES)
        self._accelerator.launch(self._accelerator.compute, no_function, (), (), work)


@cache
def _measured_costs(profile: ServerProfile, shape: Shape) -> dict[str, Any]:
    with VirtualAccelerator(profile, ghost=True) as accelerator:
        return calibrate(accelerator, _Bench(accelerator, shape)).to_dict()


def measured_costs(profile: ServerProfile, shape: Shape) -> CostModel:
    """What the product's calibration finds on that server, with grouped kernels."""
    return CostModel.from_dict(_measured_costs(profile, shape))


def cache_slots(profile: ServerProfile, shape: Shape, positions: int) -> int:
    """How many experts the card's cache has with so many positions of KV cache; 0 where the model does not fit."""
    left = profile.memory_bytes - shape.dense_bytes - WORKSPACE - positions * shape.kv_bytes
    return max(min(int(MOST * shape.layers * shape.experts), left // (-(-shape.expert_bytes // 256) * 256)), 0)


def calls_of(choices: Choices) -> list[RoutedCall]:
    """[steps, L, T, K] as calls of layers, in order."""
    calls = []
    for step in choices:
        for layer, chosen in enumerate(step):
            experts, rows = np.unique(chosen, return_counts=True)
            calls.append(RoutedCall(layer, experts.astype(np.int32), rows.astype(np.int64)))
    return calls


class Simulation:
    """A policy on a server, step by step."""

    def __init__(
        self, server: str | ServerProfile, shape: Shape, policy: str | Policy, choices: Choices, seen: int, *,
        guarded: bool, slots: int | None = None,
    ) -> None:  # fmt: skip
        """choices [steps, L, T, K]; the first `seen` steps are known beforehand, and not run. slots: of the cache, on a
        card with memory for it; None: as many as the server's card holds, up to `MOST`.
        """
        self.profile = server if isinstance(server, ServerProfile) else find_profile(server)
        self.shape = shape
        if isinstance(policy, Policy):
            self.policy = policy
        else:
            self.policy = find_policy("oracle" if policy == NEXT_ONLY else policy)
        self.batch = choices.shape[2]
        positions = CONTEXT * self.batch
        room = shape.dense_bytes + WORKSPACE + positions * shape.kv_bytes
        if slots is None:
            card, slots = self.profile, cache_slots(self.profile, shape, positions)
        else:
            card = replace(self.profile, memory_bytes=room + (slots + 1) * (shape.expert_bytes + 256))
        self.accelerator = VirtualAccelerator(card, ghost=True)
        self.accelerator.reserve(shape.dense_bytes + WORKSPACE - (1 << 20), "weights and workspace")
        self.accelerator.reserve(positions * shape.kv_bytes, "KV cache")
        self.slots = DeviceSlots(self.accelerator, shape.expert_bytes, slots, least=2)
        experts = [shape.experts] * shape.layers
        record_bytes = [shape.expert_bytes] * shape.layers
        eviction = make_eviction(self.policy.eviction)
        self.cache = ExpertCache(shape.layers, experts, len(self.slots), eviction, record_bytes=record_bytes)
        self._known = calls_of(choices[:seen])
        self._calls = calls_of(choices[seen:])
        self._next = 0
        forecast = self._forecast(1 if policy == NEXT_ONLY else FORESEEN)
        queue: CopyQueue[tuple[int, int]] = CopyQueue(self.accelerator)
        arena = self.accelerator.host_arena(shape.expert_bytes + (64 << 10))
        costs = measured_costs(self.profile, shape)
        self.guard = Guard() if guarded else None
        self.dispatcher = Dispatcher(
            Parts(
                self.accelerator, self.slots, self.cache, queue, _Records(arena, shape), costs,
                [shape.kind] * shape.layers, record_bytes, forecast,
            ),
            self.policy, self.guard,
        )  # fmt: skip
        self._layers = _Layers(self.accelerator, shape, self.slots, arena)
        self._fill()

    def _forecast(self, foreseen: int) -> Forecast:
        shape = self.shape
        if self.policy.forecast == "perfect":
            return PerfectForecast(shape.layers, shape.experts, self._calls, foreseen=foreseen)
        forecast = RecentUse(shape.layers, shape.experts, top_k=shape.top_k)
        for call in self._known:
            forecast.observe(call.layer, call.experts, call.rows, self.batch)
        return forecast

    def _fill(self) -> None:
        """The experts that were used most in what is known, with a slot that streams for policies that need one."""
        shape, static = self.shape, self.policy.placement == "static"
        uses = np.zeros((shape.layers, shape.experts))
        for call in self._known:
            uses[call.layer, call.experts] += call.rows
        count = len(self.slots)
        if static and self.policy.planner is not plan_static:
            count -= min(STREAM_SLOTS, max(count // 4, 1))
        order = np.argsort(-uses, axis=None, kind="stable")[:count]
        for layer, expert in zip(*np.unravel_index(order[::-1], uses.shape), strict=True):  # the most used last: LRU
            self.dispatcher.fill(int(layer), int(expert))
        self.dispatcher.finish_filling(pin=static)

    def skip(self, steps: int) -> None:
        """As if so many steps had been run."""
        self._next += steps * self.shape.layers

    def before_experts(self, layer: int) -> None:
        """Its router has spoken, in a step of decoding; for who wants to know."""

    def step(self) -> None:
        """One token of every sequence."""
        positions = CONTEXT * self.batch
        for _ in range(self.shape.layers):
            call = self._calls[self._next]
            self._next += 1
            self._layers.begin(self.batch, positions, call.rows)
            self.before_experts(call.layer)
            self.dispatcher.run(call.layer, call.experts, call.rows, self.batch, self._layers)
        self._layers.end(self.batch)
        self.dispatcher.end_step()

    def prompt(self) -> None:
        """All tokens are one prompt."""
        for _ in range(self.shape.layers):
            call = self._calls[self._next]
            self._next += 1
            self._layers.begin(self.batch, self.batch, call.rows)
            self.dispatcher.run(call.layer, call.experts, call.rows, self.batch, self._layers)
        self._layers.end(1)
        self.dispatcher.end_step()


def run_cell(server: str, shape: Shape, policy: str, choices: Choices, steps: Steps, *, guarded: bool) -> Result | None:
    """Decode. None where the model does not fit the card."""
    try:
        simulation = Simulation(server, shape, policy, choices, steps.seen, guarded=guarded)
    except OutOfDeviceMemoryError:
        return None
    # what keeps its placement for good needs no more than one
    adapts = simulation.policy.placement != "static"
    simulation.skip(0 if adapts else steps.warm - 1)
    for _ in range(steps.warm if adapts else 1):
        simulation.step()
    return measure(simulation, steps.counted)


def run_prompt(server: str, shape: Shape, policy: str, choices: Choices, seen: int) -> Result | None:
    """One prompt of T tokens after `seen` prompts."""
    try:
        simulation = Simulation(server, shape, policy, choices, seen, guarded=False)
    except OutOfDeviceMemoryError:
        return None
    started, counters, busy = _begin(simulation)
    simulation.prompt()
    return _end(simulation, 1, simulation.batch, started, counters, busy)


def measure(simulation: Simulation, steps: int) -> Result:
    """The next steps."""
    begun = _begin(simulation)
    for _ in range(steps):
        simulation.step()
    return _end(simulation, steps, simulation.batch, *begun)


def _begin(simulation: Simulation) -> tuple[float, Any, dict[str, float]]:
    return simulation.accelerator.now(), simulation.cache.total(), dict(simulation.accelerator.busy)


def _end(
    simulation: Simulation, steps: int, tokens: int, started: float, counters: Any, busy: dict[str, float]
) -> Result:
    seconds = simulation.accelerator.now() - started
    used = {
        name: round((total - busy[engine]) / seconds, 3)
        for name, engine, total in (
            (name, engine, simulation.accelerator.busy[engine])
            for name, engine in (("link", "h2d"), ("device", "compute"), ("cpu", "host"))
        )
    }
    verdicts = simulation.guard.verdicts() if simulation.guard is not None else ()
    return Result(
        tokens * steps / seconds, seconds / steps, len(simulation.slots),
        (simulation.cache.total() - counters).hit_rate, used, verdicts[0].verdict if verdicts else None,
    )  # fmt: skip
