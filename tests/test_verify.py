"""The reference of `verify` is transformers' own model bit for bit, layer by layer; and what is wrong is seen."""

import gc
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import moe_offload
from moe_offload.layer_stream import LayerStream
from moe_offload.loading import read_config
from moe_offload.models.errors import CheckpointError, MoeOffloadError, NotEnoughMemoryError, UnsupportedModelError
from moe_offload.models.spec import model_class
from moe_offload.suspended_forward import SuspendedForward, stopping_at
from moe_offload.verify_metrics import Agreement, Comparison
from moe_offload.verify_model import compare
from moe_offload.verify_reference import Reference, load_reference
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.models import test_prequantised

# Plain loops, several streams or caches between layers, state spaces, linear attention, adapters, routers of all kinds.
_ARCHITECTURES = (
    "afmoe", "bailing_hybrid", "deepseek_v3", "deepseek_v4", "gemma4_text", "gpt_oss", "granitemoehybrid", "hy_v4",
    "jamba", "lfm2_moe", "llama4_text", "longcat_flash", "mixtral", "nemotron_h", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
SEQUENCES = [tiny_models.token_ids(1, 12, 0), tiny_models.token_ids(1, 7, 1), tiny_models.token_ids(2, 12, 2)]


def _any(layers: Any) -> Any:
    """For what only these architectures' layers have."""
    return layers


def plain_logits(folder: Path, **options: Any) -> list[torch.Tensor]:
    config = read_config(folder)
    kind = model_class(config)
    model = kind.from_pretrained(folder, **{"dtype": "auto", "experts_implementation": "eager"} | options).eval()
    with torch.inference_mode():
        return [model(input_ids=ids, use_cache=False).logits.float() for ids in SEQUENCES]


def streamed_logits(reference: Reference) -> list[torch.Tensor]:
    try:
        with LayerStream(reference) as stream:
            stream.run(SEQUENCES)
            return [stream.logits(number) for number in range(len(SEQUENCES))]
    finally:
        reference.close()


@pytest.mark.parametrize("model_type", [each for each in _ARCHITECTURES if each in tiny_models.known_architectures()])
def test_the_reference_is_transformers(model_type: str, checkpoint: Checkpoints) -> None:
    # transformers 5.14 itself cannot run deepseek_v4 in bfloat16
    folder = checkpoint(model_type, torch.float32 if model_type == "deepseek_v4" else torch.bfloat16)
    for found, expected in zip(streamed_logits(load_reference(folder)), plain_logits(folder), strict=True):
        assert torch.equal(found, expected)


def test_the_reference_in_another_dtype(checkpoint: Checkpoints) -> None:
    folder = checkpoint("mixtral", torch.bfloat16)
    reference = load_reference(folder, dtype="float32", attn_implementation="eager")
    assert reference.dtype == torch.float32
    expected = plain_logits(folder, dtype=torch.float32, attn_implementation="eager")
    for found, wanted in zip(streamed_logits(reference), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("make", [test_prequantised.fp8_checkpoint, test_prequantised.mxfp4_checkpoint])
def test_a_quantised_checkpoint(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """What is encoded is what `detach` gives, of which other tests know that it is what transformers decodes."""
    folder = make(tmp_path / "model")
    found = streamed_logits(load_reference(folder))
    model = moe_offload.load(folder, device="cpu").offload.detach()
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        expected = [model(input_ids=ids, use_cache=False).logits.float() for ids in SEQUENCES]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# One layer at a time


@pytest.fixture
def only_what_is_new() -> Iterator[None]:
    """Collections do not look at what was there before, nor does `alive`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> int:
    """Bytes of all tensors that something holds."""
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, nn.Parameter) and each.device.type == "cpu"
    }
    return sum(storages.values())


@pytest.mark.usefixtures("only_what_is_new")
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = dict(hidden_size=64, moe_intermediate_size=64, num_hidden_layers=6, vocab_size=128)
    model = tiny_models.build("qwen3_moe", **config)
    tiny_models.save(model, tmp_path)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - 6 * layer
    del model
    before = alive()
    reference = load_reference(tmp_path)
    resident = alive() - before
    assert outside < resident < outside + layer / 4  # norms and routers are small
    seen: list[int] = []
    monkeypatch.setattr(reference.layers["model.layers.3"], "forward", Watched(reference, "model.layers.3"))
    fill = Reference.fill

    def watched(self: Reference, path: str) -> None:
        seen.append(alive() - before)
        fill(self, path)
        seen.append(alive() - before)

    monkeypatch.setattr(Reference, "fill", watched)
    activations = 100 * 12 * 64 * 4
    with LayerStream(reference) as stream:
        stream.run(SEQUENCES)
        seen.append(alive() - before)
    assert max(seen) > resident + 0.9 * layer and max(seen) < resident + layer + activations < resident + 2 * layer
    assert seen[-1] < resident + activations
    reference.close()


class Watched:
    """A layer's forward that asks whether the layer is filled, and no other."""

    def __init__(self, reference: Reference, path: str) -> None:
        self.forward = reference.layers[path].forward
        self.reference, self.path = reference, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        filled = {
            path
            for path, layer in _any(self.reference.layers).items()
            if layer.mlp.experts.down_proj is not None or layer.self_attn.q_proj.weight is not None
        }
        assert filled == {self.path}
        return self.forward(*args, **kwargs)


def forwards() -> list[threading.Thread]:
    """Threads of forwards that nobody has ended."""
    return [each for each in threading.enumerate() if each.name == "forward"]


def test_what_is_interrupted_leaves_nothing(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_reference(checkpoint("qwen3_moe"))

    def interrupted(done: int, total: int) -> None:
        assert (done, total, len(forwards())) == (1, 3, len(SEQUENCES))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), LayerStream(reference) as stream:
        stream.run(SEQUENCES, interrupted)
    assert not forwards()
    assert not any("forward" in module.__dict__ for module in reference.model.modules())
    assert all(layer.mlp.experts.down_proj is None for layer in _any(reference.layers).values())
    for found, expected in zip(streamed_logits(reference), plain_logits(checkpoint("qwen3_moe")), strict=True):
        assert torch.equal(found, expected)  # and it can be run again


def test_a_failing_layer(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors come out where the reference is run, whichever thread they were on."""
    for path in ("model.layers.1", "model.rotary_emb"):
        reference = load_reference(checkpoint("qwen3_moe"))

        def failing(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(reference.model.get_submodule(path), "forward", failing)
        with pytest.raises(RuntimeError, match="broken"), LayerStream(reference) as stream:
            stream.run(SEQUENCES)
        assert not forwards()
        reference.close()


def test_a_forward_that_stops() -> None:
    """Asked again and again, also for one module, in whatever order."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with torch.inference_mode():
        expected = second(first(second(x)))
    with stopping_at([first, second]), torch.inference_mode():
        forward = SuspendedForward(lambda: second(first(second(x))))
        forward.start()
        order = []
        while forward.call is not None:
            order.append(forward.call.module)
            forward.answer(forward.call())
        assert order == [second, first, second] and torch.equal(forward.result, expected)
        assert torch.equal(second(first(second(x))), expected)  # on other threads nothing stops
        forward.close()
        forward.close()


# What cannot be run


def test_models_without_a_reference(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="makes no logits"):
        load_reference(checkpoint("qwen3_vl_moe_text"))
    with pytest.raises(NotEnoughMemoryError, match="largest layer"):
        load_reference(checkpoint("qwen3_moe"), memory_limit=10_000)
    shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "cut")
    for path in (tmp_path / "cut").glob("*.safetensors"):
        tensors = {name: value for name, value in load_file(path).items() if "layers.1.self_attn.k_proj" not in name}
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"k_proj"):
        load_reference(tmp_path / "cut")


# The comparison


def agreement(folder: Path, model: PreTrainedModel, decode_tokens: int = 3) -> tuple[Agreement, Agreement]:
    sequences = [tiny_models.token_ids(1, 16, seed) for seed in range(3)]
    reference = load_reference(folder)
    try:
        with LayerStream(reference) as stream:
            stream.run(sequences)
            found = compare(stream.logits, model, sequences, decode_tokens=decode_tokens)
    finally:
        reference.close()
        model.offload.close()
    assert found.decode is not None
    assert found.prompt.tokens == 3 * (16 - decode_tokens) and found.decode.tokens == 3 * decode_tokens
    assert found.all.tokens == 48 and found.all.scored == 45
    return found.prompt, found.decode


def test_the_engine_agrees(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe")
    for found in agreement(folder, moe_offload.load(folder, device="cpu")):
        assert found.max_error < 1e-4 and found.top1 == 100 and found.max_divergence < 1e-6
        assert abs(found.change) < 1e-3 and found.spread > 0.1


def test_one_wrong_expert_is_seen(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """In the engine's copy of the weights, not in the reference's."""
    folder = checkpoint("qwen3_moe")
    shutil.copytree(folder, tmp_path / "other")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    (path,) = [each for each in (tmp_path / "other").glob("*.safetensors") if name in load_file(each)]
    tensors = load_file(path)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, {"format": "pt"})
    prompt, _ = agreement(folder, moe_offload.load(tmp_path / "other", device="cpu"))
    assert prompt.max_error > 0.01 and prompt.max_divergence > 1e-5


def test_a_wrong_cache_is_seen(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that come one by one go through the keys and values of those before."""
    folder = checkpoint("qwen3_moe")
    model = moe_offload.load(folder, device="cpu")
    forward = model.forward

    def forgetful(**kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            cache.layers[1].values = cache.layers[1].values.flip(2)
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    prompt, decode = agreement(folder, model)
    assert prompt.max_error < 1e-4 and decode.max_error > 0.01


def test_a_reference_of_no_numbers(checkpoint: Checkpoints) -> None:
    with (
        moe_offload.load(checkpoint("qwen3_moe"), device="cpu").offload as engine,
        pytest.raises(MoeOffloadError, match="--reference-dtype f32"),
    ):
        compare(lambda _: torch.full((1, 4, 128), math.nan), engine._model, [tiny_models.token_ids(1, 4)])


# The figures


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(2, 30), st.sampled_from([0.0, 0.1, 3.0]), st.booleans()
)
def test_figures(seed: int, tokens: int, vocabulary: int, noise: float, last_is_open: bool) -> None:
    """As the textbook has them, in f64; also when the positions come in two parts, and few rows at a time."""
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 2, (tokens, vocabulary)).astype(np.float32)
    b = (a + noise * rng.normal(0, 1, a.shape)).astype(np.float32)
    ids = rng.integers(0, vocabulary, tokens - last_is_open)
    parts = Comparison(), Comparison()
    cut = int(rng.integers(0, tokens))
    for part, rows in zip(parts, (slice(0, cut), slice(cut, tokens)), strict=True):
        if len(a[rows]):
            part.add(*(torch.from_numpy(each[rows]) for each in (a, b, ids)))
    whole = Comparison()
    for part in parts:
        whole.merge(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_offload.verify_metrics._AT_ONCE", 2 * vocabulary)
        together = Comparison()
        together.add(*(torch.from_numpy(each) for each in (a, b, ids)))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a.astype(np.float64), b.astype(np.float64)))
    divergence = (np.exp(p) * (p - q)).sum(1)
    losses = [-each[np.arange(len(ids)), ids] for each in (p, q)]
    for found in (whole.result(), together.result()):
        assert (found.tokens, found.scored) == (tokens, len(ids))
        error = np.abs(a - b)
        assert found.max_error == pytest.approx(error.max()) and found.mean_error == pytest.approx(
            error.mean(), rel=1e-5
        )
        assert found.spread == pytest.approx(a.astype(np.float64).std(), rel=1e-5)
        assert found.top1 == pytest.approx(100 * (a.argmax(1) == b.argmax(1)).mean())
        assert found.divergence == pytest.approx(divergence.mean(), rel=1e-3, abs=1e-5)
        assert found.max_divergence == pytest.approx(divergence.max(), rel=1e-3, abs=1e-5)
        if len(ids):
            base, changed = (math.exp(each.mean()) for each in losses)
            assert found.reference_perplexity == pytest.approx(base, rel=1e-4)
            assert found.perplexity == pytest.approx(changed, rel=1e-4)
            assert found.change == pytest.approx(100 * (changed / base - 1), rel=1e-3, abs=1e-2)
        else:
            assert math.isnan(found.perplexity) and math.isnan(found.change)
        if len(ids) > 1:
            error = (losses[1] - losses[0]).std(ddof=1) / math.sqrt(len(ids))
            assert found.change_error == pytest.approx(100 * changed / base * error, rel=1e-2, abs=1e-3)


def figures(reference: list[float], model: list[float]) -> Agreement:
    comparison = Comparison()
    comparison.add(torch.tensor([reference, reference]), torch.tensor([model, model]), torch.tensor([0, 0]))
    return comparison.result()


def test_tokens_that_are_ruled_out() -> None:
    found = figures([1.0, 0.0, -math.inf], [1.0, 0.0, -math.inf])
    assert (found.max_error, found.divergence, found.change, found.is_finite) == (0, 0, 0, True)
    assert math.isfinite(found.spread)
    ruled_in = figures([1.0, 0.0, -math.inf], [1.0, 0.0, 0.0])
    assert ruled_in.max_error == math.inf and not ruled_in.is_finite and 0 < ruled_in.divergence < 1


def test_no_numbers() -> None:
    found = figures([1.0, 0.0], [math.nan, 0.0])
    assert not found.is_finite and math.isnan(found.max_error) and math.isnan(found.divergence)
    other = Comparison()
    other.add(torch.zeros(1, 2), torch.full((1, 2), math.nan), torch.tensor([0]))
    other.add(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0]))
    assert math.isnan(other.result().max_error)


def test_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match="following"):
        Comparison().add(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing"):
        Comparison().result()
