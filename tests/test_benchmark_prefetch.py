"""The prefetch benchmark: predictions as they are known, paid for, used where they pay, and never needed."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.prefetch.__main__ import cell, summary
from benchmarks.prefetch.foresight import Foresight, of_predictor
from benchmarks.prefetch.routes import Route, synthetic_route
from benchmarks.prefetch.simulation import Ahead, Fixed, LookingAhead, Prefetched, Way, run
from benchmarks.servers.shapes import DEMO
from benchmarks.servers.simulation import Result, Steps
from moe_offload.predictor.baselines import Perfect
from moe_offload.predictor.synthetic import Routing, Size

SIZE = Size(layers=6, experts=16, top_k=2, sequences=40, tokens=24, prompt_tokens=12, hidden=16)
STEPS = Steps(8, 6, 8)
BATCH, SLOTS = 16, 33


@pytest.fixture(scope="module")
def route() -> Route:
    return synthetic_route(SIZE, Routing(0.45, 0.35, (0.8, 0.7, 0.6)), DEMO)


def simulation(route: Route, ahead: Ahead) -> LookingAhead:
    choices = route.choices(route.tokens(BATCH, STEPS.total))
    return LookingAhead("gtx1080ti", route.shape, choices, STEPS.seen, SLOTS, Way(ahead, forced=True))


def seconds(made: LookingAhead) -> float:
    for _ in range(STEPS.warm):
        made.step()
    began = made.accelerator.now()
    for _ in range(STEPS.counted):
        made.step()
    return made.accelerator.now() - began


def knowing(route: Route, cost: float = 0.0) -> Foresight:
    return of_predictor(Perfect(), route.trace, route.tokens(BATCH, STEPS.total), cost)


def test_a_batch_wants_what_any_of_its_tokens_does(route: Route) -> None:
    tokens = route.tokens(4, 5)
    found, choices = of_predictor(Perfect(), route.trace, tokens, 0.0), route.choices(tokens)
    for layer, distance in ((1, 1), (2, 2), (5, 3)):
        rows = np.array([np.bincount(step.ravel(), minlength=16) for step in choices[:, layer]])
        np.testing.assert_allclose(found.rows[:, layer, distance - 1], rows)
        np.testing.assert_allclose(found.presence[:, layer, distance - 1], rows > 0, atol=1e-5)
    assert not found.presence[:, 0].any() and not found.presence[:, 1, 1].any()  # nothing lies that far before
    half = of_predictor(Half(), route.trace, tokens, 0.0)
    np.testing.assert_allclose(half.presence[:, 3, 0], 1 - 0.5**4)
    np.testing.assert_allclose(half.rows[:, 3, 0], 2.0)


class Half:
    name = "half"

    def probabilities(self, trace: object, layer: int, distance: int, tokens: np.ndarray, *, decode: bool):  # type: ignore[no-untyped-def]
        assert decode
        return np.full((len(tokens), 16), 0.5, np.float32)


def test_knowing_the_next_layers_is_faster_than_not_looking_ahead(route: Route) -> None:
    none, perfect = simulation(route, "none"), simulation(route, knowing(route))
    assert seconds(perfect) < 0.99 * seconds(none)
    assert perfect.cache.total().hit_rate > none.cache.total().hit_rate + 0.03
    perfect.cache.check_integrity()


def test_predictions_that_are_wrong_cost_more_than_right_ones(route: Route) -> None:
    right = knowing(route)
    wrong = right._replace(presence=1 - right.presence, rows=np.float32(1) - np.minimum(right.rows, 1))
    assert seconds(simulation(route, wrong)) > seconds(simulation(route, right))


def test_steps_that_go_without_predictions_ask_for_none(route: Route) -> None:
    """But for one, in the first step of a batch size, when all scores are set."""
    cost = 0.1
    dear = simulation(route, knowing(route, cost))
    assert dear.dispatcher.prefetcher is not None
    dear.dispatcher.prefetcher.gate = Fixed(is_open=False)
    for _ in range(STEPS.warm + STEPS.counted):
        dear.step()
    plain = simulation(route, "none")
    for _ in range(STEPS.warm + STEPS.counted):
        plain.step()
    assert dear.accelerator.now() - cost == pytest.approx(plain.accelerator.now(), rel=0.02)


def test_the_hosts_time_for_predictions_is_counted(route: Route) -> None:
    free, dear = (simulation(route, knowing(route, cost)) for cost in (0.0, 2e-3))
    layers = SIZE.layers - 1
    assert seconds(dear) > seconds(free) + 0.5 * STEPS.counted * layers * 2e-3


def test_a_predictor_that_takes_too_long_is_left_alone(route: Route) -> None:
    """On trial it makes every step several times slower; over all it must not."""
    steps = replace(STEPS, warm=40, counted=30)
    tokens = route.tokens(BATCH, steps.total)
    slow = of_predictor(Perfect(), route.trace, tokens, 5e-3)
    choices = route.choices(tokens)
    ahead_of: tuple[Ahead, ...] = ("none", slow)
    none, found = (run("gtx1080ti", route.shape, choices, steps, 0.35, Way(ahead)) for ahead in ahead_of)
    assert found.result.seconds_per_step < 1.02 * none.result.seconds_per_step
    assert none.gate != "open" and found.gate != "open"


def test_a_route_runs_only_on_sequences_that_are_held_out(route: Route) -> None:
    used = np.unique(route.trace.sequence_of(route.tokens(8, 60).ravel()))
    assert set(used) <= set(route.held_out) and not set(used) & set(route.trace.in_split(0))
    tokens = route.tokens(3, 4)
    assert tokens.shape == (4, 3) and len(set(tokens[0].tolist())) == 3
    np.testing.assert_array_equal(route.choices(tokens)[1, 2, 0], route.trace.experts[2, tokens[1, 0]])


def test_the_summary_names_cells_that_are_slower(route: Route) -> None:
    def result(seconds: float, settled: float) -> Prefetched:
        return Prefetched(Result(1 / seconds, seconds, 9, 0.5, {}, None), "open", 0.1, settled)

    cells = [
        cell("a", route, 1, 0.1, [{"none": result(1.0, 0.9), "x": result(taken, 0.75)}]) for taken in (0.8, 1.005, 1.05)
    ]
    assert cells[0]["gain"] == {"x": 1.25} and cells[0]["settled_gain"] == {"x": 1.2}
    two = [{"none": result(1.0, 1.0), "x": result(taken, 1.0)} for taken in (0.5, 1.5)]
    assert cell("a", route, 1, 0.1, two)["gain"] == {"x": 1.0}  # of the times together, not the mean of the gains
    assert cell("a", route, 1, 0.1, two)["gain_of_runs"] == {"x": [2.0, 0.6667]}
    found = summary(cells)["x"]
    assert (found["cells"], found["slower"], found["most"]) == (3, 1, 1.25)
