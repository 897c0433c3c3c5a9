"""Models on the virtual device for tests: with a budget for so many expert slots, and checked when they are left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, set_seed

import moe_offload
from moe_offload.attention_layers import schedulable_layers
from moe_offload.device_modules import device_bytes
from moe_offload.device_side import DeviceSide
from moe_offload.layer_tensors import LayerTensors
from moe_offload.transfer.server_profile import PROFILES, ServerProfile
from moe_offload.transfer.virtual import VirtualAccelerator

SLOWER = 1000
_RATES = ("memory_gbs", "flops", "link_gbs", "host_read_gbs", "host_flops", "disk_gbs")


def _slower(profile: ServerProfile) -> ServerProfile:
    rates = {name: getattr(profile, name) / SLOWER for name in _RATES}
    return replace(profile, name=f"tiny-{profile.name}", expert_tables=(), **rates)


# The experts of tiny models are a thousandth of real ones, so the servers are a thousand times slower in all that
# depends on size: otherwise every expert would belong on the CPU, and nothing would happen.
SERVERS = {f"tiny-{name}": _slower(PROFILES[name]) for name in ("gtx1080ti", "t4", "a100")}
PROFILE = "virtual:tiny-gtx1080ti"
PLAIN: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)

CPU_MODELS: dict[Any, PreTrainedModel] = {}
CPU_TOKENS: dict[Any, list[list[int]]] = {}


def on_cpu(folder: Path, **options: Any) -> PreTrainedModel:
    """The same model on the CPU alone: loaded once."""
    key = folder, *sorted(options.items())
    if key not in CPU_MODELS:
        CPU_MODELS[key] = moe_offload.load(folder, device="cpu", **options)
    return CPU_MODELS[key]


def generate(model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> list[list[int]]:
    """Tokens, the prompt's among them; greedily unless `ways` say otherwise."""
    set_seed(7)
    kept = PLAIN | dict(attention_mask=torch.ones_like(ids)) | ways
    found: torch.Tensor = model.generate(ids, **kept)
    return found.tolist()


def expected(folder: Path, ids: torch.Tensor, **ways: Any) -> list[list[int]]:
    """What the CPU alone generates: computed once."""
    key = folder, tuple(map(tuple, ids.tolist())), *((name, str(value)) for name, value in sorted(ways.items()))
    if key not in CPU_TOKENS:
        CPU_TOKENS[key] = generate(on_cpu(folder), ids, **ways)
    return CPU_TOKENS[key]


def padded(ids: torch.Tensor, padding: list[int]) -> dict[str, torch.Tensor]:
    """The attention mask for a batch whose rows begin with so many pads, which are put there."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return dict(attention_mask=mask)


def dense_bytes(folder: Path) -> int:
    """What of the model is on the device before any expert: its other parameters, and the experts' output."""
    model = on_cpu(folder)
    hidden = model.offload.spec.layers[0].hidden_size
    return device_bytes(model) + LayerTensors.device_bytes(1, hidden)


def budget(folder: Path, slots: int, contexts: int = 1) -> int:
    """Device memory for so many expert slots beside the least of KV cache for so many sequences of 256 tokens: layers
    that may be in host memory are.
    """
    model = on_cpu(folder)
    record = model.offload.spec.layers[0].bytes_per_expert("f32") + 256
    sizes = position_bytes(model)
    kept = [size for size, movable in zip(sizes, schedulable_layers(model), strict=True) if not movable]
    return dense_bytes(folder) + int(slots * record * 17 // 16) + contexts * 256 * (sum(kept) + max(sizes))


def position_bytes(model: PreTrainedModel) -> list[int]:
    """What each layer's KV cache takes for one token, as transformers has it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=cache)
    tensors = [[getattr(layer, name, None) for name in ("keys", "values")] for layer in cache.layers]
    return [sum(each.nbytes for each in pair if torch.is_tensor(each)) // 2 for pair in tensors]


@contextmanager
def on_device(
    folder: Path, slots: int | None = None, *, contexts: int = 4, **options: Any
) -> Iterator[PreTrainedModel]:
    """The model on a virtual device with a budget for so many slots (None: the whole card); checked at the end."""
    if slots is not None:
        options["gpu_memory"] = budget(folder, slots, contexts)
    with pytest.MonkeyPatch.context() as patch:
        for name, profile in SERVERS.items():
            patch.setitem(PROFILES, name, profile)
        model = moe_offload.load(folder, **{"device": PROFILE} | options)
    engine, side = model.offload, side_of(model)
    try:
        yield model
        if engine.device is not None:
            check(side)
    finally:
        engine.close()
    assert side.accelerator.used in (0, device_bytes(model))


def side_of(model: PreTrainedModel) -> DeviceSide:
    """The device's side of a model that has one."""
    side = model.offload.device
    assert isinstance(side, DeviceSide)
    return side


def virtual(model: PreTrainedModel) -> VirtualAccelerator:
    """The device itself."""
    accelerator = side_of(model).accelerator
    assert isinstance(accelerator, VirtualAccelerator)
    return accelerator


def check(side: DeviceSide) -> None:
    """Bookkeeping that agrees, and budgets that were kept."""
    side.cache.check_integrity()
    side.store.check_integrity()
    assert len(side.slots) in (side.cache.slots, 0)  # 0: it is closed
    assert side.slots.nbytes <= side.accelerator.used
