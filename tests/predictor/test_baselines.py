from typing import Any

import numpy as np
import pytest

from moe_offload.predictor.baselines import Frequency, LookAhead, Perfect, PreviousToken, Transition, source_of
from moe_offload.predictor.synthetic import Routing, Size, synthetic_trace
from moe_offload.predictor.trace import TEST, TRAIN, Trace
from tests.predictor.small_traces import small_trace

KINDS: tuple[Any, ...] = (Frequency, PreviousToken, Transition, LookAhead)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthetic_trace(Size(4, 16, 2, 60, 16, 12, 16), Routing(0.45, 0.4, (0.8, 0.7, 0.6)), seed=3)


def cases(trace: Trace) -> list[tuple[int, int]]:
    return [(layer, far) for layer in range(trace.info.layers) for far in (1, 2, 3) if far <= layer + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decode", [False, True])
def test_probabilities_are_probabilities_of_about_k_experts(trace: Trace, kind: Any, decode: bool) -> None:
    fitted, tokens = kind.fit(trace, trace.in_split(TRAIN)), trace.tokens(trace.in_split(TEST))
    for layer, distance in cases(trace):
        p = fitted.probabilities(trace, layer, distance, tokens, decode=decode)
        assert p.shape == (len(tokens), 16) and p.dtype == np.float32
        assert p.min() > 0 and p.max() < 1
        assert p.sum(axis=1).mean() == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_from_other_sequences(trace: Trace, kind: Any) -> None:
    train, tokens = trace.in_split(TRAIN), np.arange(40)
    other = trace.tokens(trace.in_split(TEST))
    experts, look = trace.experts.copy(), trace.look.copy()
    experts[:, other], look[:, other] = 0, 5.0
    changed = trace._replace(experts=experts, look=look)
    mine, theirs = kind.fit(trace, train), kind.fit(changed, train)
    for layer, distance in cases(trace):
        a, b = (each.probabilities(trace, layer, distance, tokens, decode=True) for each in (mine, theirs))
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_uses_only_what_its_source_knows(trace: Trace, kind: Any) -> None:
    """Of the tokens asked about: no layer from the source's on. In a prompt nothing of the token before either."""
    fitted, tokens = kind.fit(trace, trace.in_split(TRAIN)), np.arange(10, 30)
    for layer, distance in cases(trace):
        source = source_of(trace, layer, distance)
        experts, look, scores = trace.experts.copy(), trace.look.copy(), np.zeros_like(trace.scores)
        experts[source:, tokens], look[source + 1 :, tokens] = 0, 9.0
        p = fitted.probabilities(trace, layer, distance, tokens, decode=False)
        blind = trace._replace(experts=experts, look=look, scores=scores)
        assert np.array_equal(p, fitted.probabilities(blind, layer, distance, tokens, decode=False))


def test_decode_does_not_see_the_token_itself(trace: Trace) -> None:
    fitted = PreviousToken.fit(trace, trace.in_split(TRAIN))
    experts = trace.experts.copy()
    experts[:, 20] = 0
    p = fitted.probabilities(trace, 1, 1, np.array([20]), decode=True)
    assert np.array_equal(p, fitted.probabilities(trace._replace(experts=experts), 1, 1, np.array([20]), decode=True))


def test_frequency_counts() -> None:
    trace = small_trace(np.array([[[0], [0], [0], [1]]] * 2), 4)
    p = Frequency.fit(trace, [0]).probabilities(trace, 0, 1, np.arange(2), decode=True)
    assert p[0] == pytest.approx([(3 + 2) / 12, (1 + 2) / 12, 2 / 12, 2 / 12])
    assert np.array_equal(p[0], p[1])


def test_the_token_before_is_of_the_same_sequence() -> None:
    again = np.repeat(np.arange(6).reshape(1, 6, 1) % 3, 40, axis=1)  # 0 x 40, 1 x 40, ...
    trace = small_trace(again, 3, lengths=[120, 120])
    fitted = PreviousToken.fit(trace, [0])
    p = fitted.probabilities(trace, 0, 1, np.array([5, 45, 120, 121]), decode=True)
    assert p.argmax(axis=1)[[0, 1, 3]].tolist() == [0, 1, 0]
    assert p[0, 0] > 0.8
    assert np.array_equal(p[2], fitted.frequency.shares[0])  # the first token has none before
    prompt = fitted.probabilities(trace, 0, 1, np.array([5]), decode=False)
    assert np.array_equal(prompt[0], fitted.frequency.shares[0])


def test_transitions_are_learned_at_each_distance() -> None:
    first = np.random.default_rng(0).integers(0, 5, 400)
    layers = np.stack([(first + 2 * layer) % 5 for layer in range(4)])[..., None]
    trace = small_trace(layers, 5)
    fitted = Transition.fit(trace, [0])
    for layer, distance in cases(trace):
        p = fitted.probabilities(trace, layer, distance, np.arange(400), decode=False)
        right = np.mean(p.argmax(axis=1) == layers[layer, :, 0])
        assert right == 1 if distance <= layer else right < 0.5  # nothing is known before the first layer


def test_look_ahead_ranks_as_the_scores_do(trace: Trace) -> None:
    fitted, tokens = LookAhead.fit(trace, trace.in_split(TRAIN)), np.arange(50)
    p = fitted.probabilities(trace, 3, 2, tokens, decode=True)
    scores = trace.look[2, tokens, 1].astype(np.float32)
    assert (np.diff(np.take_along_axis(p, np.argsort(scores, axis=1), axis=1), axis=1) >= 0).all()


def test_perfect_knows() -> None:
    trace = small_trace(np.array([[[2], [0]]]), 3)
    p = Perfect().probabilities(trace, 0, 1, np.arange(2), decode=True)
    assert p.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_what_cannot_be_predicted_is_refused(trace: Trace) -> None:
    for layer, distance in ((0, 2), (1, 3), (4, 1), (3, 0), (3, 4)):
        with pytest.raises(ValueError, match=f"layer {layer} from {distance} before"):
            source_of(trace, layer, distance)
    for kind in KINDS:
        with pytest.raises(ValueError, match="no training sequences"):
            kind.fit(trace, [])
