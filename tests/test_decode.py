"""The fused decode step gives what transformers' modules give, token for token, in float32, and really runs."""

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, set_seed

from tests import tiny_models
from tests.decode_cases import (
    FAMILIES,
    Pair,
    check_caches,
    check_generation,
    close,
    counted_runs,
    generate,
    load_pair,
    save,
)

Pairs = Callable[..., Pair]

FORMATS: dict[str, dict[str, Any]] = {
    "stored": dict(),
    "dense int8": dict(dense="int8"),
    "int8": dict(weights="int8", dense="stored"),
    "int8, dense int8": dict(weights="int8", dense="int8"),
    "int4": dict(weights="int4", dense="stored"),
    "int4, dense int8": dict(weights="int4", dense="int8"),
}
# blocks that are a router and experts alone run in the chain as well
WHOLE = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")
LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[object, Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        key = (model_type, dtype, str(overrides))
        if key not in made:
            made[key] = save(model_type, tmp_path_factory.mktemp(model_type), dtype, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def pairs(folders: Callable[..., Path], packs: Path) -> Pairs:
    """pairs(family, format, **config): models that tests may use, but not change."""
    made: dict[object, Pair] = {}

    def make(model_type: str = "qwen3_moe", weights: str = "int8, dense int8", **overrides: Any) -> Pair:
        key = (model_type, weights, str(overrides))
        if key not in made:
            made[key] = load_pair(folders(model_type, **overrides), pack_dir=packs, **FORMATS[weights])
        return made[key]

    return make


@pytest.fixture
def pair(folders: Callable[..., Path], packs: Path) -> Pair:
    """A pair that the test may spoil."""
    return load_pair(folders("qwen3_moe"), pack_dir=packs, weights="int8", dense="stored")


def padded(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose sequences begin at different positions."""
    ids = tiny_models.token_ids(rows, length)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * row % (length - 1)] = 0
    return ids * mask, mask


def prefilled(model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> Any:
    """The cache after a prompt; not fused."""
    with torch.no_grad():
        return model(ids, use_cache=True, **ways).past_key_values


def step(model: PreTrainedModel, cache: Any, token: int = 5, **ways: Any) -> torch.Tensor:
    """The logits [B, V] of one more token for every sequence."""
    rows = len(cache.layers[0].keys)
    with torch.no_grad():
        return model(torch.full((rows, 1), token), past_key_values=cache, **ways).logits[:, -1]  # type: ignore[no-any-return]


def check_step(pair: Pair, found: Any, expected: Any, *, fused: int = LAYERS, **ways: Any) -> None:
    """One step on both models' caches, of which `fused` layers run fused."""
    with counted_runs() as runs:
        ours = step(pair.fused, found, **ways)
        assert len(runs) == fused
        assert close(ours, step(pair.plain, expected, **ways))
    check_caches(found, expected)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_unfused(family: str, weights: str, pairs: Pairs) -> None:
    pair = pairs(family, weights)
    assert check_generation(pair, tiny_models.token_ids(1, 9)) == 7 * LAYERS
    ids, mask = padded(3, 9)
    with counted_runs() as runs:
        assert check_generation(pair, ids, attention_mask=mask) == 7 * LAYERS
    assert all(plan.whole == (family in WHOLE) for plan in runs)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9),
    "beams": dict(num_beams=3),
    "beam sampling": dict(num_beams=2, do_sample=True),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "chunked prefill": dict(prefill_chunk_size=4),
    "several answers": dict(do_sample=True, num_return_sequences=3),
}


@pytest.mark.parametrize("weights", ["stored", "int8, dense int8"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(way: str, weights: str, pairs: Pairs) -> None:
    pair = pairs(weights=weights)
    rows = 1 if way == "prompt lookup" else 2
    found = []
    for model in (pair.fused, pair.plain):
        set_seed(7)
        with counted_runs() as runs:
            result = generate(model, tiny_models.token_ids(rows, 9), output_logits=False, **WAYS[way])
        found.append(result.sequences.tolist())
        assert bool(runs) == (model is pair.fused)
    assert found[0] == found[1]


def test_assisted_decoding_both_ways(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ids = pairs(), tiny_models.token_ids(1, 9)
    for model in pair:  # else an assistant of random weights gives up after one token
        monkeypatch.setattr(model.generation_config, "assistant_confidence_threshold", 0.0)
    expected = generate(pair.plain, ids, max_new_tokens=16).sequences.tolist()
    with counted_runs() as runs:
        # the assistant's single tokens are fused, and its cache is cropped after each round
        assert generate(pair.plain, ids, max_new_tokens=16, assistant_model=pair.fused).sequences.tolist() == expected
        assert len(runs) >= 4 * LAYERS
    other = pairs(weights="int4, dense int8")
    for main, assistant in ((pair.fused, other.fused), (pair.fused, other.plain)):
        assert generate(main, ids, max_new_tokens=16, assistant_model=assistant).sequences.tolist() == expected


def test_going_on_with_a_returned_cache(pairs: Pairs) -> None:
    """A prefill in between goes through transformers' modules, on a cache that fused steps have grown."""
    pair, results = pairs(), []
    for model in (pair.fused, pair.plain):
        first = generate(model, tiny_models.token_ids(1, 9))
        longer = torch.cat([first.sequences, tiny_models.token_ids(1, 5, seed=3)], dim=1)
        with counted_runs() as runs:
            results.append(generate(model, longer, past_key_values=first.past_key_values))
        assert len(runs) == (7 * LAYERS if model is pair.fused else 0)
    assert results[0].sequences.tolist() == results[1].sequences.tolist()
    check_caches(results[0].past_key_values, results[1].past_key_values)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_cache_grows_past_its_buffers(family: str, pairs: Pairs) -> None:
    """The first buffer holds 256 positions; one of 250 gets 384."""
    ids = tiny_models.token_ids(1, 250)
    assert check_generation(pairs(family), ids, max_new_tokens=142) == 141 * LAYERS


def halve_keys(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys.mul_(0.5)


def test_caches_changed_between_steps(pairs: Pairs) -> None:
    pair, ids = pairs(), tiny_models.token_ids(3, 9)
    caches = [prefilled(model, ids) for model in pair]
    check_step(pair, *caches)
    changes: list[Callable[[Any], None]] = [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda cache: cache.batch_repeat_interleave(2),
        halve_keys,
    ]
    for change in changes:
        for cache in caches:
            change(cache)
        check_step(pair, *caches)
        check_step(pair, *caches)


def test_a_cropped_cache_leaves_views_alone(pairs: Pairs) -> None:
    """transformers' cache never writes into a tensor that it gave away."""
    pair = pairs()
    cache = prefilled(pair.fused, tiny_models.token_ids(1, 9))
    for _ in range(2):
        step(pair.fused, cache)
    kept = [layer.keys for layer in cache.layers]
    before = [keys.clone() for keys in kept]
    cache.crop(-2)
    step(pair.fused, cache, token=17)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_copied_caches_go_their_own_ways(pairs: Pairs) -> None:
    import copy

    pair = pairs()
    results = []
    for model in pair:
        cache = prefilled(model, tiny_models.token_ids(1, 9))
        step(model, cache)
        deep, shallow = copy.deepcopy(cache), DynamicCache()
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        logits = [step(model, each, token) for each, token in ((cache, 3), (deep, 4), (shallow, 5))]
        logits += [step(model, each, 6) for each in (cache, deep, shallow)]
        results.append((logits, (cache, deep, shallow)))
    for a, b in zip(*(logits for logits, _ in results), strict=True):
        assert close(a, b)
    for found, expected in zip(*(caches for _, caches in results), strict=True):
        check_caches(found, expected)


def test_a_cache_is_freed_with_its_last_user(pairs: Pairs) -> None:
    import gc
    import weakref

    pair = pairs()
    cache = prefilled(pair.fused, tiny_models.token_ids(1, 9))
    step(pair.fused, cache)
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


def test_two_threads_at_once(pairs: Pairs) -> None:
    pair = pairs()
    ids = [tiny_models.token_ids(rows, 9, seed=n) for n, rows in enumerate((1, 1, 2, 2))]
    expected = [generate(pair.plain, each, max_new_tokens=24).sequences.tolist() for each in ids]
    found: list[Any] = [None] * len(ids)

    def work(n: int) -> None:
        found[n] = generate(pair.fused, ids[n], max_new_tokens=24).sequences.tolist()

    with counted_runs() as runs:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(ids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected
    assert len(runs) == len(ids) * 23 * LAYERS


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_attention_implementations(family: str, attention: str, folders: Callable[..., Path], packs: Path) -> None:
    if (family, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("transformers has no sdpa for gpt-oss")
    pair = load_pair(folders(family), pack_dir=packs, weights="int8", attn_implementation=attention)
    ids, mask = padded(3, 9)
    assert check_generation(pair, ids, attention_mask=mask) == 7 * LAYERS


LENGTH = 10  # with the new token


@pytest.mark.parametrize(
    ("hidden", "value", "fused"),
    [
        ((), 0.0, LAYERS),
        ((0, 1, 2), torch.finfo(torch.float32).min, LAYERS),
        ((0, 1, 2), float("-inf"), LAYERS),
        ((0, 1, 2), -1e9, LAYERS),
        ((0, 1, 2), -1.5, 0),  # a bias, no padding
        ((1, 4), torch.finfo(torch.float32).min, 0),
        ((8, 9), torch.finfo(torch.float32).min, 0),  # the new token does not see itself
    ],
)
def test_four_dimensional_float_masks(hidden: tuple[int, ...], value: float, fused: int, pairs: Pairs) -> None:
    pair, ids = pairs(), tiny_models.token_ids(2, LENGTH - 1)
    mask = torch.zeros(2, 1, 1, LENGTH)
    mask[:, :, :, list(hidden)] = value
    check_step(pair, *(prefilled(model, ids) for model in pair), fused=fused, attention_mask=mask)


def test_a_boolean_mask_with_holes(pairs: Pairs) -> None:
    pair, ids = pairs(), tiny_models.token_ids(2, LENGTH - 1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 4] = 0
    ways = dict(attention_mask=mask)
    caches = [prefilled(model, ids, attention_mask=mask[:, :-1]) for model in pair]
    check_step(pair, *caches, fused=0, **ways)


def test_more_sequences_than_are_fused(pairs: Pairs) -> None:
    from moe_offload.decode_layer import MOST_SEQUENCES

    pair = pairs()
    for rows, fused in ((MOST_SEQUENCES, LAYERS), (MOST_SEQUENCES + 1, 0)):
        ids = tiny_models.token_ids(rows, 4)
        check_step(pair, *(prefilled(model, ids) for model in pair), fused=fused)


def test_statistics_count_fused_steps(pairs: Pairs) -> None:
    pair, ids = pairs(), tiny_models.token_ids(3, 9)
    caches = [prefilled(model, ids) for model in pair]
    counts = []
    for model, cache in zip(pair, caches, strict=True):
        before = model.offload.statistics.snapshot()
        step(model, cache)
        after = model.offload.statistics.snapshot()
        counts.append([getattr(after, name) - getattr(before, name) for name in ("rows", "experts_run", "bytes_read")])
    assert counts[0] == counts[1] and counts[0][0] == 3 * 2 * LAYERS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the name of an x86-64 CPU")
def test_held_to_an_older_cpu(folders: Callable[..., Path], packs: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests import tiny_models; from tests.decode_cases import *\n"
        "torch.set_num_threads(1)\n"
        "pair = load_pair(Path(sys.argv[1]), pack_dir=sys.argv[2], weights='int8', dense='stored')\n"
        "print(check_generation(pair, tiny_models.token_ids(2, 9)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders("qwen3_moe")), str(packs)], cwd=Path(__file__).parents[1],
        env={**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.split()[-1:] == [str(7 * LAYERS)], done.stderr
