"""Decode steps over keys and values on the device by our kernel give what transformers' attention gives.

The kernels run on the CPU, through the shim.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from moe_offload import device_attention
from moe_offload.attention_layers import schedulable_layers
from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.device_attention import HANDLE, PlainObserver, attach
from moe_offload.device_decode_attention import DeviceDecode, Sinks, prefers_kernel
from moe_offload.gpu_kernels.decode_attention import DecodeAttention
from moe_offload.gpu_kernels.launch import Kernel, KernelError, Macros
from moe_offload.host_cache import place_layers
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.device_cases import expected, generate, on_device
from tests.gpu_kernels.host_kernels import HostKernels, needs_compiler
from tests.test_device_attention import build, close, padded
from tests.test_device_attention import generate as generate_logits

pytestmark = needs_compiler
CPU = torch.device("cpu")
PASCAL = (6, 1)
FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "granitemoe", "qwen3_next", "mimo_v2_flash")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    with ThreadTeam(2) as team:
        yield team


def decode(kernels: Any = None, capability: tuple[int, int] = PASCAL) -> DeviceDecode:
    return DeviceDecode(kernels or HostKernels(), CPU, capability, 2)


def attached(plain: PreTrainedModel, team: ThreadTeam, kernel: DeviceDecode) -> PreTrainedModel:
    model = copy.deepcopy(plain)
    attach(model, PlainObserver(), team, kernel)
    return model


def check(plain: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> None:
    """Token for token what the plain model gives; logits within rounding."""
    caches = [ways.pop("cache", None) or DynamicCache(config=model.config), DynamicCache(config=plain.config)]
    found, wanted = (
        generate_logits(each, ids, cache, **ways) for each, cache in zip((model, plain), caches, strict=True)
    )
    assert found.sequences.tolist() == wanted.sequences.tolist()
    assert all(close(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))


# Whose it is


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "value_size", "sinks", "ours"),
    [
        ((6, 1), F16, 128, 128, False, True),
        ((6, 0), BF16, 128, 128, False, True),
        ((7, 5), F16, 64, 64, False, True),
        ((8, 0), F16, 128, 128, False, False),
        ((8, 6), BF16, 256, 256, False, False),
        ((9, 0), BF16, 64, 64, True, True),
        ((9, 0), F32, 128, 128, False, True),
        ((9, 0), BF16, 192, 128, False, True),
        ((6, 1), F16, 512, 512, False, False),
        ((6, 1), F16, 128, 264, False, False),
        ((6, 1), F16, 100, 100, True, False),
        ((6, 1), torch.float64, 128, 128, True, False),
    ],
)
def test_where_torch_has_no_good_kernel(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, value_size: int, sinks: bool, ours: bool
) -> None:
    assert prefers_kernel(capability, dtype, head_size, value_size, sinks=sinks) == ours


def test_without_kernels_or_a_card_torch_does_it() -> None:
    assert DeviceDecode.on(None, torch.device("cuda")) is None
    assert DeviceDecode.on(HostKernels(), CPU) is None


# Whole models


@pytest.mark.parametrize("family", [each for each in FAMILIES if each in tiny_models.known_architectures()])
def test_generation_is_that_of_transformers(family: str, team: ThreadTeam) -> None:
    plain = build(family)
    kernel = decode(HostKernels(order=2))
    ids, mask = padded(2, 9)
    check(plain, attached(plain, team, kernel), ids, attention_mask=mask)
    attentions = sum(HANDLE in module.__dict__ for module in attached(plain, team, kernel).modules())
    assert attentions and kernel.calls == 9 * attentions  # each step after the prompt, windows too


@pytest.mark.parametrize(
    "ways",
    [dict(num_beams=3), dict(max_new_tokens=40), dict(cache_implementation="static")],
    ids=lambda each: [*each][0],
)
def test_ways_to_generate(ways: dict[str, Any], team: ThreadTeam) -> None:
    plain, kernel = build("qwen3_moe"), decode()
    model = attached(plain, team, kernel)
    ids, mask = padded(2, 9)
    kept = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=mask) | ways
    assert model.generate(ids, **kept).tolist() == plain.generate(ids, **kept).tolist()
    assert kernel.calls


def test_layers_on_either_side(team: ThreadTeam) -> None:
    plain, kernel = build("qwen3_moe"), decode()
    model = attached(plain, team, kernel)
    cache = DynamicCache(config=model.config)
    place_layers(cache, [False, True, False])
    ids, mask = padded(2, 9)
    check(plain, model, ids, attention_mask=mask, cache=cache)
    assert schedulable_layers(model) == [True] * 3 and kernel.calls == 9 * 2


def test_the_engine_with_the_kernel(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint on disk, with experts on two devices."""
    folder, kernel = checkpoint("qwen3_moe"), decode()
    ids = tiny_models.token_ids(2, 12)
    wanted = expected(folder, ids)
    monkeypatch.setattr(
        device_attention, "attach", lambda model, observer, team, *_: attach(model, observer, team, kernel)
    )
    with on_device(Path(folder), 8) as model:
        assert generate(model, ids) == wanted
    assert kernel.calls


