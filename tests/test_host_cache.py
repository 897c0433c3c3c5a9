"""KV cache layers in host memory hold what transformers' own layers would."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moe_offload.host_cache import HostLayer, host_layers, origin_of, place_layers
from tests import tiny_models

HEADS, SIZE = 2, 4
LAYERS = 2


def states(batch: int, new: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, HEADS, new, SIZE, generator=random).to(dtype) for _ in range(2))
    return keys, values


def same(a: Any, b: Any) -> None:
    """Two caches' layers hold the same."""
    for left, right in zip(a.layers, b.layers, strict=True):
        assert left.get_seq_length() == right.get_seq_length()
        assert left.is_initialized == right.is_initialized
        if left.get_seq_length():
            assert left.keys.dtype == right.keys.dtype
            assert torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)


def extend(cache: Any, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    returned: tuple[torch.Tensor, torch.Tensor] = cache.update(keys.clone(), values.clone(), layer)
    return returned


# Every operation of a cache, in any order, between any moves

OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 4)),
    st.tuples(st.just("update"), st.just(300)),  # beyond the buffer
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("select"), st.integers(0, 5)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("place"), st.integers(0, 3)),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(OPERATIONS, max_size=12))
def test_a_host_cache_does_what_a_plain_one_does(operations: list[tuple[str, int]]) -> None:
    olds: list[Any] = []
    found, plain, batch = DynamicCache(), DynamicCache(), 2
    place_layers(found, [True] * LAYERS)
    for number, (name, value) in enumerate([("update", 3), *operations]):
        length = plain.get_seq_length()
        for cache in (found, plain):
            if name == "update":
                for layer in range(LAYERS):
                    keys, values = states(batch, value, number * LAYERS + layer)
                    returned = extend(cache, layer, keys, values)
                    held = cache.layers[layer]
                    assert torch.equal(returned[0], held.keys) and torch.equal(returned[1], held.values)
            elif name == "crop" and length > value:
                cache.crop(-value)
            elif name == "reorder":
                cache.reorder_cache(torch.tensor([(value + i) % batch for i in range(batch)]))
            elif name == "repeat" and batch * value <= 8:
                cache.batch_repeat_interleave(value)
            elif name == "select":
                cache.batch_select_indices(torch.tensor([value % batch, batch - 1]))
            elif name == "reset":
                cache.reset()
        if length and name in ("repeat", "select"):
            batch = plain.layers[0].keys.shape[0]
        if name == "reset":
            batch = 2
            if plain.get_seq_length():  # transformers 5.14 zeroes in place, copies included
                batch = plain.layers[0].keys.shape[0]
            olds.clear()
        if name == "copy":
            olds.append((found, copy.deepcopy(plain)))
            found = copy.copy(found) if number % 2 else copy.deepcopy(found)
            found.layers = [copy.copy(layer) for layer in found.layers]
        if name == "place":
            place_layers(found, [bool(value & 1), bool(value & 2)])
            assert host_layers(found) == [bool(value & 1), bool(value & 2)]
        same(found, plain)
        for old, expected in olds:  # what a copy does is no matter of the original's
            same(old, expected)


# What attention is handed


def test_one_position_is_attended_to_on_the_host_and_several_on_the_device() -> None:
    layer = HostLayer()
    prompt, step, guess = states(1, 5, 0), states(1, 1, 1), states(1, 3, 2)
    position = 2 * HEADS * SIZE * 4  # bytes
    keys, _ = layer.update(*prompt)
    assert keys is prompt[0] and origin_of(keys) == (False, 5 * position)
    keys, _ = layer.update(*step)
    assert keys is layer.keys and origin_of(keys) == (True, position)
    keys, values = layer.update(*guess)
    assert origin_of(keys) == (False, (6 + 3) * position)
    assert keys.data_ptr() != layer.keys.data_ptr() and torch.equal(values, layer.values)


