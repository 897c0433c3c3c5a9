import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.predictor.baselines import Perfect
from moe_offload.predictor.metrics import BEYOND, evaluate
from moe_offload.predictor.resampling import Ratio
from moe_offload.predictor.samples import BATCHES, sample_of
from moe_offload.predictor.trace import Trace
from tests.predictor.small_traces import Says, small_trace

E, K, L = 8, 2, 3


@st.composite
def routed(draw: st.DrawFn) -> tuple[Trace, NDArray[np.float32]]:
    """A trace, and what somebody says about it: few values, so that there are ties."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    lengths = draw(st.lists(st.integers(2, 20), min_size=1, max_size=8))
    prompts = [draw(st.integers(1, length)) for length in lengths]
    scores = rng.permuted(np.arange(L * sum(lengths) * E).reshape(L, -1, E) % E, axis=2)
    experts = np.argsort(-scores, axis=2)[..., :K]
    said = rng.integers(0, 5, scores.shape) / 4
    return small_trace(experts, E, lengths=lengths, prompts=prompts, scores=scores), said.astype(np.float32)


@given(routed(), st.booleans())
@settings(deadline=None, max_examples=15)
def test_figures_are_those_of_their_definitions(case: tuple[Trace, NDArray[np.float32]], decode: bool) -> None:
    trace, said = case
    sample = sample_of(trace, range(trace.sequences), decode=decode)
    found = evaluate(Says(said), trace, sample, threshold=0.6)
    recall, exact, loose, four, brier = [], [], [], [], []
    beyond: dict[int, list[float]] = {m: [] for m in BEYOND}
    layer = 2
    for token in sample.tokens:
        true = set(trace.experts[layer, token].tolist())
        order = sorted(range(E), key=lambda e: (-said[layer, token, e], e))
        ranked = np.argsort(-trace.scores[layer, token].astype(float)).tolist()
        recall.append(len(true & set(order[:K])) / K)
        exact.append(true == set(order[:K]))
        loose.append(len(set(ranked[: K + 2]) & set(order[:K])) / K)
        four.append(len(set(ranked[:6]) & set(order[:4])) / 4)
        brier += [(said[layer, token, e] - (e in true)) ** 2 for e in range(E)]
        for m in BEYOND:
            beyond[m].append(len(true & set(order[: K + m])) / K)
    for distance in (1, 2, 3):
        figures = found.figures[layer, distance]
        assert figures.recall.value == pytest.approx(np.mean(recall))
        assert figures.exact.value == pytest.approx(np.mean(exact))
        assert figures.loose.value == pytest.approx(np.mean(loose))
        assert figures.four_in_six.value == pytest.approx(np.mean(four))
        assert figures.brier.value == pytest.approx(np.mean(brier), rel=1e-5)
        assert figures.curve.count.sum() == len(sample.tokens) * E
        for m in BEYOND:
            assert figures.recall_beyond[m].value == pytest.approx(np.mean(beyond[m]))
    assert found.at(1).recall.value == pytest.approx(
        np.mean([found.figures[each, 1].recall.value for each in range(L)])
    )
    json.dumps(found.to_dict(), allow_nan=False)


@given(routed(), st.booleans())
@settings(deadline=None, max_examples=15)
def test_presence_is_that_of_its_batches(case: tuple[Trace, NDArray[np.float32]], decode: bool) -> None:
    trace, said = case
    sample = sample_of(trace, range(trace.sequences), decode=decode)
    found = evaluate(Says(said), trace, sample, threshold=0.6)
    for batch in sample.batches:
        right = predicted = came = 0
        for begin, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
            tokens = sample.tokens[batch.rows[begin:end]]
            wanted = set(np.flatnonzero(1 - np.prod(1 - said[1, tokens].astype(float), axis=0) >= 0.6).tolist())
            used = set(trace.experts[1, tokens].ravel().tolist())
            right, predicted, came = right + len(wanted & used), predicted + len(wanted), came + len(used)
        figures = found.figures[1, 2].presence[batch.size]
        if predicted:
            assert figures.precision.value == pytest.approx(right / predicted)
        if came:
            assert figures.recall.value == pytest.approx(right / came)


def test_the_perfect_predictor_has_full_marks() -> None:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((L, 200, E)), axis=2)[..., :K]
    trace = small_trace(experts, E, lengths=[10] * 20, prompts=[5] * 20)
    for decode in (True, False):
        figures = evaluate(Perfect(), trace, sample_of(trace, range(20), decode=decode)).at(2)
        for each in (
            figures.recall,
            figures.exact,
            *(p.precision for p in figures.presence.values() if len(p.recall.whole)),
        ):
            assert each.value == 1 or np.isnan(each.value)
        assert figures.brier.value == figures.curve.error == 0
        assert figures.presence[4 if decode else 0].recall.value == 1


def test_the_embedding_and_the_layers_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((L, 100, E)), axis=2)[..., :K]
    trace = small_trace(experts, E, lengths=[10] * 10)
    said = np.zeros((L, 100, E))
    for layer in (1, 2):
        np.put_along_axis(said[layer], experts[layer], 1.0, axis=1)  # layer 0: nothing known
    found = evaluate(Says(said), trace, sample_of(trace, range(10), decode=True))
    assert found.at(1, sources=slice(1, None)).recall.value == 1
    assert found.at(1, sources=slice(1)).recall.value < 0.5
    assert found.to_dict()["distances"]["1"]["recall_from_layers"] == [1, 1, 1]
    with pytest.raises(ValueError, match="no layer"):
        found.at(3, sources=slice(1, None))


def test_with_few_experts_looser_figures_are_left_out() -> None:
    trace = small_trace(np.zeros((1, 6, 1), int), 4)
    figures = evaluate(Says(np.full((1, 6, 4), 0.5)), trace, sample_of(trace, [0], decode=True)).at(1)
    assert np.isnan(figures.four_in_six.value)
    assert figures.recall_beyond[4].value == 1
    assert figures.to_dict()["four_in_six"] == [None, None, None]


def test_decode_takes_generated_tokens_or_all_but_the_first() -> None:
    trace = small_trace(np.zeros((1, 15, 1), int), 4, lengths=[5, 4, 5, 1], prompts=[3, 4, 5, 1])
    assert sample_of(trace, range(4), decode=True).tokens.tolist() == [3, 4, 6, 7, 8, 10, 11, 12, 13]
    assert sample_of(trace, range(4), decode=False).tokens.tolist() == [0, 1, 2, *range(5, 15)]
    assert sample_of(trace, [1], decode=True).unit.tolist() == [0, 0, 0]


def test_batches_in_lockstep_are_of_different_sequences_at_one_step() -> None:
    lengths = [9, 5, 7, 9, 5, 6, 9, 8, 7]
    trace = small_trace(np.zeros((1, sum(lengths), 1), int), 4, lengths=lengths)
    sample = sample_of(trace, range(len(lengths)), decode=True)
    assert [batch.size for batch in sample.batches] == list(BATCHES)
    for batch in sample.batches:
        seen = sample.tokens[batch.rows].reshape(-1, batch.size)
        assert len(np.unique(seen)) == seen.size
        step = seen - trace.starts[trace.sequence_of(seen.ravel())].reshape(seen.shape)
        assert (step == step[:, :1]).all()
        for row, unit in zip(seen, batch.unit, strict=True):
            assert len(set(trace.sequence_of(row).tolist())) == batch.size and unit < batch.units
        assert len(seen) == sum(sorted(batch_steps(lengths, batch.size)))


def batch_steps(lengths: list[int], size: int) -> list[int]:
    """Sequences sorted by length, what is left over out at the short end."""
    ranked = sorted(lengths)[len(lengths) % size :]
    return [min(ranked[at : at + size]) - 1 for at in range(0, len(ranked), size)]


def test_nothing_to_measure_and_wrong_shapes_are_refused() -> None:
    trace = small_trace(np.zeros((1, 3, 1), int), 4, lengths=[1, 2])
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(Perfect(), trace, sample_of(trace, [0], decode=True))
    with pytest.raises(ValueError, match=r"shape \(1, 3\) instead of \(1, 4\)"):
        evaluate(Says(np.zeros((1, 3, 3))), trace, sample_of(trace, [1], decode=True))


def test_figures_of_different_sequences_have_no_paired_difference() -> None:
    with pytest.raises(ValueError, match="3 and 2 units"):
        Ratio(np.ones(3), np.ones(3)).above(Ratio(np.ones(2), np.ones(2)))


def test_overlaps_are_for_prompts_alone() -> None:
    trace = small_trace(np.zeros((1, 128, 1), int), 4, lengths=[32] * 4, prompts=[16] * 4)
    said = Says(np.full((1, 128, 4), 0.05))
    for decode in (True, False):
        sample = sample_of(trace, range(4), decode=decode)
        plain, other = (evaluate(said, trace, sample, overlaps=each).at(1) for each in (None, {1: 0.5}))
        size = 4 if decode else 16
        changed = other.presence[size].brier.value != plain.presence[size].brier.value
        assert changed == (not decode)
        assert other.recall.value == plain.recall.value