# Single attentions


def attention(family: str, team: ThreadTeam, kernel: DeviceDecode, dtype: torch.dtype = F32) -> Any:
    """The second layer's, and its handle."""
    model = attached(build(family, dtype=dtype), team, kernel)
    module = model.model.layers[1].self_attn
    return module, module.__dict__[HANDLE]


def draw(length: int = 40, dtype: torch.dtype = F32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, count, 8).to(dtype) for heads, count in ((4, 1), (2, length), (2, length)))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_kernel_is_as_exact_as_torch(family: str, dtype: torch.dtype, team: ThreadTeam) -> None:
    kernel = decode()
    module, handle = attention(family, team, kernel, dtype)
    query, key, value = draw(dtype=dtype)
    mask = torch.zeros(2, 1, 1, 40)
    mask[1, ..., :7] = torch.finfo(dtype).min
    mask[0, ..., 11:13] = torch.finfo(dtype).min  # holes are read like paddings
    found, weights = handle(module, query, key, value, mask.to(dtype), scaling=0.5)
    torchs, _ = handle.former(module, query, key, value, mask.to(dtype), scaling=0.5)
    exact = copy.deepcopy(module).double()
    wanted, _ = handle.former(exact, query.double(), key.double(), value.double(), mask.double(), scaling=0.5)
    assert kernel.calls == 1 and weights is None and found.dtype == dtype and found.shape == torchs.shape
    assert (found - wanted).abs().max() <= 1.5 * (torchs - wanted).abs().max() + 1e-6


@pytest.mark.parametrize(
    "extra",
    [dict(softcap=20.0), dict(position_bias=torch.ones(1, 4, 1, 7)), dict(dropout=0.5), dict(cache=torch.ones(1))],
    ids=lambda extra: next(iter(extra)),
)
def test_arguments_that_the_kernel_does_not_know(extra: dict[str, Any], team: ThreadTeam) -> None:
    kernel = decode()
    module, handle = attention("qwen3_moe", team, kernel)
    assert handle._on_device(module, *draw(), None, dict(scaling=0.3, sliding_window=None)) is not None
    assert handle._on_device(module, *draw(), None, dict(scaling=0.3) | extra) is None and kernel.calls == 1


