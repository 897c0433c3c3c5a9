"""The learned predictor's definition: what it starts from, what it may look at, and that its files are trusted for a
reason.
"""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.predictor.errors import PredictorError
from moe_offload.predictor.network import (
    DECAY,
    Block,
    LearnedPredictor,
    SourceNetwork,
    SourceView,
    corrected,
    input_size,
)
from moe_offload.predictor.network_file import FORMAT, NetworkInfo, read_networks, write_networks
from moe_offload.predictor.synthetic import Routing as Asked
from moe_offload.predictor.synthetic import Size, synthetic_trace
from moe_offload.predictor.trace import DISTANCES, Trace

SIZE = Size(layers=5, experts=12, top_k=3, sequences=10, tokens=24, prompt_tokens=12, hidden=16)
UNITS = 8


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthetic_trace(SIZE, Asked(popular=0.4, repeats=0.45, embedding=0.4), seed=3)


def random_network(trace: Trace, source: int, *, out: float, seed: int = 0, blocks: int = 1) -> SourceNetwork:
    rng = np.random.default_rng([seed, source])

    def some(*shape: int) -> NDArray[np.float32]:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    experts, projected = trace.info.experts, trace.info.projected
    inputs = input_size(experts, projected)
    deviation = np.sqrt(trace.variance[source])
    return SourceNetwork(
        trace.projection[source] / deviation[:, None], trace.offset[source] / deviation,
        some(UNITS, inputs), some(UNITS), some(UNITS, inputs), some(UNITS),
        tuple(Block(some(UNITS, UNITS), some(UNITS), some(UNITS, UNITS)) for _ in range(blocks)),
        np.float32(out) * some(DISTANCES, experts, UNITS), np.float32(out) * some(DISTANCES, experts),
        np.full((2, DISTANCES), 1.5, np.float32), np.full((2, DISTANCES), -0.2, np.float32),
    )  # fmt: skip


def test_without_a_correction_it_is_gate_look_ahead(trace: Trace) -> None:
    tokens = np.arange(40)
    known = SourceView(trace, 2).known(tokens, decode=True)
    scores = corrected(random_network(trace, 2, out=0.0), known)
    np.testing.assert_array_equal(scores, trace.look[2, tokens].astype(np.float32))
    assert not np.array_equal(corrected(random_network(trace, 2, out=1.0), known), scores)


def test_probabilities_rank_as_scores_and_add_up_to_about_k(trace: Trace) -> None:
    networks = [random_network(trace, source, out=0.0) for source in range(SIZE.layers)]
    tokens = np.arange(trace.experts.shape[1])
    p = LearnedPredictor(networks).probabilities(trace, 3, 1, tokens, decode=True)
    look = trace.look[3, tokens, 0].astype(np.float32)
    assert p.shape == (len(tokens), SIZE.experts) and 0 <= p.min() and p.max() <= 1
    best = np.argsort(-p, axis=1, kind="stable")[:, 0]
    np.testing.assert_array_equal(np.take_along_axis(look, best[:, None], 1)[:, 0], look.max(axis=1))
    for row in range(0, len(tokens), 17):
        assert (np.diff(look[row][np.argsort(p[row], kind="stable")]) >= -1e-6).all()


def test_what_came_before_is_of_the_same_sequence_only(trace: Trace) -> None:
    view = SourceView(trace, 1)
    starts = trace.starts[:-1]
    first = view.known(starts, decode=True)
    assert not first.recent.any() and not first.before.any() and not first.known.any()
    deviation = np.sqrt(trace.variance[1])
    wanted = np.zeros(trace.info.projected)
    for token in range(int(starts[2]), int(starts[3]) - 1):
        wanted = DECAY * wanted + (1 - DECAY) * trace.state(1, np.array([token]))[0] / deviation
        after = view.known(np.array([token + 1]), decode=True)
        np.testing.assert_allclose(after.recent[0], wanted, atol=4e-3)  # kept in f16
        assert after.known[0] == 1
        np.testing.assert_array_equal(np.flatnonzero(after.before[0, 0]), np.sort(trace.experts[1, token]))


def test_in_a_prompt_nothing_is_known_of_the_experts_of_the_token_before(trace: Trace) -> None:
    known = SourceView(trace, 1).known(np.arange(1, 20), decode=False)
    assert not known.before.any() and not known.known.any() and known.recent.any()


