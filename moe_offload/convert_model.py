"""`moe-offload convert`: a model's experts and other linears into packs on purpose, without loading the model."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_offload import terminal
from moe_offload.conversion import StoredExperts
from moe_offload.dense_conversion import StoredLinears
from moe_offload.dense_pack import find_dense_pack, make_dense_pack
from moe_offload.loading import read_config
from moe_offload.memory import format_bytes, memory_room
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import OptionError
from moe_offload.models.expert_weights import locate_experts
from moe_offload.models.spec import MoeSpec, build_skeleton
from moe_offload.opening import ModelOptions, showing
from moe_offload.pack_cache import PackCache
from moe_offload.packs import find_pack, make_pack
from moe_offload.progress import Activity
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.weight_choice import WeightChoice, choose_weights


def read_experts(folder: Path) -> StoredExperts:
    """Where the experts of the model in `folder` lie. Raises as `load` does for what is wrong with it."""
    return read_stored(folder)[0]


def read_stored(folder: Path) -> tuple[StoredExperts, StoredLinears]:
    """Where the experts lie, and the linears outside of them as `load` finds them. Raises as `read_experts`."""
    config = read_config(folder)
    skeleton = build_skeleton(config)
    spec = MoeSpec.from_hf(config, skeleton)
    checkpoint = Checkpoint.open(folder)
    weights = locate_experts(skeleton, checkpoint, spec)
    linears = StoredLinears.find(skeleton, spec, checkpoint, weights.values())
    return StoredExperts(spec, checkpoint, weights), linears


def other_bytes(spec: MoeSpec) -> int:
    """Bytes of what is no expert, in the dtype that the model is loaded in."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return spec.non_expert_params * dtype.itemsize


def convert_model(options: ModelOptions, folder: Path, *, as_json: bool) -> int:
    """Make sure that the packs are there and whole, print where they are. Returns the exit code.

    Raises OptionError when `options` name no format to convert to, PackError when there is no place for a pack.
    """
    experts, linears = read_stored(folder)
    engine_options = options.engine_options()
    room = memory_room(options.memory_limit)
    choice = choose_weights(engine_options.weights, experts, other_bytes(experts.spec), room)
    if choice.packed is None:
        raise OptionError(_nothing_to_do(choice, experts))
    dense = engine_options.dense_format(packed=True)
    second = None
    with Activity(f"converting {options.name}", enabled=options.show_progress) as activity:
        progress = showing(activity)
        cache = find_pack(experts, choice.packed, engine_options, progress)
        first = _made(cache, lambda: make_pack(cache, experts, trust=False), choice.packed, experts.nbytes)
        if linears.linears and (dense == "int8" or dense == "int4"):
            place = find_dense_pack(linears, dense, engine_options, progress)
            second = _made(place, lambda: make_dense_pack(place, linears, trust=False), dense, linears.nbytes)
    if as_json:
        result = {**first.to_dict("expert_bytes"), "stored_as": ", ".join(experts.formats)}
        result["dense"] = None if second is None else second.to_dict("stored_bytes")
        terminal.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        return 0
    terminal.write(f"{first.path}\n")
    terminal.figures(first.figures())
    if second is not None:
        terminal.write(f"{second.path}\n")
        terminal.figures(f"other linears: {second.figures()}")
    return 0


@dataclass(frozen=True, slots=True)
class _Made:
    """A pack that is there now."""

    path: Path
    format: str
    bytes: int
    stored_bytes: int
    was_there: bool
    seconds: float

    def figures(self) -> str:
        """What it cost, in a line."""
        size, before = format_bytes(self.bytes), format_bytes(self.stored_bytes)
        if self.was_there:
            return f"{self.format}, {size}, was there already; checked in {self.seconds:.1f} s"
        speed = self.stored_bytes / self.seconds / 1e9
        return f"{self.format}, {size} from {before}, in {self.seconds:.1f} s ({speed:.2g} GB/s), checked"

    def to_dict(self, stored: str) -> dict[str, Any]:
        """For --json; `stored` names the bytes that it was made from."""
        return {
            "pack": str(self.path), "weights": self.format, "bytes": self.bytes, "was_there": self.was_there,
            stored: self.stored_bytes, "seconds": round(self.seconds, 3),
        }  # fmt: skip


def _made(cache: PackCache, make: Callable[[], ExpertPack], format_: str, stored_bytes: int) -> _Made:
    was_there = cache.is_there()
    started = time.perf_counter()
    make().close()
    return _Made(cache.path, format_, cache.plan.size, stored_bytes, was_there, time.perf_counter() - started)


def _nothing_to_do(choice: WeightChoice, experts: StoredExperts) -> str:
    why = choice.reason or f"{', '.join(experts.formats)} is how they are stored"
    return f"there is nothing to convert ({why}): give --weights int8 or int4"
