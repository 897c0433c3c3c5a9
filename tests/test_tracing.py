"""What a trace says of a model: the same as the model's modules, sequence by sequence, given and generated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import moe_offload
from moe_offload import tracing
from moe_offload.models.routers import read_routers
from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.trace import TEST, Trace, read_trace, split_of
from moe_offload.tracing import TraceResult, trace_model
from tests import tiny_models

KEY = "ab" * 32
PROJECTED = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreTrainedModel]:
    folder = tiny_models.save(tiny_models.build("olmoe", eos_token_id=None), tmp_path_factory.mktemp("tracing"))
    loaded = moe_offload.load(folder, device="cpu", threads=1)
    loaded.generation_config.eos_token_id = None
    yield loaded
    loaded.offload.close()


@pytest.fixture
def sequences() -> list[NDArray[np.int64]]:
    lengths = [9, 9, 9, 5, 9, 12]
    return [tiny_models.token_ids(1, length, seed)[0].numpy() for seed, length in enumerate(lengths)]


def traced(model: PreTrainedModel, sequences: Any, path: Path, **wishes: Any) -> tuple[TraceResult, Trace]:
    result = trace_model(model, sequences, path, fingerprint=KEY, projected=PROJECTED, **wishes)
    return result, read_trace(path, KEY)


def alone(model: PreTrainedModel, ids: NDArray[np.int64]) -> tuple[list[Any], list[Any], list[Any]]:
    """Of each layer: what its experts got, whom its router chose and with which weights."""
    hidden: list[Any] = []
    index: list[Any] = []
    weights: list[Any] = []

    def note(_: object, args: Any, out: Any) -> None:
        hidden.append(args[0].numpy().reshape(-1, args[0].shape[-1]))
        index.append(out[2].numpy())
        weights.append(out[1].numpy())

    with torch.inference_mode():
        layers: Any = model.base_model
        handles = [layer.mlp.gate.register_forward_hook(note) for layer in layers.layers]
        model.base_model(input_ids=torch.from_numpy(ids[None]), use_cache=False)
        for handle in handles:
            handle.remove()
    return hidden, index, weights


def check_against_modules(
    model: PreTrainedModel, trace: Trace, sequence: int, ids: NDArray[np.int64], tolerance: float = 0.02
) -> None:
    at = trace.tokens([sequence])
    hidden, index, weights = alone(model, ids)
    routers = read_routers(model)
    assert len(at) == len(ids)
    for layer in range(3):
        assert np.array_equal(np.sort(trace.experts[layer, at]), np.sort(index[layer]))
        assert np.allclose(np.sort(trace.weights[layer, at]), np.sort(weights[layer]), atol=2e-3)
        assert np.allclose(trace.scores[layer, at], routers.layers[layer].scores(hidden[layer]), atol=tolerance)
        if layer:
            look = routers.sources[layer].look(hidden[layer - 1])
            assert np.allclose(trace.look[layer, at], look, atol=tolerance)
            state = hidden[layer - 1] @ trace.projection[layer].T - trace.offset[layer]
            assert np.allclose(trace.state(layer, at), state, atol=np.abs(state).max() / 100)
    embedding: Any = model.get_input_embeddings().weight
    embedded = embedding[torch.from_numpy(ids)].detach().numpy()
    embedded = embedded / np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-24)
    state = embedded @ trace.projection[0].T - trace.offset[0]
    assert np.allclose(trace.state(0, at), state, atol=np.abs(state).max() / 100)


def test_a_trace_is_what_the_modules_do(model: PreTrainedModel, sequences: Any, tmp_path: Path) -> None:
    result, trace = traced(model, sequences, tmp_path / "t", note="random")
    assert (result.sequences, result.tokens, result.resumed, result.was_there) == (6, 53, 0, False)
    assert trace.info == result.info and trace.info.note == "random"
    assert trace.prompt_tokens.tolist() == [9, 9, 9, 5, 9, 12] == np.diff(trace.starts).tolist()
    assert trace.split.tolist() == [split_of(each) for each in sequences]
    for number, ids in enumerate(sequences):
        check_against_modules(model, trace, number, ids)
    assert [each.name for each in tmp_path.iterdir()] == ["t"]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_generated_tokens(model: PreTrainedModel, sequences: Any, tmp_path: Path) -> None:
    _, trace = traced(model, sequences, tmp_path / "t", new_tokens=3)
    assert np.diff(trace.starts).tolist() == [12, 12, 12, 8, 12, 15]
    assert trace.generated(trace.tokens([3])).tolist() == [False] * 5 + [True] * 3
    for number, ids in enumerate(sequences):
        said = model.generate(torch.from_numpy(ids[None]), do_sample=False, max_new_tokens=3, pad_token_id=0)
        check_against_modules(model, trace, number, said[0].numpy())


def test_a_sequence_ends_where_the_model_ends(
    model: PreTrainedModel, sequences: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = model.generate(torch.from_numpy(sequences[0][None]), do_sample=False, max_new_tokens=4, pad_token_id=0)
    new = said[0, 9:].tolist()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [new[2]])
    _, trace = traced(model, sequences, tmp_path / "t", new_tokens=4)
    assert np.diff(trace.starts)[0] == 9 + new.index(new[2])
    check_against_modules(model, trace, 0, said[0, : 9 + new.index(new[2])].numpy())


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def test_interrupted_and_gone_on(
    model: PreTrainedModel, sequences: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = traced(model, sequences, tmp_path / "whole")
    monkeypatch.setattr(tracing, "_BATCH", 2)

    def stop(what: str, done: int, total: int) -> None:
        if what == "tracing" and done >= 20:
            raise Stop

    with pytest.raises(Stop):
        traced(model, sequences, tmp_path / "t", progress=stop)
    assert (tmp_path / "t.parts").is_dir() and not (tmp_path / "t").exists()
    result, trace = traced(model, sequences, tmp_path / "t")
    assert result.resumed == 3
    names = Trace._fields[1:6]
    assert all(np.array_equal(getattr(trace, name), getattr(whole, name)) for name in names)
    assert np.allclose(trace.scores, whole.scores, atol=0.02)


def test_there_already(model: PreTrainedModel, sequences: Any, tmp_path: Path) -> None:
    traced(model, sequences, tmp_path / "t")
    before = (tmp_path / "t").stat().st_mtime_ns
    result, _ = traced(model, sequences, tmp_path / "t")
    assert result.was_there and (tmp_path / "t").stat().st_mtime_ns == before
    for other in (dict(new_tokens=1), dict(note="other")):
        with pytest.raises(TraceError, match="there already, and not what"):
            traced(model, sequences, tmp_path / "t", **other)
    (tmp_path / "t").write_text("something else")
    with pytest.raises(TraceError, match="there already"):
        traced(model, sequences, tmp_path / "t")
    assert (tmp_path / "t").read_text() == "something else"


def test_projections_are_fitted_on_training_text_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    sequences = [tiny_models.token_ids(1, 9, seed)[0].numpy() for seed in range(40)]
    training = [each for each in sequences if split_of(each) == 0]
    assert 0 < len(training) < len(sequences)
    _, trace = traced(model, sequences, tmp_path / "all")
    _, other = traced(model, training, tmp_path / "training")
    assert np.allclose(trace.projection, other.projection, atol=1e-4)
    assert np.allclose(trace.offset, other.offset, atol=1e-3)


def test_like_another_trace(model: PreTrainedModel, sequences: Any, tmp_path: Path) -> None:
    _, first = traced(model, sequences, tmp_path / "first")
    _, other = traced(model, sequences[3:], tmp_path / "other", like=first)
    assert np.array_equal(first.projection, other.projection) and (other.split == TEST).all()
    check_against_modules(model, other, 0, sequences[3])
    foreign = first._replace(info=first.info.__class__(**{**_values(first), "model": "cd" * 32}))
    with pytest.raises(TraceError, match="another model"):
        traced(model, sequences, tmp_path / "foreign", like=foreign)


def _values(trace: Trace) -> dict[str, Any]:
    return {name: getattr(trace.info, name) for name in trace.info.__dataclass_fields__}


def test_no_training_text(model: PreTrainedModel, tmp_path: Path) -> None:
    seeds = (tiny_models.token_ids(1, 9, seed)[0].numpy() for seed in range(60))
    with pytest.raises(TraceError, match=r"none of \d sequences is for training"):
        traced(model, [each for each in seeds if split_of(each) != 0][:3], tmp_path / "t")


@pytest.mark.parametrize("sequences", [[], [[1, 2], []]])
def test_nothing_to_trace(model: PreTrainedModel, sequences: Any, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nothing to trace"):
        traced(model, sequences, tmp_path / "t")


def test_batches_hold_what_fits() -> None:
    ids = [np.zeros(length, np.int64) for length in [1000, 1000, 1000, 3, 3000, 3, 3]]
    assert list(tracing._batches(ids, 1)) == [[1, 2], [3], [4], [5, 6]]
