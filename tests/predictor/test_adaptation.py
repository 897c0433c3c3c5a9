"""Online adaptation: better than frozen after the traffic changed, never worse for long, and switched off when told."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_offload.cpu_kernels.team import Team, ThreadTeam
from moe_offload.predictor.adaptation import RATE, Adaptation
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.predictor.fast_weights import Look, look_ahead
from moe_offload.predictor.network import SourceNetwork, input_size
from moe_offload.predictor.trace import DISTANCES

Floats = NDArray[np.float32]
HIDDEN, EXPERTS, TOP_K, LAYERS, TOKENS = 32, 16, 2, 3, 4
PROJECTED, UNITS = 8, 24


class Scores(NamedTuple):
    """Mean Brier score of what the network runs with, and of what was trained, in each stretch."""

    running: NDArray[np.float64]
    frozen: NDArray[np.float64]


class Traffic:
    """Layers route by a linear of the hidden states, disturbed; experts may be permuted, or chance may choose."""

    def __init__(self, seed: int, noise: float) -> None:
        self.random = np.random.default_rng(seed)
        self.rows = self.random.standard_normal((LAYERS, EXPERTS, HIDDEN)).astype(np.float32) * 2 * HIDDEN**-0.5
        self.order = np.arange(EXPERTS)
        self.noise = noise

    def looks(self) -> list[Look]:
        found = []
        for source in range(LAYERS):
            rows = np.zeros((DISTANCES, EXPERTS, HIDDEN), np.float32)
            targets = self.rows[source : source + DISTANCES]
            rows[: len(targets)] = targets
            found.append(Look(rows, np.zeros((DISTANCES, EXPERTS), np.float32)))
        return found

    def choose(self, layer: int, hidden: Floats) -> NDArray[np.int64]:
        scores = hidden @ self.rows[layer].T
        scores = scores + self.random.standard_normal(scores.shape) * self.noise
        return np.argsort(-scores[:, self.order], axis=1)[:, :TOP_K].copy()


def network(seed: int) -> SourceNetwork:
    """Units that see something, and a last stage of zeros."""
    rng = np.random.default_rng(seed)

    def r(*shape: int, scale: float = 1.0) -> Floats:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    size = input_size(EXPERTS, PROJECTED)
    return SourceNetwork(
        r(PROJECTED, HIDDEN, scale=HIDDEN**-0.5), r(PROJECTED, scale=0.1), r(UNITS, size, scale=0.2), r(UNITS),
        r(UNITS, size, scale=0.2), r(UNITS), (), np.zeros((DISTANCES, EXPERTS, UNITS), np.float32),
        np.zeros((DISTANCES, EXPERTS), np.float32), np.full((2, DISTANCES), 1.5, np.float32),
        np.full((2, DISTANCES), -0.3, np.float32),
    )  # fmt: skip


def brier(fast: FastNetwork, chosen: NDArray[np.int64], distance: int) -> float:
    assert fast.seen is not None
    p = fast.seen.plan.probabilities.reshape(-1, DISTANCES, EXPERTS)[:, distance]
    came = np.zeros(p.shape)
    np.put_along_axis(came, chosen, 1.0, axis=1)
    return float(((p - came) ** 2).mean())


def run(
    team: Team,
    traffic: Traffic,
    steps: int,
    units: bool,
    stretch: int = 100,
    learn: bool = True,
    shift: int | None = None,
) -> tuple[Scores, Adaptation]:
    """Every source predicts, all layers are observed; at step `shift` the experts change places."""
    networks = [network(n) if units else look_ahead(EXPERTS) for n in range(LAYERS)]
    fast, frozen = (FastNetwork(traffic.looks(), networks, TOP_K, team) for _ in range(2))
    adaptation = Adaptation(fast, learn=learn)
    running, trained = np.zeros((2, steps))
    for step in range(steps):
        if step == shift:
            traffic.order = np.roll(np.arange(EXPERTS), 5)
        fast.begin_step(TOKENS, 1, anew=step == 0)
        frozen.begin_step(TOKENS, 1, anew=step == 0)
        hidden = traffic.random.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
        chosen = None
        for layer in range(LAYERS):
            for each in (fast, frozen):
                each.predict(layer, hidden, chosen)
            adaptation.record(layer)
            chosen = traffic.choose(layer, hidden)
            running[step] += brier(fast, chosen, 0) / LAYERS
            trained[step] += brier(frozen, chosen, 0) / LAYERS
            adaptation.observe(layer, chosen)
            for each in (fast, frozen):
                each.observe(layer, chosen)
    return Scores(*(each.reshape(-1, stretch).mean(axis=1) for each in (running, trained))), adaptation


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with ThreadTeam(1) as made:
        yield made


@pytest.mark.parametrize("units", [True, False])
def test_follows_a_shift(units: bool, team: Team) -> None:
    scores, adaptation = run(team, Traffic(0, noise=0.5), 1000, units, shift=300)
    assert scores.frozen[-3:].mean() > 2 * scores.frozen[:3].mean()  # what was trained is wrong now
    assert scores.running[-3:].mean() < 0.92 * scores.frozen[-3:].mean()
    assert (scores.running < 1.02 * scores.frozen).all()
    assert adaptation.state == "adapted"


class Turning(Traffic):
    """Experts change places every so many steps, `places` in all, and then as at first."""

    def __init__(self, every: int, places: int) -> None:
        super().__init__(1, noise=0.3)
        self.every, self.places, self.calls = every, places, 0

    def choose(self, layer: int, hidden: Floats) -> NDArray[np.int64]:
        self.order = np.roll(np.arange(EXPERTS), 5 * (self.calls // (LAYERS * self.every) % self.places))
        self.calls += 1
        return super().choose(layer, hidden)


@pytest.mark.parametrize("kind", ["right already", "chance", "turning"])
def test_never_worse(kind: str, team: Team) -> None:
    """Traffic that there is little to learn from: 2 percent over any 100 steps at most."""
    kinds = {"right already": Traffic(1, 0.3), "chance": Traffic(1, 50.0), "turning": Turning(60, EXPERTS)}
    scores, _ = run(team, kinds[kind], 800, True)
    assert (scores.running < 1.02 * scores.frozen).all(), scores.running / scores.frozen


def test_never_worse_for_long(team: Team) -> None:
    """What was learned turns wrong at once, and what was trained right: 100 steps later the guard has seen it."""
    scores, adaptation = run(team, Turning(300, 2), 1000, True)
    ratio = scores.running / scores.frozen
    assert ratio[5] < 0.97  # it had learned
    assert ratio[6] < 1.4
    assert (ratio[7:9] < 1.02).all() and adaptation._rate.min() < RATE


def test_off(team: Team) -> None:
    scores, adaptation = run(team, Traffic(2, noise=0.3), 200, True, learn=False)
    assert (scores.running == scores.frozen).all()
    assert adaptation.state == "off"
    assert 0.5 < (adaptation.recall(1) or 0.0) < 1


def test_recall_is_that_of_what_it_says(team: Team) -> None:
    _, adaptation = run(team, Traffic(3, noise=0.0), 400, True, learn=False)
    assert all((adaptation.recall(distance) or 0.0) > 0.95 for distance in (1, 2, 3))


def test_steps_that_were_not_predicted(team: Team) -> None:
    """What was recorded in another step is not compared with this one."""
    fast = FastNetwork(Traffic(4, 0.0).looks(), [network(n) for n in range(LAYERS)], TOP_K, team)
    adaptation = Adaptation(fast, learn=True)
    fast.begin_step(1, 1, anew=True)
    fast.predict(0, np.ones((1, HIDDEN), np.float32), None)
    adaptation.record(0)
    fast.begin_step(1, 1)
    for _ in range(12):
        for layer in range(LAYERS):
            adaptation.observe(layer, np.zeros((1, TOP_K), np.int64))
    assert adaptation.recall(1) is None
