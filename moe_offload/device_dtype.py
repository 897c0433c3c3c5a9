"""Which number format a model's own modules get on its device: attention, norms, routers, embeddings, output head.

Cards before Ampere (compute capability 8.0) have no bfloat16 arithmetic: torch's products in it are slow on Volta and
Turing and partly missing on Pascal. So a checkpoint in bfloat16 is loaded in float16 for them, unless the user names a
format, and after a look at every weight (`models/range_check.py`): where one does not fit, in float32. On Pascal, too,
though its float16 arithmetic is as good as none (6.1): there cuBLAS reads float16 and computes in float32, and float32
weights would take twice the memory. Experts stay as they are stored: their kernels convert bits themselves.

What is checked are weights. Whether hidden states stay within float16's 65504 nobody knows beforehand: a model whose
answers are not numbers wants dtype="float32".
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from moe_offload.device_modules import device_bytes
from moe_offload.models.checkpoint import TORCH_DTYPES, Checkpoint
from moe_offload.models.expert_weights import locate_experts
from moe_offload.models.range_check import LARGEST, RangeFacts, check_range, loaded_floats
from moe_offload.models.spec import MoeSpec, build_skeleton
from moe_offload.options import Options, Progress
from moe_offload.transfer import find_device
from moe_offload.transfer.accelerator import DeviceError
from moe_offload.transfer.find_device import Card

AMPERE = (8, 0)  # the first with bfloat16 arithmetic
NOTABLE_SHARE = 1e-3  # of weights that become zero


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """`dtype` for transformers; `note`: what to say of it once the device is in use, empty for nothing. `converted`:
    whether it is another than what was asked for, for the device's sake.
    """

    dtype: Any
    note: str = ""
    converted: bool = False


def converts(card: Card, stored: torch.dtype, requested: Any) -> bool:
    """Whether a checkpoint in `stored` needs another format for `card`. requested: as in `from_pretrained`."""
    return card.capability < AMPERE and stored == torch.bfloat16 and _named(requested) is None


def choose_dtype(card: Card, stored: torch.dtype, requested: Any, facts: RangeFacts | None = None) -> DtypeChoice:
    """The format for `card`, and what to say of it. facts: of the weights, where `converts`."""
    lacks = f"{card.name} (compute capability {'.'.join(map(str, card.capability))}) has no bfloat16 arithmetic"
    if not converts(card, stored, requested):
        costs = card.capability < AMPERE and _named(requested) == torch.bfloat16
        said = f"{lacks}, and dtype asks for it: products are slow or missing; dtype auto (--dtype auto) takes float16"
        return DtypeChoice(requested, said if costs else "")
    if facts is None:
        raise ValueError("a conversion needs the weights' range")
    if facts.misfit is not None:
        said = (
            f"{lacks}, and float16 ends at {LARGEST}, but {facts.misfit} has {facts.largest:.6g}: everything but the "
            "experts is loaded in float32, twice as large"
        )
        return DtypeChoice(torch.float32, said, True)
    said = f"{lacks}: everything but the experts is loaded in float16, which has the range for its weights"
    if facts.vanishing > NOTABLE_SHARE * facts.values:
        share = 100 * facts.vanishing / facts.values
        said += f", but {share:.2g} % of them are so small that they become zero (--dtype f32 keeps them)"
    return DtypeChoice(torch.float16, said, True)


def dtype_for_device(
    checkpoint: Checkpoint, config: PreTrainedConfig, options: Options, requested: Any, progress: Progress | None = None
) -> DtypeChoice:
    """The format for the card that the options name; what was asked for where there is none or a simulated one, and
    where the card has no room for the model anyway.

    Raises UnsupportedModelError and CheckpointError where loading would.
    """
    card = find_card(options.device)
    if card is None:
        return DtypeChoice(requested)
    stored = stored_dtype(config, checkpoint)
    if not converts(card, stored, requested):
        return choose_dtype(card, stored, requested)
    config = deepcopy(config)
    config.dtype = torch.float16
    model = build_skeleton(config)
    if device_bytes(model) > min(card.memory_bytes, options.gpu_memory or card.memory_bytes):
        return DtypeChoice(requested)
    weights = locate_experts(model, checkpoint, MoeSpec.from_hf(config, model))
    experts = set().union(*(each.keys for each in weights.values()))
    report = None if progress is None else partial(progress, "checking the range of weights")
    return choose_dtype(
        card, stored, requested, check_range(checkpoint, loaded_floats(model, checkpoint, experts), report)
    )


def find_card(request: str) -> Card | None:
    """The real card that a device's name means; None where it means none, or one that cannot be used."""
    choice = find_device.parse_device(request)
    if choice.kind in ("cpu", "virtual"):
        return None
    facts = find_device.detect_cuda()
    try:
        choice = find_device.resolve_device(choice, facts)
    except DeviceError:  # who opens it says so
        return None
    return facts.cards[choice.index] if choice.kind == "cuda" else None


def stored_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What transformers takes for dtype="auto": what the configuration says, else the first tensor of numbers."""
    said = _named(getattr(config, "dtype", None))
    if said is not None:
        return said
    found = (TORCH_DTYPES.get(record.dtype) for record in checkpoint.records.values())
    return next((each for each in found if each is not None and each.is_floating_point), torch.float32)


def _named(dtype: Any) -> torch.dtype | None:
    """A format that is named; None for "auto", and for what transformers refuses."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return found if isinstance(found, torch.dtype) else None