def test_a_step_copies_its_own_position_only() -> None:
    layer = HostLayer()
    layer.update(*states(2, 5, 0))
    buffer, address = layer.keys, layer.keys.data_ptr()
    for number in range(200):
        layer.update(*states(2, 1, number))
        assert layer.keys.data_ptr() == address
    assert torch.equal(layer.keys[:, :, :5], buffer)


def test_what_an_earlier_step_returned_stays() -> None:
    layer = HostLayer()
    layer.update(*states(1, 4, 0))
    keys, values = layer.update(*states(1, 1, 1))
    before = keys.clone(), values.clone()
    layer.crop(-2)
    layer.update(*states(1, 2, 2))
    layer.reorder_cache(torch.tensor([0]))
    layer.update(*states(1, 1, 3))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_gradients_flow_through_a_host_layer() -> None:
    results = []
    for layer in (HostLayer(), DynamicLayer()):
        prompt = [each.requires_grad_() for each in states(1, 3, 0)]
        layer.update(*prompt)
        keys, values = layer.update(*states(1, 1, 1))
        (keys * values).sum().backward()
        results.append([each.grad for each in prompt])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_types_are_promoted_as_in_a_plain_layer() -> None:
    found, plain = HostLayer(), DynamicLayer()
    for layer in (found, plain):
        layer.update(*states(1, 3, 0, torch.bfloat16))
        layer.update(*states(1, 1, 1, torch.float32))
    assert found.keys.dtype == plain.keys.dtype == torch.float32 and torch.equal(found.keys, plain.keys)


def test_another_batch_is_refused_as_in_a_plain_layer() -> None:
    for layer in (HostLayer(), DynamicLayer()):
        layer.update(*states(2, 3, 0))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*states(1, 1, 1))


def test_a_cache_made_in_inference_mode_can_be_used_outside_of_it() -> None:
    layer = HostLayer()
    with torch.inference_mode():
        layer.update(*states(1, 3, 0))
        layer.update(*states(1, 1, 1))
    layer.update(*states(1, 1, 2))
    assert layer.get_seq_length() == 5


# Moving


def test_only_plain_layers_move() -> None:
    config = tiny_models.make_config("gpt_oss")
    cache = DynamicCache(config=config)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, DynamicLayer, DynamicSlidingWindowLayer]
    place_layers(cache, [True] * 3)
    assert host_layers(cache) == [False, True, False]
    place_layers(cache, [False] * 3)
    assert [type(layer) for layer in cache.layers] == kinds


def test_other_caches_stay_as_they_are() -> None:
    config = tiny_models.make_config("qwen3_moe")
    static = StaticCache(config=config, max_cache_len=8)
    offloaded = DynamicCache(config=config)
    offloaded.offloading = True
    for cache in (static, offloaded):
        kinds = [type(layer) for layer in cache.layers]
        assert place_layers(cache, [True] * 3) == 0 and [type(layer) for layer in cache.layers] == kinds


def test_moved_bytes_are_counted_once() -> None:
    cache = DynamicCache()
    for layer in range(LAYERS):
        extend(cache, layer, *states(2, 5, layer))
    one = 2 * 2 * 5 * HEADS * SIZE * 4
    assert place_layers(cache, [True, False]) == one
    assert place_layers(cache, [True, False]) == 0
    assert place_layers(cache, [False, True]) == 2 * one


@pytest.mark.parametrize("change", [lambda c: c.crop(-1), lambda c: c.reorder_cache(torch.tensor([1, 0]))])
def test_moving_takes_what_the_layer_holds_now(change: Callable[[Any], None]) -> None:
    found, plain = DynamicCache(), DynamicCache()
    for cache in (found, plain):
        extend(cache, 0, *states(2, 5, 0))
        place_layers(found, [True])
        extend(cache, 0, *states(2, 1, 1))
        change(cache)
    for place in (False, True, True, False):
        place_layers(found, [place])
        for cache in (found, plain):
            extend(cache, 0, *states(2, 1, 2))
        same(found, plain)
