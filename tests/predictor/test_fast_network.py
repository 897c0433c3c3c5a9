"""The network at run time against its definition in plain NumPy."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.cpu_kernels.team import Team, ThreadTeam
from moe_offload.models.routers import selected
from moe_offload.predictor.fast_network import MOST_ROWS, FastNetwork
from moe_offload.predictor.fast_weights import Look, look_ahead
from moe_offload.predictor.network import (
    DECAY,
    Block,
    Known,
    SourceNetwork,
    corrected,
    input_size,
    to_probabilities,
)
from moe_offload.predictor.trace import DISTANCES, Select

Floats = NDArray[np.float32]
HIDDEN, EXPERTS, TOP_K, PROJECTED, UNITS = 96, 24, 3, 16, 40


class Shape(NamedTuple):
    experts: int = EXPERTS
    top_k: int = TOP_K
    layers: int = 4
    select: Select = "linear"


@pytest.fixture(params=[1, 2], scope="module")
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    with ThreadTeam(request.param) as made:
        yield made


def random(*shape: int, seed: int, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def network(shape: Shape, seed: int, size: float = 1.0) -> SourceNetwork:
    def r(*s: int, at: int, scale: float = 1.0) -> Floats:
        return random(*s, seed=100 * seed + at, scale=scale)

    inputs = input_size(shape.experts, PROJECTED)
    blocks = tuple(
        Block(r(UNITS, UNITS, at=9 + n, scale=0.15), r(UNITS, at=19 + n), r(UNITS, UNITS, at=29 + n, scale=0.15))
        for n in range(seed % 3)
    )
    return SourceNetwork(
        r(PROJECTED, HIDDEN, at=0, scale=HIDDEN**-0.5), r(PROJECTED, at=1), r(UNITS, inputs, at=2, scale=0.2),
        r(UNITS, at=3), r(UNITS, inputs, at=4, scale=0.2), r(UNITS, at=5), blocks,
        r(DISTANCES, shape.experts, UNITS, at=6, scale=size * 0.15), r(DISTANCES, shape.experts, at=7, scale=size),
        1.5 + r(2, DISTANCES, at=8, scale=0.2), r(2, DISTANCES, at=9, scale=0.2),
    )  # fmt: skip


def look(shape: Shape, seed: int) -> Look:
    selection = None if shape.select == "linear" else random(DISTANCES, shape.experts, seed=seed + 77, scale=0.1)
    rows = random(DISTANCES, shape.experts, HIDDEN, seed=seed, scale=2 * HIDDEN**-0.5)
    return Look(rows, random(DISTANCES, shape.experts, seed=seed + 50), shape.select, selection)


class Reference:
    """The same in f32, a call at a time, with what came before remembered token by token."""

    def __init__(self, looks: list[Look], networks: list[SourceNetwork], shape: Shape) -> None:
        self.looks, self.networks, self.shape = looks, networks, shape
        self.recent: dict[tuple[int, int], Floats] = {}
        self.routed: dict[tuple[int, int], NDArray[np.int64]] = {}

    def one_hot(self, chosen: NDArray[np.int64]) -> Floats:
        found = np.zeros((len(chosen), self.shape.experts), np.float32)
        np.put_along_axis(found, chosen, 1.0, axis=1)
        return found

    def probabilities(
        self, source: int, hidden: Floats, chosen: NDArray[np.int64] | None, length: int
    ) -> NDArray[np.float32]:
        net, way, tokens = self.networks[source], self.looks[source], len(hidden)
        experts = self.shape.experts
        logits = (hidden @ way.rows.reshape(-1, HIDDEN).T).reshape(tokens, DISTANCES, experts) + way.bias
        scores = selected(logits, way.select, way.selection)
        before, known = np.zeros((tokens, DISTANCES, experts), np.float32), 0
        targets = range(source, min(source + DISTANCES, self.shape.layers))
        if not len(net.gate):
            return to_probabilities(net, scores + net.out_bias, self.shape.top_k, known=False)
        if length == 1 and all((layer, 0) in self.routed for layer in targets):
            known = 1
            for d, layer in enumerate(targets):
                before[:, d] = self.one_hot(np.stack([self.routed[layer, t] for t in range(tokens)]))
        state = hidden @ net.projection.T - net.offset
        recent = np.zeros_like(state)
        for t in range(tokens):
            key = source, t // length
            recent[t] = self.recent.get(key, np.zeros(PROJECTED, np.float32))
            self.recent[key] = DECAY * recent[t] + (1 - DECAY) * state[t]
        was = np.zeros((tokens, experts), np.float32) if chosen is None else self.one_hot(chosen)
        everything = Known(scores, was, before, np.full(tokens, known, np.float32), state, recent)
        return to_probabilities(net, corrected(net, everything), self.shape.top_k, known=bool(known))

    def observe(self, layer: int, chosen: NDArray[np.int64], length: int) -> None:
        for t, row in enumerate(chosen[length - 1 :: length]):
            self.routed[layer, t] = row


def pair(team: Team, shape: Shape, units: bool = True, size: float = 1.0) -> tuple[FastNetwork, Reference]:
    looks = [look(shape, n) for n in range(shape.layers)]
    networks = [network(shape, n, size) if units else look_ahead(shape.experts) for n in range(shape.layers)]
    return FastNetwork(looks, networks, shape.top_k, team), Reference(looks, networks, shape)


def choices(tokens: int, shape: Shape, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(shape.experts, shape.top_k, replace=False) for _ in range(tokens)])


def forward(fast: FastNetwork, slow: Reference, sequences: int, length: int, seed: int, anew: bool) -> float:
    """A pass through all layers; the mean difference of probabilities, once presence and rows were found theirs."""
    fast.begin_step(sequences, length, anew=anew)
    if anew:
        slow.recent.clear()
        slow.routed.clear()
    tokens, off = sequences * length, []
    chosen = None
    for source in range(fast.layers):
        hidden = random(tokens, HIDDEN, seed=1000 * seed + source)
        p = slow.probabilities(source, hidden, chosen, length)
        batch = fast.predict(source, hidden, chosen)
        seen = fast.seen
        assert seen is not None and seen.stride == 1
        mine = seen.plan.probabilities.reshape(p.shape)
        off.append(np.abs(mine - p).mean())
        assert np.allclose(batch.presence, 1 - np.prod(1 - mine.astype(np.float64), axis=0), atol=1e-6)
        assert np.allclose(batch.rows, mine.sum(axis=0), atol=1e-4)
        chosen = choices(tokens, slow.shape, seed + source)
        fast.observe(source, chosen)
        slow.observe(source, chosen, length)
    return float(np.mean(off))


@pytest.mark.parametrize("select", ["linear", "sigmoid", "softmax"])
def test_what_the_definition_says(team: Team, select: Select) -> None:
    """A prompt, tokens one at a time, another prompt; int8 errs by little, and nothing drifts."""
    fast, slow = pair(team, Shape(select=select))
    steps = [(2, 7, True), (2, 1, False), (2, 1, False), (2, 1, False), (1, 5, True), (1, 1, False)]
    for seed, (sequences, length, anew) in enumerate(steps):
        assert forward(fast, slow, sequences, length, seed, anew) < 0.02


def test_look_ahead_alone(team: Team) -> None:
    fast, slow = pair(team, Shape(), units=False)
    assert forward(fast, slow, 3, 1, 0, True) < 0.005
    assert fast.nbytes < pair(team, Shape())[0].nbytes


@given(steps=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.booleans()), min_size=1, max_size=5))
@settings(deadline=None, max_examples=12)
def test_any_sequence_of_steps(steps: list[tuple[int, int, bool]]) -> None:
    with ThreadTeam(1) as one:
        fast, slow = pair(one, Shape(experts=9, top_k=2, layers=2))
        last = 0
        for seed, (sequences, length, anew) in enumerate(steps):
            anew = anew or sequences != last
            assert forward(fast, slow, sequences, length, seed, anew) < 0.03
            last = sequences


def test_recall_of_int8(team: Team) -> None:
    """What int8 costs of a recall of about 80 %, with few tokens in a batch."""
    shape = Shape(experts=64, top_k=8, layers=2)
    fast, slow = pair(team, shape, size=0.3)
    agreed: list[float] = []
    lost: list[float] = []
    for seed in range(64):
        fast.begin_step(4, 1, anew=True)
        slow.recent.clear()
        slow.routed.clear()
        hidden = random(4, HIDDEN, seed=seed)
        p = slow.probabilities(1, hidden, first := choices(4, shape, seed), 1)
        fast.predict(1, hidden, first)
        assert fast.seen is not None
        mine = fast.seen.plan.probabilities.reshape(p.shape)
        # what comes is the f32 prediction disturbed: what a recall of about 90 % is
        p = np.clip(p, 1e-9, 1 - 1e-7)
        truth = np.log(p / (1 - p)) + random(*p.shape, seed=seed + 500, scale=0.5)
        best = [np.argsort(-each, axis=-1)[..., : shape.top_k] for each in (truth, p, mine)]
        hot = [np.zeros(p.shape, bool) for _ in best]
        for mask, index in zip(hot, best, strict=True):
            np.put_along_axis(mask, index, True, axis=-1)
        agreed.append((hot[1] & hot[2]).sum() / hot[1].sum())
        lost.append(((hot[0] & hot[1]).sum() - (hot[0] & hot[2]).sum()) / hot[0].sum())
    assert np.mean(agreed) > 0.97
    assert np.mean(lost) < 0.004  # noise: a tenth of the slots that differ


def test_many_tokens_are_sampled(team: Team) -> None:
    """What some of the tokens say holds for all of them; the exact answer is not far."""
    shape = Shape()
    fast, slow = pair(team, shape)
    tokens = 5 * MOST_ROWS + 3
    hidden = random(1, HIDDEN, seed=1) + random(tokens, HIDDEN, seed=2, scale=0.3)  # of one text
    fast.begin_step(1, tokens, anew=True)
    batch = fast.predict(2, hidden, chosen := choices(tokens, shape, 3))
    assert fast.seen is not None and len(fast.seen.plan.known) <= MOST_ROWS
    p = slow.probabilities(2, hidden, chosen, 1).astype(np.float64)  # nothing came before
    assert np.abs(batch.rows - p.sum(axis=0)).mean() < 0.12 * p.sum(axis=0).mean()
    assert np.abs(batch.presence - (1 - np.prod(1 - p, axis=0))).mean() < 0.08


def test_what_is_no_number_stays_none(team: Team) -> None:
    fast, _ = pair(team, Shape())
    fast.begin_step(2, 1, anew=True)
    hidden = random(2, HIDDEN, seed=1)
    hidden[1, 5] = np.nan
    assert np.isnan(fast.predict(1, hidden, choices(2, Shape(), 1)).presence).any()
    hidden[1, 5] = 0
    assert np.isfinite(fast.predict(1, hidden, choices(2, Shape(), 1)).presence).all()


def test_all_experts_chosen(team: Team) -> None:
    fast, _ = pair(team, Shape(experts=4, top_k=4))
    fast.begin_step(1, 1, anew=True)
    batch = fast.predict(0, random(1, HIDDEN, seed=1), None)
    assert (batch.presence == 1).all() and (batch.rows == 1).all()


def test_numbers_of_no_expert_are_left_out(team: Team) -> None:
    fast, _ = pair(team, Shape())
    fast.begin_step(1, 1, anew=True)
    hidden = random(1, HIDDEN, seed=4)
    strange = fast.predict(1, hidden, np.array([[-1, EXPERTS, 5]]))
    fast.begin_step(1, 1, anew=True)
    alike = fast.predict(1, hidden, np.array([[5, 5, 5]]))
    assert np.allclose(strange.presence, alike.presence, atol=1e-6)


@pytest.mark.parametrize("wrong", [(0, HIDDEN), (2, HIDDEN - 1)])
def test_states_of_no_use(team: Team, wrong: tuple[int, int]) -> None:
    fast, _ = pair(team, Shape())
    fast.begin_step(2, 1)
    with pytest.raises(ValueError, match="hidden states"):
        fast.predict(0, np.zeros(wrong, np.float32), None)


def test_networks_for_another_model(team: Team) -> None:
    with pytest.raises(ValueError, match="1 networks for 2 layers"):
        FastNetwork([look(Shape(), 0)] * 2, [network(Shape(), 0)], TOP_K, team)
