"""Training: it learns what can be learned, keeps look-ahead where it cannot, and tells the truth about it."""

import numpy as np
import pytest

from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.network import LearnedPredictor, SourceView, corrected
from moe_offload.predictor.synthetic import Routing as Asked
from moe_offload.predictor.synthetic import Size, synthetic_trace
from moe_offload.predictor.trace import TEST, TRAIN, VALIDATION, Trace
from moe_offload.predictor.training import BYTES, Settings, Trained, choose_units, train_source

SIZE = Size(layers=4, experts=16, top_k=2, sequences=60, tokens=64, hidden=16)
SETTINGS = Settings(passes=6, batch=128, units=64)
ASKED = Asked(recall=(0.75, 0.7, 0.65))


@pytest.fixture(scope="module")
def learnable() -> Trace:
    return synthetic_trace(SIZE, ASKED, learnable=0.9, seed=1)


@pytest.fixture(scope="module")
def trained(learnable: Trace) -> Trained:
    return train_source(learnable, 1, SETTINGS)


def held_out_recall(trace: Trace, scores: np.ndarray, layer: int, tokens: np.ndarray) -> float:
    best = np.argsort(-scores, axis=1)[:, : trace.info.top_k]
    return float(np.take_along_axis(trace.chosen(layer, tokens), best, axis=1).mean())


def test_it_learns_what_can_be_learned(learnable: Trace, trained: Trained) -> None:
    """On sequences that it never saw, by a plain count."""
    tokens = learnable.tokens(learnable.in_split(TEST))
    known = SourceView(learnable, 1).known(tokens, decode=True)
    scores = corrected(trained.network, known)
    for distance in range(3):
        before = held_out_recall(learnable, known.look[:, distance], 1 + distance, tokens)
        after = held_out_recall(learnable, scores[:, distance], 1 + distance, tokens)
        assert after > before + 0.03, (distance, before, after)


def test_reported_recall_is_that_of_validation_sequences(learnable: Trace, trained: Trained) -> None:
    tokens = learnable.tokens(learnable.in_split(VALIDATION))
    known = SourceView(learnable, 1).known(tokens, decode=True)
    scores = corrected(trained.network, known)
    for distance in range(3):
        for row, values in enumerate((known.look, scores)):
            wanted = held_out_recall(learnable, values[:, distance], 1 + distance, tokens)
            assert trained.recall[row, distance] == pytest.approx(wanted, abs=2e-3)


def test_probabilities_mean_what_they_say(learnable: Trace, trained: Trained) -> None:
    networks = [trained.network] * SIZE.layers
    tokens = learnable.tokens(learnable.in_split(VALIDATION, TEST))
    p = LearnedPredictor(networks).probabilities(learnable, 1, 1, tokens, decode=True)
    chosen = learnable.chosen(1, tokens)
    assert p.sum() == pytest.approx(chosen.sum(), rel=0.05)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (p >= low) & (p < low + 0.25)
        assert abs(p[inside].mean() - chosen[inside].mean()) < 0.08


def test_what_cannot_be_learned_leaves_look_ahead(learnable: Trace) -> None:
    """Only noise lies between look-ahead and truth, and there is little to learn from: never below look-ahead."""
    noise = synthetic_trace(SIZE, ASKED, learnable=0.0, seed=2)
    found = train_source(noise, 1, Settings(passes=3, batch=128, units=64, rate=0.05))
    assert (found.recall[1] >= found.recall[0]).all()


def test_the_last_layers_are_no_targets_beyond_the_model(learnable: Trace) -> None:
    found = train_source(learnable, SIZE.layers - 1, Settings(passes=1, batch=256, units=16))
    assert np.isfinite(found.recall[:, 0]).all() and np.isnan(found.recall[:, 1:]).all()


def test_the_same_seed_gives_the_same_network(learnable: Trace) -> None:
    one, two = (train_source(learnable, 2, Settings(passes=1, batch=256, units=16)).network for _ in range(2))
    np.testing.assert_array_equal(one.out, two.out)
    other = train_source(learnable, 2, Settings(passes=1, batch=256, units=16, seed=1)).network
    assert not np.array_equal(one.out, other.out)


def test_only_training_sequences_are_learned_from(learnable: Trace) -> None:
    """What test sequences hold makes no difference."""
    tokens = learnable.tokens(learnable.in_split(TEST))
    scores, look = learnable.scores.copy(), learnable.look.copy()
    scores[:, tokens], look[:, tokens] = 0, 7
    settings = Settings(passes=1, batch=256, units=16)
    one = train_source(learnable, 2, settings).network
    two = train_source(learnable._replace(scores=scores, look=look), 2, settings).network
    np.testing.assert_array_equal(one.out, two.out)


def test_progress_goes_from_nothing_to_everything(learnable: Trace) -> None:
    seen: list[tuple[int, int]] = []
    last = SIZE.layers - 1
    train_source(
        learnable, last, Settings(passes=1, batch=512, units=16), lambda _, done, all_: seen.append((done, all_))
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_a_trace_without_validation_sequences_is_refused(learnable: Trace) -> None:
    with pytest.raises(TraceError, match="0 validation tokens"):
        train_source(learnable._replace(split=np.full_like(learnable.split, TRAIN)), 1, SETTINGS)


def test_networks_keep_within_their_memory() -> None:
    for experts, hidden in ((16, 256), (64, 2048), (128, 2048), (8, 4096), (256, 2048)):
        for block in (False, True):
            units = choose_units(experts, 128, hidden, block)
            look = (3 * experts + 128) * hidden * 1.0625
            assert units >= 64 and (look > BYTES * 0.8 or look + units * 2 * 1.0625 * (7 * experts + 257) < BYTES)
