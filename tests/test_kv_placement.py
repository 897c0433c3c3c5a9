"""KV caches are placed within the budget, slots make room and take it back, and every token stays the same."""

import copy
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moe_offload.attention_layers import attention_layers
from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.device_attention import PlainObserver, attach
from moe_offload.host_cache import HostLayer, host_layers
from moe_offload.kv_placement import KvPlacement
from moe_offload.scheduling.memory_share import ShareDemand
from moe_offload.transfer.accelerator import OutOfDeviceMemoryError
from moe_offload.transfer.server_profile import find_profile
from moe_offload.transfer.virtual import VirtualAccelerator
from tests import tiny_models

POSITION = 2 * 2 * 8 * 4  # bytes of a layer's keys and values, of one sequence
MODEL_BYTES = 1000
SLOT = 4096


class Costs:
    """Attention that is faster on the device."""

    def host(self, layer: int, batch: int, length: int) -> float:
        return 1e-6 * batch * length

    def device(self, layer: int, batch: int, length: int) -> float:
        return 1e-7 * batch * length


class Slots:
    """Expert slots, each an allocation."""

    slot_bytes = SLOT

    def __init__(self, accelerator: VirtualAccelerator, worth: float, most: int = 32) -> None:
        self.accelerator, self.worth, self.most = accelerator, worth, most
        self.buffers: list[Any] = []
        self.sizes: list[int] = []

    @property
    def count(self) -> int:
        return len(self.buffers)

    def seconds(self) -> NDArray[np.float64]:
        return np.array([self.worth * 0.9**n for n in range(self.most)])

    def resize(self, count: int) -> None:
        self.sizes.append(count)
        while self.count > count:
            self.accelerator.free(self.buffers.pop())
        while self.count < count:
            self.buffers.append(self.accelerator.allocate(SLOT, "slot"))


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    with ThreadTeam(2) as team:
        yield team


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_models.build("qwen3_moe").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(plain: PreTrainedModel, team: ThreadTeam) -> PreTrainedModel:
    attached = copy.deepcopy(plain)
    attach(attached, PlainObserver(), team)
    return attached


def make(model: PreTrainedModel, budget: int, worth: float = 1e-6) -> KvPlacement:
    accelerator = VirtualAccelerator(find_profile("gtx1080ti"), budget)
    accelerator.reserve(MODEL_BYTES, "model")
    return KvPlacement(accelerator, attention_layers(model), Costs(), Slots(accelerator, worth), 4)


def tokens(model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> list[list[int]]:
    kept: dict[str, Any] = dict(
        max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )
    generated: torch.Tensor = model.generate(ids, **(kept | ways))
    return generated.tolist()


def kv(layers: int, batch: int, length: int) -> int:
    """Bytes counted with so many layers on the device: one more than there are."""
    return (layers + 1) * batch * length * POSITION


# Budgets


ROUNDS = st.lists(st.tuples(st.integers(1, 2), st.sampled_from([3, 9]), st.booleans()), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 20), st.sampled_from([0.0, 1e-5, 1e-3]), ROUNDS)
def test_any_budget_gives_the_same_tokens_and_is_kept(
    plain: PreTrainedModel, model: PreTrainedModel, size: int, worth: float, rounds: list[tuple[int, int, bool]]
) -> None:
    budget = MODEL_BYTES + kv(0, 2, 512) + 20_000 * size
    placement = make(model, budget, worth)
    hook = model.register_forward_pre_hook(placement.hook, with_kwargs=True)
    try:
        for batch, length, beams in rounds:
            ids = tiny_models.token_ids(batch, length)
            ways = dict(num_beams=2) if beams and batch == 1 else {}
            assert tokens(model, ids, **ways) == tokens(plain, ids, **ways)
    finally:
        hook.remove()
    assert placement.accelerator.peak <= budget
    placement.close()
    assert placement.accelerator.used == MODEL_BYTES + SLOT * placement.slots.count


def test_what_does_not_fit_is_on_the_host_and_slots_have_the_rest(model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + kv(2, 1, 256) + 3 * SLOT)
    cache = DynamicCache(config=model.config)
    placement.before_forward(cache, 1, 9)
    assert host_layers(cache).count(True) == 1 and placement.slots.count == 3
    assert placement.accelerator.used == MODEL_BYTES + kv(2, 1, 256) + 3 * SLOT


def test_slots_that_save_more_push_the_cache_out(model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + kv(2, 1, 256) + 3 * SLOT, worth=1.0)
    cache = DynamicCache(config=model.config)
    placement.before_forward(cache, 1, 9)
    assert host_layers(cache) == [True] * 3 and placement.slots.count == (kv(2, 1, 256) - kv(0, 1, 256)) // SLOT + 3


# A context that grows


def test_a_growing_context_takes_from_the_slots_and_seldom(model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + 120 * SLOT, worth=1e-7)
    cache = DynamicCache(config=model.config)
    resized: list[int] = []
    for length in range(1, 3000):
        placement.before_forward(cache, 1, length)
        placement._measured = True  # as once the cache holds something
        if resized[-1:] != [placement.slots.count]:
            resized.append(placement.slots.count)
        assert placement.accelerator.used <= placement.accelerator.budget
    assert len(resized) < 10 and min(resized) < max(resized) and any(host_layers(cache))


def test_most_steps_ask_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = make(model, MODEL_BYTES + 100 * SLOT)
    hook, asked = model.register_forward_pre_hook(placement.hook, with_kwargs=True), []

    def demand(*args: Any) -> ShareDemand:
        asked.append(args)
        return KvPlacement._demand(placement, *args)

    monkeypatch.setattr(placement, "_demand", demand)
    tokens(model, tiny_models.token_ids(1, 5), max_new_tokens=30)
    hook.remove()
    assert len(asked) == 1


