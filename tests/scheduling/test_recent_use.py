"""A forecast that knows the last call: right where tokens repeat, harmless where they do not; and what oracles see."""

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_offload.scheduling.forecast import PerfectForecast, Popularity, RoutedCall
from moe_offload.scheduling.prefetch import Yield
from moe_offload.scheduling.recent_use import RecentUse

E, K = 32, 4


def calls(again: float, steps: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Each expert of the call before stays with probability `again`; the rest is chosen evenly."""
    random, found = np.random.default_rng(seed), [np.arange(K)]
    for _ in range(steps):
        kept = [e for e in found[-1] if random.random() < again]
        others = random.permutation(np.setdiff1d(np.arange(E), kept))
        found.append(np.sort(np.concatenate([kept, others[: K - len(kept)]]).astype(np.int64)))
    return found


def surprise(forecast: Popularity, trace: list[NDArray[np.int64]], skip: int) -> float:
    """Mean of the squared distance between what was said and what came."""
    total = []
    for at, experts in enumerate(trace):
        if at >= skip:
            total.append(((np.isin(np.arange(E), experts) - forecast.presence(0, 1)) ** 2).mean())
        forecast.observe(0, experts, np.ones(K), 1)
    return float(np.mean(total))


@pytest.mark.parametrize("again", [0.2, 0.4, 0.8])
def test_repeats_are_learned_and_help(again: float) -> None:
    trace = calls(again, 600)
    recent = RecentUse(1, E, top_k=K)
    assert surprise(recent, trace, 200) < (1 - 0.5 * again**2) * surprise(Popularity(1, E, top_k=K), trace, 200)
    assert recent.again(0) == pytest.approx(again, abs=0.12)


def test_without_repeats_it_is_as_good_as_popularity() -> None:
    trace = calls(0.0, 600)
    ratio = surprise(RecentUse(1, E, top_k=K), trace, 200) / surprise(Popularity(1, E, top_k=K), trace, 200)
    assert ratio == pytest.approx(1, abs=0.02)


def test_probabilities_stay_probabilities_and_keep_their_sum() -> None:
    forecast = RecentUse(1, E, top_k=K)
    for experts in calls(0.6, 200):
        forecast.observe(0, experts, np.ones(K), 1)
        presence = forecast.presence(0, 1)
        assert (presence >= 0).all() and (presence <= 1).all()
        assert presence.sum() == pytest.approx(forecast.usual_presence(0, 1).sum(), rel=0.3)
    assert forecast.expected_rows(0, 1) == pytest.approx(presence, rel=0.2)


def test_another_batch_is_asked_of_popularity() -> None:
    forecast, usual = RecentUse(1, E, top_k=K), Popularity(1, E, top_k=K)
    for experts in calls(0.6, 100):
        forecast.observe(0, experts, np.ones(K), 1)
        usual.observe(0, experts, np.ones(K), 1)
    np.testing.assert_array_equal(forecast.presence(0, 16), usual.presence(0, 16))
    np.testing.assert_array_equal(forecast.expected_rows(0, 16), usual.expected_rows(0, 16))
    assert not np.array_equal(forecast.presence(0, 1), usual.presence(0, 1))


def test_layers_do_not_mix() -> None:
    forecast = RecentUse(2, E, top_k=K)
    before = forecast.presence(1, 1).copy()
    for experts in calls(0.6, 50):
        forecast.observe(0, experts, np.ones(K), 1)
    np.testing.assert_array_equal(forecast.presence(1, 1), before)


def test_how_far_an_oracle_sees() -> None:
    trace = [RoutedCall(0, np.array([at]), np.array([2])) for at in range(6)]
    oracle = PerfectForecast(1, 8, trace, foreseen=3)
    np.testing.assert_allclose(oracle.usual_presence(0, 1), [1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0])
    for at in range(5):
        oracle.observe(0, np.array([at]), np.array([2]), 1)
    np.testing.assert_array_equal(oracle.usual_presence(0, 1), oracle.presence(0, 1))  # one is left
    oracle.observe(0, np.array([5]), np.array([2]), 1)
    assert not oracle.usual_presence(0, 1).any()


def test_a_yield_follows_what_prefetches_bring_and_forgives() -> None:
    found = Yield()
    assert found.share == 1
    for at in range(400):
        found.observe(0.5, at % 10 == 0)
    assert found.share == pytest.approx(0.2, abs=0.15)
    low = found.share
    for _ in range(2000):
        found.tick()
    assert low < found.share <= 1
    for _ in range(300):
        found.observe(0.5, True)
    assert found.share == 1
    for _ in range(1000):
        found.observe(0.9, False)
    assert found.share > 0
