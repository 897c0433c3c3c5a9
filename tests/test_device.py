"""A model on two devices gives the tokens that it gives on the CPU alone: every architecture, every way to generate."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, pipeline

from tests import tiny_models
from tests.cli_model import make_tokenizer
from tests.conftest import Checkpoints
from tests.device_cases import expected, generate, on_cpu, on_device, padded, side_of
from tests.models.test_prequantised import mxfp4_checkpoint

# dense layers first, MLA and hybrid caches, biases, sinks, windows, shared experts, weights applied before the expert
FAMILIES = (
    "qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss", "qwen3_next", "jamba", "llama4_text",
    "longcat_flash",
)  # fmt: skip

WAYS: dict[str, dict[str, object]] = {
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9),
    "beams": dict(num_beams=3),
    "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "chunked prefill": dict(prefill_chunk_size=4),
}


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", num_experts=16, vocab_size=262)  # what the byte tokenizer needs


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    with on_device(folder, 12) as loaded:
        yield loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model(family: str, checkpoint: Checkpoints) -> None:
    """Left padded, with fewer slots than experts and a context beyond the windows of those that have one."""
    folder = checkpoint(family)
    ids = tiny_models.token_ids(2, 12)
    ways = padded(ids, [0, 3])
    with on_device(folder, 8) as model:
        assert generate(model, ids, **ways) == expected(folder, ids, **ways)
        assert side_of(model).cache.total().fetches > 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way: str, folder: Path, model: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(1, 11)
    assert generate(model, ids, **WAYS[way]) == expected(folder, ids, **WAYS[way])
    assert model.offload.device is not None


@pytest.mark.parametrize("way", ["sampling", "beams"])
def test_left_padded_batches(way: str, folder: Path, model: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(3, 9)
    ways = WAYS[way] | padded(ids, [0, 3, 6])
    assert generate(model, ids, **ways) == expected(folder, ids, **ways)


def test_pipeline(folder: Path, model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    texts = []
    for each in (model, on_cpu(folder)):
        run = pipeline("text-generation", model=each, tokenizer=tokenizer)
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        texts.append(run(["def f(", "x ="], generation_config=config))
    assert texts[0] == texts[1]


def test_assisted_by_a_model_on_another_device(folder: Path, model: PreTrainedModel, checkpoint: Checkpoints) -> None:
    ids = tiny_models.token_ids(1, 8)
    with on_device(folder, 4, device="virtual:tiny-t4", policy="lru") as second:
        assert generate(model, ids, assistant_model=second) == expected(folder, ids)
        assert generate(second, ids, assistant_model=on_cpu(folder)) == expected(folder, ids)
        assert generate(model, ids) == expected(folder, ids)


def test_continuous_batching(folder: Path) -> None:
    """With transformers' own attention, which knows its paged cache, in a thread of its own."""
    prompts = [tiny_models.token_ids(1, n, seed=n)[0].tolist() for n in (4, 7, 11)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with on_device(folder, 12) as model:
        with pytest.raises(ValueError, match="is not supported"):
            model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        model.set_attn_implementation("sdpa")
        results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        found = [list(result.generated_tokens) for result in results.values()]
        assert side_of(model).dispatcher.counts.steps > 0
    wanted = [expected(folder, torch.tensor([prompt]), max_new_tokens=6)[0] for prompt in prompts]
    assert found == [tokens[len(prompt) :] for prompt, tokens in zip(prompts, wanted, strict=True)]


def test_threads_at_once(folder: Path, model: PreTrainedModel) -> None:
    ids = [tiny_models.token_ids(1 + n % 2, 9, seed=n) for n in range(3)]
    wanted = [expected(folder, i) for i in ids]
    found: list[list[list[int]]] = [[] for _ in ids]

    def work(n: int) -> None:
        found[n] = generate(model, ids[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_a_prompt_longer_than_the_staging_buffers(folder: Path, model: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(2, 100)
    assert generate(model, ids, max_new_tokens=3) == expected(folder, ids, max_new_tokens=3)


def test_odd_calls_of_an_experts_module(folder: Path, model: PreTrainedModel) -> None:
    """No token, an expert twice in a row, sentinels ("not mine"), rows of weight zero, gradients switched on."""
    layer = model.offload.spec.layers[0]
    ours, theirs = model.get_submodule(layer.path), on_cpu(folder).get_submodule(layer.path)
    hidden = torch.randn(4, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    twice = torch.tensor([[1, 1], [2, 2], [0, 3], [3, 0]])
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    nobody = torch.full_like(twice, layer.num_experts)
    with torch.no_grad():
        assert ours(hidden[:0], twice[:0], weights[:0]).shape == (0, layer.hidden_size)
        torch.testing.assert_close(ours(hidden, twice, weights), theirs(hidden, twice, weights), rtol=1e-5, atol=1e-5)
        assert not ours(hidden, nobody, weights).any()
        sentinel = torch.where(twice == 3, layer.num_experts, twice)
        torch.testing.assert_close(
            ours(hidden, sentinel, weights), theirs(hidden, sentinel, weights), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(RuntimeError, match="inference only"):
        ours(hidden.requires_grad_(), twice, weights).sum().backward()


@pytest.mark.parametrize(("weights", "bound"), [("int8", 1e-4), ("int4", 1e-4)])
def test_packed_experts(weights: str, bound: float, checkpoint: Checkpoints) -> None:
    """Both sides compute with the same packed weights; with f32 activations only the order of sums differs."""
    folder = checkpoint("mixtral", hidden_size=64, intermediate_size=96)
    options: dict[str, Any] = dict(weights=weights, activations="f32", dense="stored")
    ids = tiny_models.token_ids(2, 11)
    with on_device(folder, 4, **options) as model, torch.no_grad():
        reference = on_cpu(folder, **options)
        wanted = reference(ids).logits
        assert (model(ids).logits - wanted).abs().max() < bound * wanted.abs().max()
        assert generate(model, ids) == generate(reference, ids)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bf16_within_its_rounding(family: str, checkpoint: Checkpoints) -> None:
    """As much as the CPU's own answer is away from that of float32 weights."""
    folder = checkpoint(family, torch.bfloat16)
    ids = tiny_models.token_ids(2, 11)
    exact = on_cpu(folder, dtype=torch.float32)
    with on_device(folder, 8, contexts=8) as model, torch.no_grad():
        truth, cpu, found = (each(ids).logits.float() for each in (exact, on_cpu(folder), model))
        assert (found - truth).abs().mean() < 1.5 * (cpu - truth).abs().mean() + 1e-6
        assert (found - cpu).abs().max() < 0.05 * cpu.abs().max()


def test_mxfp4_as_stored(tmp_path: Path) -> None:
    """gpt-oss as published: packed experts with biases; bf16 around them."""
    folder = mxfp4_checkpoint(tmp_path)
    options: dict[str, Any] = dict(activations="f32", dense="stored")
    ids = tiny_models.token_ids(2, 11)
    with on_device(folder, 8, **options) as model, torch.no_grad():
        cpu, found = on_cpu(folder, **options)(ids).logits.float(), model(ids).logits.float()
        assert model.offload.weights == "mxfp4"
        assert (found - cpu).abs().mean() < 0.01 * cpu.abs().mean()
        assert (found - cpu).abs().max() < 0.05 * cpu.abs().max()
