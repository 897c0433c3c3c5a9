"""The tokens behind a KV cache follow what is done to it, and a cache is brought back to where it was, or emptied."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedConfig, StaticCache

from moe_offload.cache_rescue import can_be_emptied, empty, padding_mask, take_back
from moe_offload.host_cache import place_layers
from moe_offload.token_history import TokenHistory, begin_history, history_of
from tests import tiny_models


def states(ids: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, 2]: keys, or values, that are nothing but their token."""
    return ids[:, None, :, None].float().expand(-1, 1, -1, 2).clone()


def push(cache: Any, ids: torch.Tensor, layers: int = 2) -> None:
    """What a forward puts into a cache."""
    for layer in range(layers):
        cache.update(states(ids), states(ids), layer)


def held(cache: Any, layer: int = 0) -> list[list[int]]:
    found = cache.layers[layer].keys[:, 0, :, 0].int()
    return found.tolist()  # type: ignore[no-any-return]


def config(kind: str = "qwen3_moe") -> PreTrainedConfig:
    return tiny_models.make_config(kind, num_hidden_layers=2) if kind == "qwen3_moe" else tiny_models.make_config(kind)


def watched(rows: int) -> tuple[DynamicCache, TokenHistory]:
    cache = DynamicCache(config=config())
    history = begin_history(cache, 0)
    ids = torch.arange(3 * rows).view(rows, 3)
    push(cache, ids)
    history.append(ids, None)
    return cache, history


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("reorder_cache"), st.integers(0, 99)),
        st.tuples(st.just("batch_repeat_interleave"), st.integers(1, 2)),
        st.tuples(st.just("batch_select_indices"), st.integers(0, 99)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), STEPS)
def test_a_history_says_what_is_in_the_cache(rows: int, steps: list[tuple[str, int]]) -> None:
    cache, history = watched(rows)
    token = 100
    for step, number in steps:
        batch, length = cache.layers[0].keys.shape[0], cache.get_seq_length()
        if step == "append":
            ids = torch.arange(token, token + batch * number).view(batch, number)
            token += batch * number
            push(cache, ids)
            history.cut(length)
            history.append(ids, None)
        elif step == "crop" and number < length:
            cache.crop(-number)
            history.cut(length - number)
        elif step == "copy":
            cache = copy.deepcopy(cache)
            assert history_of(cache) is not history
            history = history_of(cache)  # type: ignore[assignment]
        elif step == "batch_repeat_interleave" and batch * number <= 8:
            cache.batch_repeat_interleave(number)
        elif step in ("reorder_cache", "batch_select_indices"):
            chosen = torch.tensor([(number + 3 * row) % batch for row in range(batch)])
            getattr(cache, step)(chosen)
        assert history.ids is not None and history.positions is not None
        assert history.ids.tolist() == held(cache)
        assert history.positions.shape == history.ids.shape


def test_positions_are_kept_as_they_were_given() -> None:
    cache, history = watched(2)
    history.append(torch.tensor([[7], [8]]), torch.tensor([[3], [1]]))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert history.positions is not None and history.ids is not None
    assert history.positions.tolist() == [[0, 1, 2, 1], [0, 1, 2, 1]]
    assert history.ids.tolist() == [[3, 4, 5, 8], [3, 4, 5, 8]]


def test_a_copy_goes_its_own_way() -> None:
    cache, history = watched(2)
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    assert held(cache) == [[0, 1, 2], [3, 4, 5]] == (history.ids.tolist() if history.ids is not None else None)
    assert held(twin) == [[3, 4, 5], [0, 1, 2]]


def test_a_watched_cache_is_freed_with_its_last_user() -> None:
    """Without waiting for the garbage collector: its memory is the device's."""
    gc.disable()
    try:
        cache, history = watched(1)
        reference = weakref.ref(cache)
        del cache, history
        assert reference() is None
    finally:
        gc.enable()


def test_a_cache_that_held_something_before_is_not_known() -> None:
    cache = DynamicCache(config=config())
    push(cache, torch.tensor([[1, 2]]))
    assert not begin_history(cache, 0).complete


# Rescue


@pytest.mark.parametrize("on_host", [[False, False], [True, False], [True, True]])
@pytest.mark.parametrize("reached", [0, 1, 2])
def test_a_forward_that_failed_in_some_layer_is_taken_back(on_host: list[bool], reached: int) -> None:
    cache = DynamicCache(config=config())
    place_layers(cache, on_host)
    push(cache, torch.tensor([[1, 2, 3]]))
    for layer in range(reached):
        cache.update(states(torch.tensor([[9, 9]])), states(torch.tensor([[9, 9]])), layer)
    assert take_back(cache, 3)
    push(cache, torch.tensor([[4]]))
    assert held(cache, 0) == held(cache, 1) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_next", "jamba"])
def test_windows_and_states_cannot_be_taken_back(kind: str) -> None:
    cache = DynamicCache(config=config(kind))
    assert not take_back(cache, 3)
    assert can_be_emptied(cache)


def test_an_emptied_cache_is_as_new() -> None:
    for cache in (DynamicCache(config=config()), StaticCache(config=config(), max_cache_len=8)):
        push(cache, torch.tensor([[1, 2, 3]]))
        kinds = [type(layer) for layer in cache.layers]
        empty(cache, config())
        assert [type(layer) for layer in cache.layers] == kinds
        assert int(cache.get_seq_length()) == 0
        push(cache, torch.tensor([[4, 5]]))
        assert held(cache)[0][:2] == [4, 5]


def test_caches_that_cannot_be_emptied() -> None:
    assert not can_be_emptied(None)
    assert not can_be_emptied(DynamicCache(config=config(), offloading=True))


def test_padding_is_read_from_any_mask() -> None:
    two = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    wanted = two[:, :3].bool().tolist()

    def found(mask: Any) -> Any:
        return padding_mask(mask, 3).bool().tolist()  # type: ignore[union-attr]

    seen = two[:, None, None, :].bool().expand(-1, 1, 2, -1)
    assert found(two) == found(seen) == wanted
    assert found(torch.where(seen, 0.0, -torch.inf)) == wanted
    assert found({"full_attention": seen, "sliding_attention": None}) == wanted
    assert padding_mask(None, 3) is None
    assert padding_mask({"full_attention": None}, 3) is None
    for unknown in ({"sliding_attention": seen}, torch.ones(3), "all"):
        with pytest.raises(ValueError, match="mask"):
            padding_mask(unknown, 3)