def test_the_sizes_are_those_of_what_the_cache_holds(model: PreTrainedModel) -> None:
    layers = [dataclasses.replace(layer, width=layer.width * 3) for layer in attention_layers(model)]
    accelerator = VirtualAccelerator(find_profile("gtx1080ti"), 100 * SLOT)
    placement = KvPlacement(accelerator, layers, Costs(), Slots(accelerator, 0.0, 0), 4)
    cache = DynamicCache(config=model.config)
    used = []
    for ids in (tiny_models.token_ids(1, 5), tiny_models.token_ids(1, 1)):
        placement.hook(model, (ids,), dict(past_key_values=cache))
        model(ids, past_key_values=cache)
        used.append(accelerator.used)
    assert used[1] == kv(3, 1, 256) and used[0] == 3 * used[1]


def test_a_window_ends_the_growth(team: ThreadTeam) -> None:
    model = tiny_models.build("gpt_oss")
    attach(model, PlainObserver(), team)
    accelerator = VirtualAccelerator(find_profile("gtx1080ti"), 100 * SLOT)
    placement = KvPlacement(accelerator, attention_layers(model), Costs(), Slots(accelerator, 0.0, 0), 4)
    kept = DynamicCache(config=model.config)
    placement.before_forward(kept, 1, 100)
    assert accelerator.used == 2 * 16 * POSITION + kv(1, 1, 256)
    placement.close()
    placement.before_forward(DynamicCache(), 1, 100)  # keeps all positions of all layers
    assert accelerator.used == kv(3, 1, 256)


# Caches that come and go


def test_memory_of_a_dead_cache_is_given_back(model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + kv(3, 1, 256) + kv(0, 1, 256))
    first, second = (DynamicCache(config=model.config) for _ in range(2))
    placement.before_forward(first, 1, 9)
    placement.before_forward(second, 1, 9)
    assert not any(host_layers(first)) and all(host_layers(second))
    del first
    gc.collect()
    placement.before_forward(second, 1, 9)
    placement.reconsider()
    placement.before_forward(second, 1, 9)
    assert not any(host_layers(second))
    assert placement.accelerator.used == MODEL_BYTES + kv(3, 1, 256) + SLOT * placement.slots.count


def test_closing_brings_caches_back(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + kv(0, 1, 256))
    hook = model.register_forward_pre_hook(placement.hook, with_kwargs=True)
    ids, caches = tiny_models.token_ids(1, 5), [DynamicCache(config=model.config) for _ in range(2)]
    for each, cache in zip((model, plain), caches, strict=True):
        each(ids, past_key_values=cache)
    assert all(type(layer) is HostLayer for layer in caches[0].layers)
    hook.remove()
    placement.close()
    placement.close()
    assert not any(host_layers(caches[0])) and placement.accelerator.used == MODEL_BYTES
    logits = [plain(ids[:, :1], past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits)


def test_other_caches_are_left_alone(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + kv(0, 1, 256))
    hook = model.register_forward_pre_hook(placement.hook, with_kwargs=True)
    ids = tiny_models.token_ids(1, 5)
    static = StaticCache(config=model.config, max_cache_len=32)
    assert tokens(model, ids, past_key_values=static) == tokens(plain, ids)
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids).logits)
    hook.remove()
    assert placement.accelerator.used == MODEL_BYTES


def test_an_attention_that_was_renamed_keeps_its_cache(model: PreTrainedModel) -> None:
    placement = make(model, MODEL_BYTES + kv(3, 1, 256), worth=1.0)
    cache = DynamicCache(config=model.config)
    placement.before_forward(cache, 1, 9)
    assert all(host_layers(cache))
    name = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        placement.reconsider()
        placement.before_forward(cache, 1, 9)
        assert not any(host_layers(cache)) and placement.slots.count == 0
    finally:
        model.config._attn_implementation = name


# A device that has less than it says


class Tight(VirtualAccelerator):
    """Refuses what another program has taken."""

    taken = 0

    def reserve(self, nbytes: int, name: str) -> None:
        if nbytes > 0 and self.used + nbytes > self.budget - self.taken:
            raise OutOfDeviceMemoryError(f"{name}: {nbytes} bytes")
        super().reserve(nbytes, name)


@pytest.mark.parametrize("taken, there", [(0, 3), (1, 2), (kv(0, 1, 256) + 1, 1), (2 * kv(0, 1, 256) + 1, 0)])
def test_layers_go_to_the_host_when_memory_is_refused(taken: int, there: int, model: PreTrainedModel) -> None:
    accelerator = Tight(find_profile("gtx1080ti"), kv(3, 1, 256))
    placement = KvPlacement(accelerator, attention_layers(model), Costs(), Slots(accelerator, 0.0), 4)
    cache, accelerator.taken = DynamicCache(config=model.config), taken
    placement.before_forward(cache, 1, 9)
    assert host_layers(cache).count(False) == there and accelerator.used == kv(there, 1, 256)
    assert placement.share is not None and placement.share.kv_on_device.count(True) == there


def test_layers_that_cannot_move_say_what_is_missing(model: PreTrainedModel) -> None:
    layers = [dataclasses.replace(layer, obstacle="a reason") for layer in attention_layers(model)]
    accelerator = VirtualAccelerator(find_profile("gtx1080ti"), 1000)
    placement = KvPlacement(accelerator, layers, Costs(), Slots(accelerator, 1.0), 4)
    with pytest.raises(OutOfDeviceMemoryError, match=f"{kv(3, 1, 256)} bytes asked for"):
        placement.before_forward(DynamicCache(config=model.config), 1, 9)
    assert accelerator.used == 0