def test_tensors_that_the_kernel_does_not_take(team: ThreadTeam) -> None:
    kernel = decode()
    module, handle = attention("qwen3_moe", team, kernel)
    query, key, value = draw()
    odd = torch.zeros(key.numel() + 1)[1:].view(key.shape)
    meta = torch.device("meta")
    bad: dict[str, tuple[torch.Tensor, ...]] = {
        "several positions": (query.expand(2, 4, 3, 8), key, value, torch.ones(2, 1, 3, 40, dtype=torch.bool)),
        "another mask for each head": (query, key, value, torch.ones(2, 4, 1, 40, dtype=torch.bool)),
        "a short mask": (query, key, value, torch.ones(2, 1, 1, 39, dtype=torch.bool)),
        "a mask of integers": (query, key, value, torch.ones(2, 1, 1, 40, dtype=torch.int64)),
        "not aligned": (query, odd, value),
        "another type": (query, key.half(), value.half()),
        "heads that do not divide": (query[:, :3], key, value),
        "gradients": (query.clone().requires_grad_(True), key, value),
        "another device": (query.to(meta), key.to(meta), value.to(meta)),
    }
    for name, (q, k, v, *mask) in bad.items():
        assert handle._on_device(module, q, k, v, mask[0] if mask else None, {}) is None, name
    assert kernel.calls == 0
    with torch.no_grad():
        assert handle._on_device(module, *bad["gradients"], None, {}) is not None


def test_a_card_with_flash_attention_keeps_it(team: ThreadTeam) -> None:
    kernel = decode(capability=(8, 0))
    for family, dtype, calls in (("qwen3_moe", BF16, 0), ("gpt_oss", BF16, 1)):
        module, handle = attention(family, team, kernel, dtype)
        handle(module, *draw(dtype=dtype), None, scaling=0.5)
        assert kernel.calls == calls


def test_attentions_can_be_asked_for(team: ThreadTeam) -> None:
    plain, kernel = build("gpt_oss"), decode()
    ids, found = tiny_models.token_ids(1, 5), []
    for model in (attached(plain, team, kernel), plain):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        found.append(model(ids[:, :1], past_key_values=cache, output_attentions=True).attentions)
    assert all(close(a, b) for a, b in zip(*found, strict=True)) and kernel.calls == 0


def test_changed_sinks_are_read_again(team: ThreadTeam) -> None:
    plain = build("gpt_oss")
    model = attached(plain, team, decode())
    for value in (0.0, 3.0):
        for each in (plain, model):
            each.model.layers[1].self_attn.sinks.fill_(value)
        check(plain, model, tiny_models.token_ids(1, 5), max_new_tokens=4)


def test_sinks_are_copied_once() -> None:
    module = torch.nn.Module()
    module.sinks = torch.nn.Parameter(torch.ones(4, dtype=BF16))
    sinks = Sinks()
    first = sinks.of(module)
    assert first is sinks.of(module) and first is not None and first.dtype == F32
    del module.sinks
    module.sinks = None  # type: ignore[assignment]
    assert sinks.of(module) is None


def test_kernels_that_cannot_be_compiled_are_said_once(team: ThreadTeam, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def get(self, source: str, name: str, macros: Macros = ()) -> Kernel:
            raise KernelError("no compiler")

    plain, kernel = build("qwen3_moe"), decode(Broken())
    with caplog.at_level(logging.WARNING):
        check(plain, attached(plain, team, kernel), tiny_models.token_ids(1, 5))
    assert [each.getMessage() for each in caplog.records if "decode attention" in each.getMessage()] == [
        "decode attention on the device is left to torch: no compiler"
    ]
    assert kernel.calls == 0


# Planted bugs


@pytest.mark.parametrize("bug", ["mask", "scale", "length"])
def test_a_planted_bug_is_found(bug: str, team: ThreadTeam, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., torch.Tensor] = DecodeAttention.__call__

    def wrong(self: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **rest: Any) -> torch.Tensor:
        if bug == "mask":
            rest["mask"] = None
        elif bug == "scale":
            query = query * 0.5
        else:
            mask = rest["mask"]
            keys, values, rest["mask"] = keys[:, :, :-1], values[:, :, :-1], mask[:, :-1]
        return original(self, query, keys, values, **rest)

    monkeypatch.setattr(DecodeAttention, "__call__", wrong)
    plain = build("qwen3_moe")
    ids, mask = padded(2, 9)
    with pytest.raises(AssertionError):
        check(plain, attached(plain, team, decode()), ids, attention_mask=mask)
