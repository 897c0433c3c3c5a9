"""One run: a server decodes a routing with a cache of a given size, looking ahead in one of several ways.

As benchmarks/servers (simulation.py there says what is simulated), with our policy and its guard. What differs:

    none         no expert is copied for the next layers; what is worth more than the cache's least still comes in
    popularity   the next layers' experts by popularity and the last token's: what there is without a predictor
    foresight    by predictions, made on the host when the prefetcher asks, which takes the time that it is given

Forced, a run goes without the guard and the gate: what copying ahead brings or costs where nothing holds it back.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.prefetch.foresight import Foresight
from benchmarks.servers.routing import Choices
from benchmarks.servers.shapes import Shape
from benchmarks.servers.simulation import Result, Simulation, Steps, measure
from moe_offload.prefetch_gate import PrefetchGate
from moe_offload.scheduling.predicted import Foreseen, PredictedUse
from moe_offload.transfer.accelerator import Work

Ahead = Literal["none", "popularity"] | Foresight


class Way(NamedTuple):
    """A way to look ahead; forced: as above."""

    ahead: Ahead
    forced: bool = False


class How(NamedTuple):
    """What the guard and the gate said of a step."""

    dynamic: bool
    ahead: bool


class Fixed(PrefetchGate):
    """Open, or shut, always."""

    def __init__(self, *, is_open: bool) -> None:
        super().__init__()
        self.open = is_open

    def begin_step(self, tokens: int) -> None:
        """Stays."""


class LookingAhead(Simulation):
    """A simulation whose forecast is told of the next layers. taken: of each step, in which way and how long."""

    def __init__(self, server: str, shape: Shape, choices: Choices, seen: int, slots: int, way: Way) -> None:
        ahead, forced = way
        super().__init__(server, shape, "ours", choices, seen, guarded=not forced, slots=slots)
        self.taken: list[tuple[How, float]] = []
        prefetcher = self.dispatcher.prefetcher
        assert prefetcher is not None
        self._foresight = ahead if isinstance(ahead, Foresight) else None
        self._at = seen
        self._gate = prefetcher.gate
        if forced or ahead == "none":
            self._gate = prefetcher.gate = Fixed(is_open=ahead != "none")

    def step(self) -> None:
        began = self.accelerator.now()
        super().step()
        how = How(self.dispatcher.dynamic, self.dispatcher.dynamic and self._gate.open)
        self.taken.append((how, self.accelerator.now() - began))

    def _forecast(self, foreseen: int) -> PredictedUse:
        self._predicted = PredictedUse(super()._forecast(foreseen), self.shape.layers)
        return self._predicted

    def before_experts(self, layer: int) -> None:
        """What goes into this layer's experts tells of the next layers."""
        foresight, last = self._foresight, self.shape.layers - 1
        if foresight is not None and layer < last:
            ahead = range(layer + 1, min(layer + 3, last) + 1)
            self._predicted.expect(ahead, _Source(self, foresight, self._at, layer))
        self._at += layer == last

    def work_for(self, seconds: float) -> None:
        """The host is busy for so long."""
        profile = self.accelerator.profile
        seconds -= profile.host_job_seconds + profile.host_expert_seconds
        if seconds > 0:
            work = Work(int(seconds * profile.host_read_gbs * 1e9), 0, (1,))
            self.accelerator.run_host(lambda: None, work, "predictor")


class _Source:
    """What is known at one layer; all of it is computed when the first is asked for."""

    def __init__(self, simulation: LookingAhead, foresight: Foresight, step: int, layer: int) -> None:
        self._simulation, self._foresight, self._step, self._layer = simulation, foresight, step, layer
        self._made = False

    def __call__(self, layer: int) -> Foreseen:
        if not self._made:
            self._made = True
            self._simulation.work_for(self._foresight.seconds)
        place = self._step, layer, layer - self._layer - 1
        presence, rows = (array[place].astype(np.float64) for array in self._foresight[:2])
        return Foreseen(presence, rows, self._simulation.batch)


class Prefetched(NamedTuple):
    """A run. gate: whether copies ahead were found to pay. trial_steps: share of the counted steps that tried something
    else than what the guards took; settled_seconds: of the others, per step.
    """

    result: Result
    gate: str
    trial_steps: float
    settled_seconds: float


def run(server: str, shape: Shape, choices: Choices, steps: Steps, share: float, way: Way) -> Prefetched:
    """Decode with a cache of this share of the experts."""
    slots = max(int(share * shape.layers * shape.experts), 2)
    simulation = LookingAhead(server, shape, choices, steps.seen, slots, way)
    for _ in range(steps.warm):
        simulation.step()
    simulation.taken.clear()
    result = measure(simulation, steps.counted)
    taken = {how: [s for each, s in simulation.taken if each == how] for how in {each for each, _ in simulation.taken}}
    usual = max(taken, key=lambda how: len(taken[how]))
    gate = ("open" if usual.ahead else "shut") if usual.dynamic else "static"
    settled = taken[usual]
    return Prefetched(result, gate, 1 - len(settled) / steps.counted, sum(settled) / len(settled))


def of_layers(shape: Shape, layers: int) -> Shape:
    """The same model with fewer layers."""
    return replace(
        shape,
        layers=layers,
        dense_params=shape.dense_params * layers // shape.layers,
        kv_bytes=shape.kv_bytes * layers // shape.layers,
    )
