"""Attention over host layers gives what transformers' own gives, for every way to generate."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from moe_offload.attention_layers import NAMES, attention_layers, explain, schedulable_layers
from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels.attention import DecodeAttention
from moe_offload.device_attention import HANDLE, AttentionObserver, attach, detach
from moe_offload.host_cache import HostLayer, place_layers
from tests import tiny_models

TOLERANCE = 2e-5
FAMILIES = (
    "qwen3_moe", "mixtral", "olmoe", "phimoe", "glm4_moe", "gpt_oss", "granitemoe", "qwen3_next", "flint", "laguna",
    "mimo_v2_flash", "granitemoe_swa", "nemotron_h",
)  # fmt: skip


class Observer(AttentionObserver):
    """Writes down every attention, and where it ran."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, int, int, int, int]] = []

    def attended(
        self, layer_idx: int, on_host: bool, batch: int, queries: int, length: int,
        run: Callable[[], torch.Tensor], *, link_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        self.calls.append((layer_idx, on_host, batch, queries, length, link_bytes))
        return run()

    @property
    def on_host(self) -> int:
        return sum(call[1] for call in self.calls)


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    with ThreadTeam(2) as team:
        yield team


def build(model_type: str, **options: Any) -> PreTrainedModel:
    """A model whose norms and sinks are no ones and zeros."""
    model = tiny_models.build(model_type, **options).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(*((0.5, 1.5) if "norm" in name else (-0.3, 0.3)))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return build("qwen3_moe")


@pytest.fixture
def model(plain: PreTrainedModel, team: ThreadTeam) -> PreTrainedModel:
    return attached(plain, team)


def attached(plain: PreTrainedModel, team: ThreadTeam) -> PreTrainedModel:
    model = copy.deepcopy(plain)
    model.observer = Observer()
    attach(model, model.observer, team)
    return model


def host_cache(model: PreTrainedModel) -> Any:
    cache = DynamicCache(config=model.config)
    place_layers(cache, schedulable_layers(model))
    return cache


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any, **ways: Any) -> Any:
    kept: dict[str, Any] = dict(
        max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(ids), past_key_values=cache,
    )  # fmt: skip
    return model.generate(ids, **(kept | ways))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


