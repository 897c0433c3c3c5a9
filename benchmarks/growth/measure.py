"""One cell: what the scheduler itself takes here, measured, and what the server makes of it, simulated.

Measured, microseconds of this machine: `plan_us`, the planner on states as they came up in the simulated steps;
`forecast_us`, one observation, and what is expected of the layer next; `lookup_us`, a layer's experts in the cache;
`divide_us`, device memory between KV cache and slots, once a generation; `layer_us`, all that the host does for a
layer, with the virtual accelerator's own bookkeeping in it. `scheduler_bytes`: what the program's own scheduling, cache
bookkeeping and forecast hold after a few steps, by tracemalloc.
Simulated: decode tokens/s, slots, layers whose KV cache is on the card. Weights and KV cache of all are sizes.
"""

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

from benchmarks.growth.axes import Cell
from benchmarks.growth.decoding import GrownSimulation, Recorder
from benchmarks.kv_share import demand_of
from benchmarks.reporting import spread
from benchmarks.servers.routing import Choices, generate
from benchmarks.servers.simulation import Steps
from benchmarks.servers.simulation import measure as simulate
from moe_offload.scheduling import policies
from moe_offload.scheduling.memory_share import MemoryShare, divide
from moe_offload.scheduling.policies import find_policy
from moe_offload.transfer import copy_queue, eviction, expert_cache

STATES = 48
LEAST_SLOTS = 2
_ENGINE = Path(str(policies.__file__)).parents[1]
_BOOKKEEPING = {Path(str(module.__file__)) for module in (expert_cache, eviction, copy_queue)}


def measure(server: str, cell: Cell, steps: Steps, rounds: int) -> dict[str, Any]:
    """All figures of a cell. The simulated ones are None where the model does not fit the card."""
    shape = cell.shape
    choices = generate(shape, cell.batch, steps.total)
    demand = demand_of(server, shape, cell.batch, cell.context)
    sizes = {
        "weights_gb": round(shape.layers * shape.experts * shape.expert_bytes / 1e9, 3),
        "kv_cache_gb": round(cell.batch * cell.context * shape.kv_bytes / 1e9, 3),
    }
    found: dict[str, Any] = {
        "experts": cell.experts, "layers": cell.layers, "batch": cell.batch, "context": cell.context, **sizes,
    }  # fmt: skip
    share = divide(demand) if demand.budget > 0 else MemoryShare((), 0)
    if share.slots < LEAST_SLOTS:
        return {**found, "measured": None, "simulated": None}
    policy = find_policy("ours")
    recorder = Recorder(policy.planner, STATES)
    simulation = GrownSimulation(server, cell, share, replace(policy, planner=recorder), choices, steps.seen)
    for _ in range(steps.warm):
        simulation.step()
    started = perf_counter()
    result = simulate(simulation, steps.counted)
    seconds = perf_counter() - started
    simulated = {
        "tokens_per_s": round(result.tokens_per_second, 3), "hits": round(result.hits, 4), "slots": result.slots,
        "kv_layers_on_card": sum(share.kv_on_device),
    }  # fmt: skip
    measured = {
        "plan_us": _each(lambda each: policy.planner(*each), recorder.seen, rounds),
        **_parts(simulation, rounds),
        "divide_us": _each(divide, [demand], rounds),
        "layer_us": round(1e6 * seconds / (steps.counted * cell.layers), 1),
        "scheduler_bytes": scheduler_bytes(server, cell, share, choices, steps.seen),
    }
    active = mean(len(state.experts) for state, _ in recorder.seen)
    return {**found, "active_experts": round(active, 1), "measured": measured, "simulated": simulated}


def _parts(simulation: GrownSimulation, rounds: int) -> dict[str, Any]:
    """Forecast and cache as the run left them, on the routing of its last step."""
    parts, tokens = simulation.dispatcher.parts, simulation.batch
    calls = simulation._calls[-simulation.shape.layers :]
    turns = count((simulation.dispatcher.step + 1) * len(calls))

    def forecast(call: Any) -> None:
        parts.forecast.observe(call.layer, call.experts, call.rows, tokens)
        parts.forecast.presence(call.layer, tokens)
        parts.forecast.expected_rows(call.layer, tokens)

    def lookup(call: Any) -> None:
        parts.cache.lookup(call.layer, call.experts, next(turns) // len(calls))

    return {
        "forecast_us": _each(forecast, calls, rounds),
        "lookup_us": _each(lookup, calls, rounds),
    }


def _each(what: Callable[[Any], object], items: list[Any], rounds: int) -> dict[str, float]:
    """Microseconds of a call: a sample is the mean over all items; the first round only warms up."""
    samples = []
    for _ in range(rounds + 1):
        started = perf_counter()
        for item in items:
            what(item)
        samples.append(1e6 * (perf_counter() - started) / len(items))
    return spread(samples[1:])


def scheduler_bytes(server: str, cell: Cell, share: MemoryShare, choices: Choices, seen: int) -> int:
    """What scheduling and its bookkeeping hold after two steps."""
    tracemalloc.start(2)
    try:
        simulation = GrownSimulation(server, cell, share, find_policy("ours"), choices, seen)
        for _ in range(2):
            simulation.step()
        gc.collect()
        traces = tracemalloc.take_snapshot().traces
    finally:
        tracemalloc.stop()
    return sum(trace.size for trace in traces if _by_the_program(trace.traceback))


def _by_the_program(frames: tracemalloc.Traceback) -> bool:
    """Whether the scheduler or its bookkeeping allocated this, by itself or through numpy's Python part."""
    frame = frames[-2] if len(frames) > 1 and "numpy" in Path(frames[-1].filename).parts else frames[-1]
    file = Path(frame.filename)
    return file.is_relative_to(_ENGINE) or file in _BOOKKEEPING
