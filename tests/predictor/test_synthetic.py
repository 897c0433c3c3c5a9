import numpy as np
import pytest

from moe_offload.predictor.synthetic import Routing, Size, measure, synthetic_trace
from moe_offload.predictor.trace import TEST, TRAIN, VALIDATION, Trace, shapes
from tests.predictor.small_traces import small_trace

SMALL = Size(layers=4, experts=16, top_k=2, sequences=20, tokens=64, prompt_tokens=20, hidden=32)
ASKED = (
    Routing(0.4, 0.3, (0.8, 0.7, 0.6), 0.25),
    Routing(0.6, 0.7, (0.95, 0.9, 0.85), 0.5),
)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("learnable", [0.0, 1.0])
def test_a_trace_has_what_was_asked_for(asked: Routing, learnable: float) -> None:
    found = measure(synthetic_trace(SMALL, asked, learnable=learnable))
    assert found.popular == pytest.approx(asked.popular, abs=0.06)
    assert found.repeats == pytest.approx(asked.repeats, abs=0.05)
    assert found.recall == pytest.approx(asked.recall, abs=0.05)
    assert found.embedding == pytest.approx(asked.embedding, abs=0.06)


def test_the_shape_of_a_large_model() -> None:
    size = Size(layers=8, experts=128, top_k=8, sequences=32, tokens=16, prompt_tokens=8, hidden=64)
    asked = Routing()
    found = measure(synthetic_trace(size, asked, seed=1))
    assert found.popular == pytest.approx(asked.popular, abs=0.06)
    assert found.recall == pytest.approx(asked.recall, abs=0.04)


def test_it_is_a_sound_trace() -> None:
    trace = synthetic_trace(SMALL, ASKED[0])
    assert trace.info.synthetic
    for name, (_, shape) in shapes(trace.info, 20, 20 * 64).items():
        assert getattr(trace, name).shape == shape, name
    assert set(trace.split.tolist()) == {TRAIN, VALIDATION, TEST}
    tokens = np.arange(20 * 64)
    for layer in range(4):
        chosen = trace.chosen(layer, tokens)
        assert (chosen.sum(axis=1) == 2).all()
        scores = trace.scores[layer].astype(np.float32)
        assert (np.where(chosen, scores, np.inf).min(axis=1) >= np.where(chosen, -np.inf, scores).max(axis=1)).all()
    assert not trace.look[3, :, 1:].any() and not trace.look[2, :, 2].any()  # beyond the last layer
    assert trace.weights.astype(float).sum(axis=2) == pytest.approx(1, abs=2e-3)
    assert np.array_equal(trace.generated(tokens), tokens % 64 >= 20)


def test_the_same_seed_gives_the_same_trace() -> None:
    size = Size(2, 8, 2, 4, 16, 8, 16)
    one, same, other = (synthetic_trace(size, ASKED[0], seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(getattr(one, name), getattr(same, name)) for name in Trace._fields[1:])
    assert not np.array_equal(one.experts, other.experts)


def explained(trace: Trace, layer: int, distance: int) -> float:
    """Share of the look-ahead error's variance that a linear function of the source's state explains, held out."""
    source, count = layer - distance + 1, trace.experts.shape[1]
    error = trace.look[source, :, distance - 1].astype(float) - trace.scores[layer].astype(float)
    state, half = trace.state(source, np.arange(count)).astype(float), count // 2
    fitted = np.linalg.lstsq(state[:half], error[:half], rcond=None)[0]
    left = error[half:] - state[half:] @ fitted
    return float(1 - left.var() / error[half:].var())


def test_what_is_to_be_learned_can_be_and_the_rest_cannot() -> None:
    for learnable in (0.0, 0.5, 1.0):
        trace = synthetic_trace(SMALL, ASKED[0], learnable=learnable)
        assert explained(trace, 2, 2) == pytest.approx(learnable, abs=0.12)


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats, with this skew, of 0.05 cannot be had: from 0"):
        synthetic_trace(SMALL, Routing(0.9, 0.05))
    with pytest.raises(ValueError, match="popular experts of 0.1 cannot be had"):
        synthetic_trace(SMALL, Routing(0.1, 0.3))
    with pytest.raises(ValueError, match="a recall of 0.01 cannot"):
        synthetic_trace(SMALL, Routing(0.5, 0.4, (0.5, 0.4, 0.01)))
    for size in (Size(top_k=128), Size(layers=0), Size(tokens=8, prompt_tokens=9)):
        with pytest.raises(ValueError, match="at least 1 of each"):
            synthetic_trace(size, ASKED[0])
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        synthetic_trace(SMALL, ASKED[0], learnable=1.5)


def test_measure_by_hand() -> None:
    experts = np.array([[[0], [0], [1], [1]], [[2], [3], [3], [3]]])
    look = np.zeros((2, 4, 3, 4))
    look[1, [0, 1, 2], 0, [2, 3, 3]] = 1.0  # source 1 knows layer 1, but for the last token
    look[1, 3, 0, 0] = 1.0
    look[0, :, 0, 0] = 1.0  # source 0 says expert 0 always
    look[0, :, 1, 3] = 1.0  # and 3 for layer 1
    found = measure(small_trace(experts, 4, look=look))
    assert found.popular == pytest.approx((0.5 + 0.75) / 2)
    assert found.repeats == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.recall[0] == 0.75
    assert np.isnan(found.recall[1:]).all()
    assert found.embedding == pytest.approx((0.5 + 0.75) / 2)