def check(plain: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> None:
    """Token for token what the plain model gives with a plain cache; logits within rounding."""
    found = generate(model, ids, host_cache(model), **ways)
    expected = generate(plain, ids, DynamicCache(config=plain.config), **ways)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert close(a, b)


def padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, every second sequence left-padded."""
    ids = tiny_models.token_ids(batch, length)
    mask = torch.ones_like(ids)
    mask[1::2, : length // 2] = 0
    return ids.masked_fill(mask == 0, 0), mask


# Architectures


@pytest.mark.parametrize("family", [each for each in FAMILIES if each in tiny_models.known_architectures()])
def test_generation_is_that_of_a_plain_cache(family: str, team: ThreadTeam) -> None:
    plain = build(family)
    model, free = attached(plain, team), sum(schedulable_layers(plain))
    assert free and schedulable_layers(model) == schedulable_layers(plain)
    ids, mask = padded(2, 9)
    check(plain, model, ids, attention_mask=mask)
    assert model.observer.on_host == 9 * free  # each step after the prompt
    assert all(call[3] > 1 or call[1] == schedulable_layers(plain)[call[0]] for call in model.observer.calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_kernel_is_as_exact_as_torch(family: str, dtype: torch.dtype, team: ThreadTeam) -> None:
    model = attached(build(family, dtype=dtype), team)
    attention = model.model.layers[1].self_attn
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 8).to(dtype) for heads, length in ((4, 1), (2, 40), (2, 40)))
    mask = torch.zeros(2, 1, 1, 40)
    mask[1, ..., :7] = -1e30
    layer = HostLayer()
    layer.update(key[:, :, :39], value[:, :, :39])
    held = layer.update(key[:, :, 39:], value[:, :, 39:])
    handle = attention.__dict__[HANDLE]
    found, _ = handle(attention, query, *held, mask.to(dtype), scaling=0.5)
    torchs, _ = handle.former(attention, query, key, value, mask.to(dtype), scaling=0.5)
    exact = copy.deepcopy(attention).double()
    expected, _ = handle.former(exact, query.double(), key.double(), value.double(), mask.double(), scaling=0.5)
    assert model.observer.on_host == 1 and found.dtype == dtype and found.shape == torchs.shape
    assert (found - expected).abs().max() <= 1.5 * (torchs - expected).abs().max() + 1e-6


def test_what_keeps_a_layer_on_the_device_is_told(team: ThreadTeam) -> None:
    expected = {
        "deepseek_v2": "3 on the device: it computes with what its cache returns (MLA, ",
        "deepseek_v3": "3 on the device: it computes with what its cache returns (MLA, ",
        "gpt_oss": "2 on the device: a sliding window",
        "qwen3_next": "2 on the device: no attention with keys and values",
        "gemma4_text": "it computes with what its cache returns (MLA, ",
    }
    for family, reason in expected.items():
        plain = build(family)
        line = explain(attention_layers(plain))
        assert reason in line, family
        if not any(schedulable_layers(plain)):
            attach(plain, Observer(), team)
            assert plain.config._attn_implementation == "sdpa"


def test_qwen3_needs_no_reason() -> None:
    layers = attention_layers(build("qwen3_moe"))
    assert explain(layers) == "KV cache of 3 of 3 layers may be on either side"
    assert [layer.width for layer in layers] == [2 * 2 * 8] * 3


def test_every_architecture_has_an_answer() -> None:
    for family in tiny_models.known_architectures():
        for layer in attention_layers(build(family)):
            assert layer.schedulable == (not layer.obstacle)
            assert layer.width > 0 or not layer.schedulable


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_an_attention_that_the_user_chose_stays(chosen: str, team: ThreadTeam) -> None:
    model = build("qwen3_moe")
    model.config._attn_implementation_internal = chosen
    layers = attach(model, Observer(), team)
    assert f"{chosen!r}, which is not replaced" in explain(layers)
    assert model.config._attn_implementation == chosen and not any(HANDLE in m.__dict__ for m in model.modules())


def test_a_model_that_asks_for_sdpa_by_name_is_left_alone(team: ThreadTeam) -> None:
    if "minimax_m3_vl_text" not in tiny_models.known_architectures():
        pytest.skip("a newer architecture")
    layers = attention_layers(build("minimax_m3_vl_text"))
    assert not any(layer.schedulable for layer in layers)


# Ways to generate


@pytest.mark.parametrize(
    "ways",
    [
        dict(num_beams=3),
        dict(do_sample=True, num_return_sequences=2, temperature=0.7),
        dict(prefill_chunk_size=4),
        dict(max_new_tokens=40),
    ],
    ids=lambda ways: next(iter(ways)),
)
@pytest.mark.parametrize("pad", [False, True])
def test_ways_to_generate(ways: dict[str, Any], pad: bool, plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids, mask = padded(2, 9) if pad else (tiny_models.token_ids(2, 9), torch.ones(2, 9, dtype=torch.long))
    results = []
    for each, cache in ((model, host_cache(model)), (plain, DynamicCache(config=plain.config))):
        torch.manual_seed(5)
        results.append(generate(each, ids, cache, attention_mask=mask, **ways).sequences.tolist())
    assert results[0] == results[1] and model.observer.on_host


def test_prompt_lookup_and_assistants(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(1, 9).repeat(1, 2)
    for ways in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=copy.deepcopy(plain))):
        found = generate(model, ids, host_cache(model), max_new_tokens=20, **ways).sequences
        expected = generate(plain, ids, DynamicCache(config=plain.config), max_new_tokens=20).sequences
        assert found.tolist() == expected.tolist()


def test_many_sequences(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids, mask = padded(80, 6)
    check(plain, model, ids, attention_mask=mask, max_new_tokens=3)


def test_layers_move_while_a_generation_runs(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids, mask = padded(2, 9)
    places = [[True, False, True], [False, False, False], [True, True, True], [False, True, False]]

    def move(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        place_layers(kwargs["past_key_values"], places[len(model.observer.calls) // 3 % 4])

    hook = model.register_forward_pre_hook(move, with_kwargs=True)
    check(plain, model, ids, attention_mask=mask, max_new_tokens=20)
    hook.remove()
    for number, call in enumerate(model.observer.calls[3:], start=3):
        assert call[1] == places[number // 3 % 4][call[0]]


def test_gradients_and_training(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids, grads = tiny_models.token_ids(2, 6), []
    for each, cache in ((model, host_cache(model)), (plain, DynamicCache(config=plain.config))):
        each = copy.deepcopy(each).requires_grad_(True)
        each(ids, past_key_values=cache)
        each(ids[:, :1], past_key_values=cache).logits.sum().backward()
        grads.append(each.model.layers[0].self_attn.k_proj.weight.grad)
    assert grads[1].abs().max() > 0 and close(grads[0], grads[1], 1e-4)


# Masks and arguments


@pytest.mark.parametrize("kind", ["hole", "float"])
def test_other_masks_go_to_the_device(kind: str, plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(2, 9)
    mask: Any = torch.ones(2, 10, dtype=torch.long)
    mask[0, 4] = 0
    if kind == "float":
        mask = torch.randn(2, 1, 1, 10)
    logits = []
    for each, cache in ((model, host_cache(model)), (plain, DynamicCache(config=plain.config))):
        each(ids, past_key_values=cache)
        logits.append(each(ids[:, :1], past_key_values=cache, attention_mask=mask).logits)
    assert close(*logits) and model.observer.on_host == 0


def test_a_mask_is_read_once_a_step_and_anew_when_it_changes(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    ids = tiny_models.token_ids(2, 9)
    caches = host_cache(model), DynamicCache(config=plain.config)
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    for each, cache in zip((model, plain), caches, strict=True):
        each(ids, past_key_values=cache)
    for hidden in (0, 3, 5):
        mask[1, :, :, :hidden] = False  # the same tensor, of the same shape
        logits = []
        for each, cache in zip((model, plain), caches, strict=True):
            logits.append(each(ids[:, :1], past_key_values=cache, attention_mask=mask).logits)
            cache.crop(-1)
        assert close(*logits)
    assert model.observer.on_host == 9


@pytest.mark.parametrize(
    "extra",
    [dict(softcap=20.0), dict(position_bias=torch.ones(1, 4, 1, 7)), dict(dropout=0.5), dict(unknown=torch.ones(1))],
    ids=lambda extra: next(iter(extra)),
)
def test_arguments_that_the_kernel_does_not_know(extra: dict[str, Any], model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    handle = attention.__dict__[HANDLE]
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    assert handle._step(attention, query, key, value, None, dict(scaling=0.3, sliding_window=None)) is not None
    assert handle._step(attention, query, key, value, None, dict(scaling=0.3) | extra) is None


def test_changed_sinks_are_read_again(team: ThreadTeam) -> None:
    plain = build("gpt_oss")
    model = attached(plain, team)
    ids = tiny_models.token_ids(1, 5)
    for value in (0.0, 3.0):
        for each in (plain, model):
            each.model.layers[1].self_attn.sinks.fill_(value)
        check(plain, model, ids, max_new_tokens=4)


# The observer


def test_the_observer_hears_of_every_attention(model: PreTrainedModel) -> None:
    cache = host_cache(model)
    ids = tiny_models.token_ids(2, 5)
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    model(ids[:, :3], past_key_values=cache)
    position, vector = 2 * 2 * 2 * 8 * 4, 2 * 4 * 8 * 4  # bytes of a position's keys and values, of all query heads
    kinds = [call[1:] for call in model.observer.calls if call[0] == 1]
    assert kinds == [
        (False, 2, 5, 5, 5 * position),
        (True, 2, 1, 6, position + 2 * vector),
        (False, 2, 3, 9, 9 * position),
    ]


def test_the_observer_runs_it(plain: PreTrainedModel, team: ThreadTeam) -> None:
    class Zero(AttentionObserver):
        def attended(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.zeros_like(args[5]())

    model = copy.deepcopy(plain)
    attach(model, Zero(), team)
    ids = tiny_models.token_ids(1, 5)
    assert not close(model(ids).logits, plain(ids).logits)


# Coming and going


def test_detaching_leaves_no_trace(plain: PreTrainedModel, team: ThreadTeam) -> None:
    for family, name in (("qwen3_moe", "sdpa"), ("gpt_oss", "eager")):
        model = build(family)
        before = [set(module.__dict__) for module in model.modules()]
        attach(model, Observer(), team)
        attach(model, Observer(), team)
        assert model.config._attn_implementation == NAMES[name]
        detach(model)
        detach(model)
        assert model.config._attn_implementation == name
        assert [set(module.__dict__) for module in model.modules()] == before


def test_the_config_of_an_attached_model_makes_a_model_that_computes(team: ThreadTeam) -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        plain = build(family)
        model = attached(plain, team)
        bare = type(model)(model.config).eval()
        bare.load_state_dict(plain.state_dict())
        ids, mask = padded(2, 9)
        assert close(bare(ids, attention_mask=mask).logits[:, -1], plain(ids, attention_mask=mask).logits[:, -1])


def test_the_name_is_not_saved(model: PreTrainedModel) -> None:
    assert "moe_offload" not in str(model.config.to_dict())


def test_attentions_of_an_eager_model_can_be_asked_for(team: ThreadTeam) -> None:
    plain = build("gpt_oss")
    model = attached(plain, team)
    ids = tiny_models.token_ids(1, 5)
    cache = host_cache(model)
    model(ids, past_key_values=cache)
    found = model(ids[:, :1], past_key_values=cache, output_attentions=True).attentions
    cache = DynamicCache(config=plain.config)
    plain(ids, past_key_values=cache)
    expected = plain(ids[:, :1], past_key_values=cache, output_attentions=True).attentions
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


# Planted bugs


@pytest.mark.parametrize("bug", ["short", "starts", "scale"])
def test_a_planted_bug_is_found(bug: str, plain: PreTrainedModel, model: PreTrainedModel, monkeypatch: Any) -> None:
    original = DecodeAttention.__call__

    def wrong(self: Any, q: Any, keys: Any, values: Any, lengths: Any, out: Any, team: Any, **rest: Any) -> None:
        if bug == "short":
            lengths = lengths - 1
        elif bug == "starts":
            rest["starts"] = None
        else:
            q = q * 0.5
        original(self, q, keys, values, lengths, out, team, **rest)

    monkeypatch.setattr(DecodeAttention, "__call__", wrong)
    ids, mask = padded(2, 9)
    with pytest.raises(AssertionError):
        check(plain, model, ids, attention_mask=mask)
