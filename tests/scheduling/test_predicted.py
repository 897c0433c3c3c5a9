"""Predictions hold for one call of their layer, are made only when asked for, and never reach what is usual."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.scheduling.predicted import Foreseen, PredictedUse
from moe_offload.scheduling.recent_use import RecentUse

E, LAYERS = 4, 3


def made() -> PredictedUse:
    return PredictedUse(RecentUse(LAYERS, E), LAYERS)


def vector(value: float) -> NDArray[np.float64]:
    return np.full(E, value)


def observe(forecast: PredictedUse, layer: int, tokens: int = 1) -> None:
    forecast.observe(layer, np.array([1], np.int32), np.array([tokens]), tokens)


def test_a_prediction_is_for_one_call() -> None:
    forecast = made()
    usual = forecast.presence(1, 2).tolist()
    forecast.foresee(1, vector(0.7), vector(0.9), 2)
    assert forecast.fresh(1) and not forecast.fresh(0)
    assert forecast.presence(1, 2).tolist() == [0.7] * E and forecast.expected_rows(1, 2).tolist() == [0.9] * E
    assert forecast.presence(0, 2).tolist() == usual == forecast.usual_presence(1, 2).tolist()
    observe(forecast, 0, 2)
    assert forecast.fresh(1)
    observe(forecast, 1, 2)
    assert not forecast.fresh(1)
    np.testing.assert_array_equal(forecast.presence(1, 2), forecast.usual.presence(1, 2))
    np.testing.assert_array_equal(forecast.expected_rows(1, 2), forecast.usual.expected_rows(1, 2))


def test_what_is_promised_is_made_once_and_only_when_asked_for() -> None:
    forecast, asked = made(), []

    def provider(layer: int) -> Foreseen:
        asked.append(layer)
        return Foreseen(vector(0.1 * layer), vector(layer), 1)

    forecast.expect(range(LAYERS), provider)
    assert all(map(forecast.fresh, range(LAYERS)))
    forecast.usual_presence(2, 1)
    assert not asked
    assert forecast.expected_rows(2, 1)[0] == 2 and forecast.presence(2, 1)[0] == pytest.approx(0.2)
    assert asked == [2] and forecast.fresh(2)
    observe(forecast, 0)
    forecast.presence(0, 1)
    assert asked == [2]  # its call has come: nobody is asked any more


def test_what_is_certain_is_not_predicted() -> None:
    """Of many tokens every expert has some, which popularity knows."""
    forecast, asked = made(), []

    def provider(layer: int) -> Foreseen:
        asked.append(layer)
        return Foreseen(vector(0.5), vector(1.0), 2)

    for tokens, times in ((64, 0), (2, 1)):
        forecast.expect([1], provider)
        found = forecast.presence(1, tokens)
        assert len(asked) == times and (found > 0.99).all() == (times == 0)
        observe(forecast, 1, tokens)


def test_a_later_word_counts() -> None:
    forecast = made()
    forecast.expect([0, 1], lambda layer: Foreseen(vector(0.2), vector(0.2), 1))
    forecast.foresee(0, vector(0.3), vector(0.3), 1)
    assert forecast.presence(0, 1)[0] == 0.3 and forecast.presence(1, 1)[0] == 0.2
    forecast.expect([0, 1], lambda layer: Foreseen(vector(0.4), vector(0.4), 1))
    assert forecast.presence(0, 1)[0] == forecast.presence(1, 1)[0] == 0.4


@pytest.mark.parametrize("said", [None, Foreseen(vector(np.nan), vector(1), 1), Foreseen(vector(1), vector(np.inf), 1)])
def test_where_nothing_sensible_is_said_all_is_as_usual(said: Foreseen | None) -> None:
    forecast = made()
    forecast.expect([0], lambda layer: said)
    np.testing.assert_array_equal(forecast.presence(0, 1), forecast.usual.presence(0, 1))
    np.testing.assert_array_equal(forecast.expected_rows(0, 1), forecast.usual.expected_rows(0, 1))
    assert not forecast.fresh(0)


def test_a_prediction_for_other_tokens_is_not_used() -> None:
    forecast = made()
    forecast.foresee(0, vector(0.9), vector(0.9), 3)
    np.testing.assert_array_equal(forecast.presence(0, 1), forecast.usual.presence(0, 1))


CALLS = st.lists(st.tuples(st.sampled_from("foresee expect ask observe".split()), st.integers(0, LAYERS - 1)))


@settings(max_examples=60, deadline=None)
@given(CALLS)
def test_any_order_of_calls(calls: list[tuple[str, int]]) -> None:
    forecast, plain = made(), RecentUse(LAYERS, E)
    said: list[float | None] = [None] * LAYERS
    times = [0] * LAYERS
    for at, (what, layer) in enumerate(calls):
        value = (at + 1) / (len(calls) + 1)
        if what == "foresee":
            forecast.foresee(layer, vector(value), vector(value), 1)
            said[layer] = value
        elif what == "expect":
            times[layer] = 0

            def provider(asked: int, value: float = value) -> Foreseen:
                times[asked] += 1
                assert times[asked] == 1
                return Foreseen(vector(value), vector(value), 1)

            forecast.expect([layer], provider)
            said[layer] = value
        elif what == "observe":
            observe(forecast, layer)
            plain.observe(layer, np.array([1], np.int32), np.array([1]), 1)
            said[layer] = None
        wanted = said[layer]
        assert forecast.fresh(layer) == (wanted is not None)
        if what == "ask":
            found = forecast.presence(layer, 1)
            np.testing.assert_array_equal(found, plain.presence(layer, 1) if wanted is None else vector(wanted))
    for layer in range(LAYERS):
        np.testing.assert_array_equal(forecast.usual_presence(layer, 1), plain.usual_presence(layer, 1))
