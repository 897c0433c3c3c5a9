"""One cell: every contestant decodes the same routing with a cache of the same size. Simulated, the routing synthetic.

What is simulated, and how, is `benchmarks/servers/simulation.py`. There is no guard and no gate here, as their trials
would weigh too much in short runs; what they cost is measured in benchmarks.servers and benchmarks.prefetch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from benchmarks.legacy_servers.bound import Bound, bound_of
from benchmarks.legacy_servers.contestants import CONTESTANTS, FARTHER, PREDICTION, Ahead, Contestant
from benchmarks.legacy_servers.recall import MadeUp
from benchmarks.legacy_servers.settings import Cell, shape_of
from benchmarks.prefetch.simulation import Fixed
from benchmarks.servers.routing import Choices, generate
from benchmarks.servers.shapes import Shape
from benchmarks.servers.simulation import Result, Simulation, Steps, measure
from moe_offload.scheduling.forecast import Forecast
from moe_offload.scheduling.predicted import Foreseen, PredictedUse
from moe_offload.transfer.accelerator import Work
from moe_offload.transfer.server_profile import ServerProfile, find_profile

HORIZON = 3  # layers that a prediction looks ahead


class Contest(Simulation):
    """A contestant on a server, looking ahead in one of its ways."""

    def __init__(
        self, server: ServerProfile, shape: Shape, contestant: Contestant, ahead: Ahead, choices: Choices, seen: int,
        slots: int,
    ) -> None:  # fmt: skip
        """choices [steps, L, T, K], the first `seen` of them known beforehand."""
        self._contestant, self._ahead = contestant, ahead
        self._at = seen
        self._made_up = MadeUp(choices, shape.experts, contestant.recall, FARTHER)
        super().__init__(server, shape, contestant.policy, choices, seen, guarded=False, slots=slots)
        if self.dispatcher.prefetcher is not None:
            self.dispatcher.prefetcher.gate = Fixed(is_open=ahead != "never")

    def _forecast(self, foreseen: int) -> Forecast:
        usual = super()._forecast(self._contestant.foreseen)
        if self._ahead != "recall":
            return usual
        self._predicted = PredictedUse(usual, self.shape.layers)
        return self._predicted

    def _fill(self) -> None:
        """Whole layers, from the last on, as llama.cpp does; or the hottest experts."""
        if not self._contestant.whole_layers:
            super()._fill()
            return
        shape = self.shape
        layers = min(max(len(self.slots) - 1, 0) // shape.experts, shape.layers)
        for layer in range(shape.layers - layers, shape.layers):
            for expert in range(shape.experts):
                self.dispatcher.fill(layer, expert)
        self.dispatcher.finish_filling(pin=True)

    def skip(self, steps: int) -> None:
        self._at += steps
        super().skip(steps)

    def before_experts(self, layer: int) -> None:
        last = self.shape.layers - 1
        if self._ahead == "recall" and layer < last:
            coming = range(layer + 1, min(layer + HORIZON, last) + 1)
            self._predicted.expect(coming, _Source(self, self._made_up, self._at, layer))
        self._at += layer == last

    def predict(self) -> None:
        """The host is busy with a layer's predictions."""
        profile, (first, more) = self.profile, PREDICTION
        seconds = first + more * self.batch - profile.host_job_seconds - profile.host_expert_seconds
        if seconds > 0:
            work = Work(int(seconds * profile.host_read_gbs * 1e9), 0, (1,))
            self.accelerator.run_host(lambda: None, work, "predictor")


class _Source:
    """What is said at one layer of the next ones, all of it paid for when the first is asked for."""

    def __init__(self, contest: Contest, made_up: MadeUp, step: int, layer: int) -> None:
        self._contest, self._made_up, self._step, self._layer = contest, made_up, step, layer
        self._paid = False

    def __call__(self, layer: int) -> Foreseen:
        if not self._paid:
            self._paid = True
            self._contest.predict()
        presence, rows = self._made_up.say(self._step, layer, layer - self._layer)
        return Foreseen(presence, rows, self._contest.batch)


def run(
    server: ServerProfile,
    shape: Shape,
    contestant: Contestant,
    ahead: Ahead,
    choices: Choices,
    steps: Steps,
    slots: int,
) -> Result:
    """Decode, looking ahead in one way."""
    made = Contest(server, shape, contestant, ahead, choices, steps.seen, slots)
    # what keeps its placement for good needs no more than one
    adapts = made.policy.placement != "static" or ahead != "never"
    made.skip(0 if adapts else steps.warm - 1)
    for _ in range(steps.warm if adapts else 1):
        made.step()
    return measure(made, steps.counted)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell's figures. speeds: tokens per second, simulated, of each contestant's faster way, which `ways` names."""

    cell: Cell
    speeds: Mapping[str, float]
    ways: Mapping[str, Ahead]
    hits: Mapping[str, float]
    busy: Mapping[str, Mapping[str, float]]
    bound: Bound

    def to_dict(self) -> dict[str, object]:
        """For JSON, and back with `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> "Outcome":
        """The inverse of `to_dict`."""
        facts: dict[str, object] = dict(data)
        cell, bound = facts.pop("cell"), facts.pop("bound")
        if not isinstance(cell, dict) or not isinstance(bound, dict):
            raise ValueError("no outcome of a cell: cell and bound are not objects")
        made = Cell(**{**cell, "steps": Steps(**cell["steps"])})
        return cls(cell=made, bound=Bound(**bound), **facts)  # type: ignore[arg-type]


def contest(
    cell: Cell, server: ServerProfile, shape: Shape, choices: Choices, contestants: Sequence[Contestant] = CONTESTANTS
) -> Outcome:
    """All contestants on one routing."""
    speeds, ways, hits, busy = {}, {}, {}, {}
    never: dict[str, Result] = {}  # by policy: contestants that differ only in how they look ahead share this run
    for each in contestants:
        known = None if each.whole_layers else never.get(each.policy.name)
        found: dict[Ahead, Result] = {} if known is None else {"never": known}
        for ahead in each.runs:
            if ahead not in found:
                found[ahead] = run(server, shape, each, ahead, choices, cell.steps, cell.slots)
        if not each.whole_layers:
            never.setdefault(each.policy.name, found["never"])
        best = max(found, key=lambda ahead: found[ahead].tokens_per_second)
        result = found[best]
        speeds[each.name], ways[each.name] = round(result.tokens_per_second, 4), best
        hits[each.name], busy[each.name] = round(result.hits, 4), result.busy
    counted = choices[cell.steps.seen + cell.steps.warm :][: cell.steps.counted]
    return Outcome(cell, speeds, ways, hits, busy, bound_of(server, shape, counted, cell.slots))


@lru_cache(maxsize=2)
def _choices(model: str, weights: str, batch: int, steps: int) -> Choices:
    return generate(shape_of(model, weights), batch, steps)


def outcome(cell: Cell) -> Outcome:
    """A cell by its names; also what a worker process runs."""
    choices = _choices(cell.model, cell.weights, cell.batch, cell.steps.total)
    return contest(cell, find_profile(cell.server), cell.shape, choices)