def test_nothing_of_the_future_is_looked_at(trace: Trace) -> None:
    """Change everything that happens later: predictions of a token stay bit for bit."""
    networks = [random_network(trace, source, out=1.0) for source in range(SIZE.layers)]
    token, layer, distance = int(trace.starts[4]) + 7, 4, 2
    source = layer - distance + 1
    changed = {
        name: getattr(trace, name).copy() for name in ("experts", "scores", "look", "hidden", "hidden_scale", "weights")
    }
    for name, array in changed.items():
        replaced = np.random.default_rng(1).permutation(array.reshape(-1)).reshape(array.shape)
        later_layers = slice(source, None) if name in ("experts", "scores", "weights") else slice(source + 1, None)
        array[later_layers, token] = replaced[later_layers, token]
        array[:, token + 1 :] = replaced[:, token + 1 :]
    changed["experts"][:, token:] = (changed["experts"][:, token:] + 5) % SIZE.experts
    changed["experts"][:source, token] = trace.experts[:source, token]
    other = trace._replace(**changed)
    for decode in (False, True):
        args = (layer, distance, np.array([token]))
        predicted = LearnedPredictor(networks).probabilities(trace, *args, decode=decode)
        np.testing.assert_array_equal(LearnedPredictor(networks).probabilities(other, *args, decode=decode), predicted)
        moved = other._replace(look=np.ascontiguousarray(other.look[:, ::-1]))
        assert not np.array_equal(LearnedPredictor(networks).probabilities(moved, *args, decode=decode), predicted)


def test_a_trace_with_other_projections_is_refused(trace: Trace) -> None:
    networks = [random_network(trace, source, out=1.0) for source in range(SIZE.layers)]
    turned = trace._replace(projection=-trace.projection)
    with pytest.raises(PredictorError, match="--like"):
        LearnedPredictor(networks).probabilities(turned, 2, 1, np.arange(3), decode=True)


INFO = NetworkInfo(FORMAT, "ab" * 32, "qwen3_moe", SIZE.layers, SIZE.experts, SIZE.top_k, 16, 16, 100)


def written(trace: Trace, path: Path) -> list[SourceNetwork]:
    networks = [random_network(trace, source, out=1.0, blocks=source % 2) for source in range(SIZE.layers)]
    info = dataclasses.replace(INFO, hidden_size=trace.info.hidden_size, projected=trace.info.projected)
    write_networks(path, info, networks)
    return networks


def test_a_file_holds_what_was_written(trace: Trace, tmp_path: Path) -> None:
    networks = written(trace, tmp_path / "p.safetensors")
    info, found = read_networks(tmp_path / "p.safetensors", "ab" * 32)
    assert (info.layers, info.tokens) == (SIZE.layers, 100)
    for mine, theirs in zip(networks, found, strict=True):
        assert len(mine.blocks) == len(theirs.blocks)
        for name in SourceNetwork._fields:
            if name != "blocks":
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        for a, b in zip(mine.blocks, theirs.blocks, strict=True):
            np.testing.assert_array_equal(a.down, b.down)
    assert list(tmp_path.iterdir()) == [tmp_path / "p.safetensors"]


def test_another_models_predictor_is_refused_by_name(trace: Trace, tmp_path: Path) -> None:
    written(trace, tmp_path / "p.safetensors")
    with pytest.raises(PredictorError, match="another model .*abababababababab.*cdcdcdcdcdcdcdcd"):
        read_networks(tmp_path / "p.safetensors", "cd" * 32)
    with pytest.raises(PredictorError, match="train-predictor makes one"):
        read_networks(tmp_path / "none.safetensors")


def test_a_disk_that_is_full_leaves_nothing_behind(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PredictorError, match="No space left"):
        written(trace, tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused(trace: Trace, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "p.safetensors"
    written(trace, path)
    whole = bytearray(path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(PredictorError):
            read_networks(path)
        return
    at = data.draw(st.integers(0, 8 + length - 1), label="at")
    whole[at] ^= data.draw(st.integers(1, 255), label="bits")
    path.write_bytes(whole)
    try:
        found = read_networks(path)
    except PredictorError:
        return
    assert len(found.networks) == found.info.layers  # the byte was of a name or a number that may be another


def test_numbers_that_are_none_are_refused(trace: Trace, tmp_path: Path) -> None:
    networks = [random_network(trace, source, out=1.0) for source in range(SIZE.layers)]
    networks[2].out[0, 0, 0] = np.nan
    info = dataclasses.replace(INFO, hidden_size=trace.info.hidden_size, projected=trace.info.projected)
    write_networks(tmp_path / "p.safetensors", info, networks)
    with pytest.raises(PredictorError, match="2.out"):
        read_networks(tmp_path / "p.safetensors")
