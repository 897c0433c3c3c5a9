"""The benchmark of policies: routing as described, the same work for everybody, sums that are right."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.servers.routing import Choices, demo, generate, repeats
from benchmarks.servers.shapes import DEMO, MEASURED, SHAPES, Shape
from benchmarks.servers.simulation import NEXT_ONLY, Result, Simulation, Steps, cache_slots, run_cell, run_prompt
from benchmarks.servers.summary import Cell, summarise
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.scheduling.policies import POLICIES
from moe_offload.transfer.server_profile import find_profile

SMALL = Shape("small", 4, 16, 2, ExpertRecord(2048, 768, "int4"), 4 * 10_000_000, 20_000_000, 4096, repeats=0.3)
STEPS = Steps(8, 3, 4)


@pytest.fixture(scope="module")
def choices() -> Choices:
    return generate(SMALL, 4, STEPS.total)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda shape: shape.name)
def test_shapes_are_those_of_the_models(shape: Shape) -> None:
    routed, dense = {
        "Mixtral-8x7B": (45.1e9, 1.47e9), "Qwen3-30B-A3B": (29.0e9, 1.23e9), "DeepSeek-V2-Lite": (14.4e9, 1.10e9),
        "gpt-oss-20b": (19.1e9, 1.22e9),
    }[shape.name]  # fmt: skip
    assert shape.layers * shape.experts * shape.flops_per_row / 2 == pytest.approx(routed, rel=0.01)
    assert shape.dense_params + shape.head_params == pytest.approx(dense, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda shape: shape.name)
def test_the_generator_repeats_as_often_as_said(shape: Shape) -> None:
    choices = generate(replace(shape, layers=12), 4, 24)
    assert choices.shape == (24, 12, 4, shape.top_k)
    assert 0 <= choices.min() and choices.max() < shape.experts
    assert (np.diff(np.sort(choices, axis=-1), axis=-1) > 0).all()  # K different experts
    assert shape.repeats is not None
    assert repeats(choices) == pytest.approx(shape.repeats, abs=0.06)


def test_the_generator_has_favourites_and_its_sequences_differ() -> None:
    shape = replace(SHAPES[1], layers=8)
    choices = generate(shape, 4, 64)
    first = choices[:, 0, 0].ravel()
    hottest = np.argsort(-np.bincount(first[: len(first) // 2], minlength=shape.experts))[: shape.experts // 4]
    assert np.isin(first[len(first) // 2 :], hottest).mean() > 0.5  # a quarter of the experts
    assert np.isin(choices[:, 0, 1], hottest).mean() < np.isin(first, hottest).mean() - 0.05
    assert not np.array_equal(choices, generate(shape, 4, 64, seed=1))
    np.testing.assert_array_equal(choices, generate(shape, 4, 64))


def test_the_demo_models_routing() -> None:
    choices = demo(DEMO.layers, 3, 20)
    assert choices.shape == (20, 24, 3, 2) and choices.max() < DEMO.experts
    assert (choices[..., 0] != choices[..., 1]).all()
    # a layer that is there again runs on other text, and so does another sequence
    assert not np.array_equal(choices[:, 0], choices[:, 6])
    assert not np.array_equal(choices[:, 0, 0], choices[:, 0, 1])
    uses = np.bincount(choices[:, 0].ravel(), minlength=16)
    assert uses.max() > 2 * uses.mean()


def test_slots_are_what_the_card_holds_and_at_most_half() -> None:
    card = find_profile("gtx1080ti")
    half = SMALL.layers * SMALL.experts // 2
    assert cache_slots(card, SMALL, 100) == half
    mixtral = SHAPES[0]
    slots = cache_slots(card, mixtral, 512)
    assert 0 < slots < mixtral.layers * mixtral.experts // 2
    assert slots * mixtral.expert_bytes + mixtral.dense_bytes < card.memory_bytes
    assert cache_slots(card, mixtral, 512 * 64) < slots
    assert cache_slots(card, MEASURED[0], 10**6) == 0


@pytest.mark.parametrize("policy", [*POLICIES, NEXT_ONLY])
def test_every_policy_runs_and_takes_the_same_time_again(policy: str, choices: Choices) -> None:
    first, again = (run_cell("p100", SMALL, policy, choices, STEPS, guarded=policy == "ours") for _ in range(2))
    assert first is not None and first == again
    assert first.tokens_per_second == pytest.approx(4 / first.seconds_per_step)
    assert all(0 <= share <= 1 for share in first.busy.values())
    assert first.busy["link"] == 0 if policy == "static" else True


def test_everybody_is_counted_on_the_same_steps(choices: Choices) -> None:
    one, other = (Simulation("p100", SMALL, "static", choices, STEPS.seen, guarded=False) for _ in range(2))
    for _ in range(STEPS.warm):
        one.step()
    other.skip(STEPS.warm - 1)
    other.step()
    following = [[(c.layer, c.experts.tolist()) for c in each._calls[each._next :]] for each in (one, other)]
    assert following[0] == following[1] and len(following[0]) == STEPS.counted * SMALL.layers
    seconds = []
    for simulation in (one, other):
        began = simulation.accelerator.now()
        simulation.step()
        seconds.append(simulation.accelerator.now() - began)
    assert seconds[0] == pytest.approx(seconds[1])


def test_knowing_more_is_not_slower(choices: Choices) -> None:
    speed = {}
    for policy in ("static", "ours", "oracle"):
        result = run_cell("rtx2080ti", SMALL, policy, choices, STEPS, guarded=False)
        assert result is not None
        speed[policy] = result.tokens_per_second
    assert speed["static"] * 0.99 <= speed["ours"] <= speed["oracle"] * 1.02


def test_a_prompt_is_streamed_where_that_is_sooner() -> None:
    """512 tokens, 64 rows an expert: the 9900K's host is slow enough for its link to be sooner."""
    tokens = generate(SMALL, 512, 2)
    speed = {}
    for policy in ("static", "lru", "ours"):
        result = run_prompt("rtx2080ti", SMALL, policy, tokens, 1)
        assert result is not None
        speed[policy] = result.tokens_per_second
    assert speed["ours"] > 0.97 * max(speed.values())


def test_a_model_that_does_not_fit() -> None:
    large = replace(SMALL, dense_params=20_000_000_000)
    assert run_cell("gtx1080ti", large, "static", generate(large, 1, 3), Steps(1, 1, 1), guarded=False) is None


def result_of(speed: float) -> Result:
    return Result(speed, 1 / speed, 10, 0.5, {}, None)


def test_the_summary() -> None:
    def cell(**speeds: float) -> Cell:
        return Cell("s", "m", "int4", 1, False, {name: result_of(speed) for name, speed in speeds.items()})

    cells = [
        cell(static=100, lru=50, ours=99.5, oracle=110), cell(static=100, lru=120, ours=118, oracle=118),
        cell(static=10, lru=5, ours=20, oracle=40),
    ]  # fmt: skip
    assert [each.rival for each in cells] == ["static", "lru", "static"]
    summary = summarise(cells)
    assert (summary.cells, summary.first) == (3, 2)
    assert summary.least_lead == pytest.approx(118 / 120)
    assert summary.shares.keys() == {"oracle"}
    assert summary.shares["oracle"] == pytest.approx(((99.5 / 110 + 1 + 0.5) / 3, 0.5))
    assert str(summary).startswith("simulated: ")
    assert cells[0].to_dict()["lead"] == 0.995
