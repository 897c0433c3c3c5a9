"""generate() and its relatives behave as with transformers itself: token for token, in float32, against eager
experts.
"""

import threading
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

import moe_offload
from tests import tiny_models
from tests.cli_model import make_tokenizer
from tests.conftest import Checkpoints

PLAIN = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=None)

WAYS: dict[str, dict[str, object]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9),
    "beams": dict(num_beams=3, do_sample=False),
    "beam sampling": dict(num_beams=2, do_sample=True),
    "static cache": dict(do_sample=False, cache_implementation="static"),
    "no cache": dict(do_sample=False, use_cache=False),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "chunked prefill": dict(do_sample=False, prefill_chunk_size=4),
}


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", vocab_size=262)  # what the byte tokenizer of the pipeline test needs


@pytest.fixture(scope="module")
def ours(folder: Path) -> PreTrainedModel:
    return moe_offload.load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager")


def run(model: PreTrainedModel, ids: torch.Tensor, **ways: object) -> list[list[int]]:
    set_seed(7)
    mask = ways.pop("attention_mask", torch.ones_like(ids))
    extra = {name: ways.pop(name) for name in ("assistant_model", "streamer") if name in ways}
    config = GenerationConfig(**{**PLAIN, **ways})
    return model.generate(ids, attention_mask=mask, generation_config=config, **extra).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens(way: str, ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(1, 11)
    assert run(ours, ids, **WAYS[way]) == run(reference, ids, **WAYS[way])


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "static cache"])
def test_left_padded_batch(way: str, ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(3, 9)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    kept = dict(WAYS[way], attention_mask=mask)
    assert run(ours, ids, **kept) == run(reference, ids, **dict(kept))


def test_assisted_decoding_both_ways(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(1, 8)
    expected = run(reference, ids, do_sample=False)
    assert run(ours, ids, do_sample=False, assistant_model=reference) == expected
    assert run(reference, ids, do_sample=False, assistant_model=ours) == expected


def test_streamer_sees_every_token(ours: PreTrainedModel) -> None:
    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    ids = tiny_models.token_ids(1, 8)
    streamer = Collect()
    assert run(ours, ids, do_sample=False, streamer=streamer) == [streamer.tokens]
    assert streamer.ended


def test_pipeline(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    texts = []
    for model in (ours, reference):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
        found = generate(["def f(", "x ="], generation_config=config)
        texts.append([each["generated_text"] for row in found for each in row])
    assert texts[0] == texts[1]


def test_generate_batch(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Continuous batching runs the model in a thread of its own."""
    prompts = [tiny_models.token_ids(1, n, seed=n)[0].tolist() for n in (4, 7, 11)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)  # by default it takes most of the memory
    results = ours.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    found = [list(result.generated_tokens) for result in results.values()]
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = run(reference, torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0]
        assert tokens == expected[len(prompt) :]


def test_threads_at_once(ours: PreTrainedModel, reference: PreTrainedModel) -> None:
    ids = [tiny_models.token_ids(1, 9, seed=n) for n in range(4)]
    expected = [run(reference, i, do_sample=False) for i in ids]
    found: list[list[list[int]]] = [[] for _ in ids]

    def work(n: int) -> None:
        found[n] = run(ours, ids[n], do_sample=False)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_inference_mode_and_no_grad_agree(ours: PreTrainedModel) -> None:
    ids = tiny_models.token_ids()
    with torch.inference_mode():
        first = ours(ids).logits.clone()
    with torch.no_grad():
        second = ours(ids).logits
    assert torch.equal(first, second)
    assert torch.equal(second, ours(ids).logits.detach())
