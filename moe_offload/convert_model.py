"""`moe-offload convert`: a model's experts into a pack on purpose, without loading the rest of the model."""

import json
import time
from pathlib import Path

import torch

from moe_offload import terminal
from moe_offload.conversion import StoredExperts
from moe_offload.loading import read_config
from moe_offload.memory import format_bytes, memory_room
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import OptionError
from moe_offload.models.expert_weights import locate_experts
from moe_offload.models.spec import MoeSpec, build_skeleton
from moe_offload.opening import ModelOptions, showing
from moe_offload.packs import find_pack, make_pack
from moe_offload.progress import Activity
from moe_offload.weight_choice import WeightChoice, choose_weights


def read_experts(folder: Path) -> StoredExperts:
    """Where the experts of the model in `folder` lie. Raises as `load` does for what is wrong with it."""
    config = read_config(folder)
    skeleton = build_skeleton(config)
    spec = MoeSpec.from_hf(config, skeleton)
    checkpoint = Checkpoint.open(folder)
    return StoredExperts(spec, checkpoint, locate_experts(skeleton, checkpoint, spec))


def other_bytes(spec: MoeSpec) -> int:
    """Bytes of what is no expert, in the dtype that the model is loaded in."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return spec.non_expert_params * dtype.itemsize


def convert_model(options: ModelOptions, folder: Path, *, as_json: bool) -> int:
    """Make sure that the pack is there and whole, print where it is. Returns the exit code.

    Raises OptionError when `options` name no format to convert to, PackError when there is no place for the pack.
    """
    experts = read_experts(folder)
    engine_options = options.engine_options()
    room = memory_room(options.memory_limit)
    choice = choose_weights(engine_options.weights, experts, other_bytes(experts.spec), room)
    if choice.packed is None:
        raise OptionError(_nothing_to_do(choice, experts))
    started = time.perf_counter()
    with Activity(f"converting {options.name}", enabled=options.show_progress) as activity:
        cache = find_pack(experts, choice.packed, engine_options, showing(activity))
        was_there = cache.is_there()
        make_pack(cache, experts, trust=False).close()
    seconds = time.perf_counter() - started
    if as_json:
        result = {
            "pack": str(cache.path), "weights": choice.packed, "bytes": cache.plan.size, "was_there": was_there,
            "stored_as": ", ".join(experts.formats), "expert_bytes": experts.nbytes, "seconds": round(seconds, 3),
        }  # fmt: skip
        terminal.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        return 0
    terminal.write(f"{cache.path}\n")
    size, before = format_bytes(cache.plan.size), format_bytes(experts.nbytes)
    if was_there:
        terminal.figures(f"{choice.packed}, {size}, was there already; checked in {seconds:.1f} s")
    else:
        speed = experts.nbytes / seconds / 1e9
        terminal.figures(f"{choice.packed}, {size} from {before}, in {seconds:.1f} s ({speed:.2g} GB/s), checked")
    return 0


def _nothing_to_do(choice: WeightChoice, experts: StoredExperts) -> str:
    why = choice.reason or f"{', '.join(experts.formats)} is how they are stored"
    return f"there is nothing to convert ({why}): give --weights int8 or int4"
