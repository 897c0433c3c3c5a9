import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.scheduling.forecast import Forecast, PerfectForecast, Popularity, RoutedCall


def call(*rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Active experts and their rows, from the rows of all."""
    counts = np.array(rows, np.int64)
    experts = np.flatnonzero(counts).astype(np.int32)
    return experts, counts[experts]


def routed(shares: NDArray[np.float64], tokens: int, top_k: int, seed: np.random.Generator) -> NDArray[np.int64]:
    """[E] rows: every token takes top_k different experts."""
    noisy = np.log(shares) + seed.gumbel(size=(tokens, len(shares)))
    return np.bincount(np.argsort(-noisy, axis=1)[:, :top_k].ravel(), minlength=len(shares))


def test_without_any_observation_all_experts_are_alike() -> None:
    popularity = Popularity(2, 8, top_k=2)
    np.testing.assert_allclose(popularity.presence(0, 1), 0.25)
    np.testing.assert_allclose(popularity.presence(1, 4), 1 - 0.75**4)
    np.testing.assert_allclose(popularity.expected_rows(1, 4), 1.0)


def test_an_order_is_a_hint() -> None:
    popularity = Popularity(1, 4, top_k=2, order=[[2, 0, 3, 1]])
    presence = popularity.presence(0, 1)
    assert presence.argsort().tolist() == [1, 3, 0, 2]
    assert presence.sum() == pytest.approx(2, rel=0.1)
    for _ in range(60):
        popularity.observe(0, *call(0, 1, 1, 0), 1)
    assert set(popularity.presence(0, 1).argsort()[-2:].tolist()) == {1, 2}  # and is forgotten


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_averages_come_to_the_shares_of_the_router(tokens: int) -> None:
    random = np.random.default_rng(tokens)
    shares = random.dirichlet(np.full(32, 0.5)) + 1e-4
    popularity = Popularity(1, 32, top_k=4, half_life=500)
    calls = [routed(shares, tokens, 4, random) for _ in range(3000)]
    for rows in calls:
        popularity.observe(0, *call(*rows), tokens)
    seen = np.array(calls[-1500:])
    np.testing.assert_allclose(popularity.expected_rows(0, tokens), seen.mean(0), atol=0.03 * tokens)
    np.testing.assert_allclose(popularity.presence(0, tokens), (seen > 0).mean(0), atol=0.06)


def test_tokens_of_a_batch_that_are_alike_are_seen_as_such() -> None:
    """All eight tokens always take the same expert: independent tokens would be spread over both."""
    popularity = Popularity(1, 2, half_life=50)
    random = np.random.default_rng(0)
    for _ in range(500):
        popularity.observe(0, *(call(8, 0) if random.random() < 0.5 else call(0, 8)), 8)
    np.testing.assert_allclose(popularity.presence(0, 8), 0.5, atol=0.15)
    np.testing.assert_allclose(popularity.presence(0, 2), 0.75, atol=0.15)  # not seen: from single tokens


def test_a_change_of_subject_is_followed() -> None:
    popularity = Popularity(1, 8, half_life=16)
    for _ in range(500):
        popularity.observe(0, *call(1, 0, 0, 0, 0, 0, 0, 0), 1)
    for _ in range(100):
        popularity.observe(0, *call(0, 1, 0, 0, 0, 0, 0, 0), 1)
    assert popularity.presence(0, 1)[1] > 0.95
    assert popularity.presence(0, 1)[0] < 0.05


def test_layers_are_apart() -> None:
    popularity = Popularity(2, 4)
    popularity.observe(1, *call(1, 0, 0, 0), 1)
    np.testing.assert_allclose(popularity.presence(0, 1), 0.25)
    assert popularity.presence(1, 1)[0] > 0.25


def reference(calls: list[tuple[list[int], int]], half_life: float, top_k: int) -> NDArray[np.float64]:
    """The moving average of rows per token, as a plain sum over everything."""
    experts = len(calls[0][0])
    weight, total = 8.0, np.full(experts, 8.0 * top_k / experts)
    decay = 0.5 ** (1 / half_life)
    for rows, tokens in calls:
        weight, total = weight * decay + 1, total * decay + np.array(rows) / tokens
    return np.minimum(total / weight, 1)


@st.composite
def calls(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    experts = draw(st.integers(1, 5))
    one = st.integers(1, 5000).flatmap(
        lambda t: st.tuples(st.lists(st.integers(0, t), min_size=experts, max_size=experts), st.just(t))
    )
    return draw(st.lists(one, min_size=1, max_size=20))


@given(calls(), st.sampled_from([0.02, 1.0, 64.0]))
@settings(deadline=None, max_examples=40)
def test_sums_are_the_moving_average(calls: list[tuple[list[int], int]], half_life: float) -> None:
    """Also where the newest addend outgrows its numbers (a half-life of 0.02: a factor of 1e15 per call)."""
    popularity = Popularity(1, len(calls[0][0]), half_life=half_life)
    for rows, tokens in calls:
        popularity.observe(0, *call(*rows), tokens)
    np.testing.assert_allclose(popularity.share(0), reference(calls, half_life, 1), rtol=1e-9, atol=1e-12)
    for tokens in (0, 1, 7, 10**6):
        presence = popularity.presence(0, tokens)
        assert ((presence >= 0) & (presence <= 1 + 1e-12)).all()


def test_long_runs_stay_finite() -> None:
    popularity = Popularity(1, 2, half_life=1)
    for _ in range(5000):
        popularity.observe(0, *call(1, 0), 1)
    np.testing.assert_allclose(popularity.presence(0, 1), [1, 0], atol=1e-6)


def test_a_call_without_tokens_is_nothing() -> None:
    popularity = Popularity(1, 4)
    popularity.observe(0, *call(0, 0, 0, 0), 0)
    np.testing.assert_allclose(popularity.presence(0, 1), 0.25)
    np.testing.assert_allclose(popularity.presence(0, 0), 0)


@pytest.mark.parametrize(
    "arguments", [{"layers": 0}, {"experts": 0}, {"top_k": 5}, {"top_k": 0}, {"half_life": 0.0}, {"order": [[0, 1, 2]]},
                  {"order": [[0, 1, 2, 2]]}, {"order": []}],
)  # fmt: skip
def test_senseless_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"half-life|order"):
        Popularity(**{"layers": 1, "experts": 4, **arguments})  # type: ignore[arg-type]


def test_the_perfect_forecast_knows_the_next_call_of_every_layer() -> None:
    trace = [(0, call(1, 0, 3)), (1, call(0, 4, 0)), (0, call(0, 2, 2)), (1, call(4, 0, 0))]
    perfect: Forecast = PerfectForecast(2, 3, [RoutedCall(layer, *rows) for layer, rows in trace])
    for layer, (experts, rows) in trace:
        expected = perfect.expected_rows(layer, 4)
        assert np.flatnonzero(expected).tolist() == experts.tolist()
        assert expected[experts].tolist() == rows.tolist()
        assert perfect.presence(layer, 4).tolist() == (expected > 0).tolist()
        perfect.observe(layer, experts, rows, 4)
    assert perfect.presence(0, 4).tolist() == [0, 0, 0]
    perfect.observe(0, *call(1, 1, 1), 3)  # more than was known
    assert perfect.expected_rows(0, 4).tolist() == [0, 0, 0]
