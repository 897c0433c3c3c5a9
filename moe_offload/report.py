"""What `moe-offload info` knows: from the configuration and the headers, no weight read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moe_offload.conversion import PackFormat, StoredExperts
from moe_offload.convert_model import other_bytes
from moe_offload.loading import read_config
from moe_offload.memory import Memory, detect_memory, memory_room
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.expert_weights import locate_experts
from moe_offload.models.safetensors_header import DTYPE_BITS
from moe_offload.models.spec import BITS_PER_WEIGHT, MoeSpec, build_skeleton
from moe_offload.options import Options
from moe_offload.packs import find_pack, pack_folder
from moe_offload.weight_choice import WeightChoice, choose_weights

# Formats to compare, widest first. What is not an expert stays in 16 bits in all of them.
FORMATS = ("bf16", "int8", "int4", "mxfp4")

Fit = Literal["fits", "fits, but not with what is free now", "runs from disk", "does not fit"]


@dataclass(frozen=True, slots=True)
class FormatSize:
    """A model with its experts in one weight format, in bytes."""

    format: str
    bits_per_weight: float
    expert_bytes: int
    total_bytes: int
    bytes_per_token: int  # of expert weights, for one token alone
    fit: Fit


@dataclass(frozen=True, slots=True)
class PackFile:
    """The experts converted to one format: the file that is there, or that would be made (`path` None)."""

    format: str
    bytes: int
    path: str | None


@dataclass(frozen=True, slots=True)
class Stored:
    """The checkpoint as it lies on disk."""

    format: str
    files: int
    bytes: int
    expert_bytes: int
    non_expert_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """All that `info` prints."""

    model: str
    folder: Path
    spec: MoeSpec
    stored: Stored | None  # None: only the configuration is here
    formats: tuple[FormatSize, ...]
    packs: tuple[PackFile, ...]
    pack_dir: Path
    automatic: str  # the format that weights="auto" takes now
    reason: str  # why it does
    dense: str  # what dense="auto" takes with it
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        spec = self.spec
        return {
            "model": self.model,
            "folder": str(self.folder),
            "model_type": spec.model_type,
            "architecture": spec.architecture,
            "layers": spec.num_layers,
            "moe_layers": len(spec.layers),
            "hidden_size": spec.hidden_size,
            "experts": spec.layers[0].num_experts,
            "experts_per_token": spec.layers[0].top_k,
            "expert_intermediate_size": spec.layers[0].intermediate_size,
            "vocabulary": spec.vocab_size,
            "max_context": spec.max_context,
            "total_params": spec.total_params,
            "active_params": spec.active_params,
            "expert_params": spec.expert_params,
            "shared_expert_params": spec.shared_expert_params,
            "stored": asdict(self.stored) if self.stored else None,
            "formats": [asdict(each) for each in self.formats],
            "packs": [asdict(each) for each in self.packs],
            "pack_dir": str(self.pack_dir),
            "auto": self.automatic,
            "auto_dense": self.dense,
            "memory_total": self.memory.total,
            "memory_available": self.memory.available,
        }


def make_report(name: str, folder: Path, options: Options) -> Report:
    """Read what is needed of the model `name`, which is in `folder`; `options` say where packs are and how much memory
    there is.

    Raises as `load` does for what is wrong with it.
    """
    config = read_config(folder)
    skeleton = build_skeleton(config)
    spec = MoeSpec.from_hf(config, skeleton)
    checkpoint = _checkpoint(folder)
    stored = None
    packs: tuple[PackFile, ...] = ()
    choice = WeightChoice(None)
    if checkpoint is not None:
        located = locate_experts(skeleton, checkpoint, spec)
        stored_experts = StoredExperts(spec, checkpoint, located)
        choice = choose_weights("auto", stored_experts, other_bytes(spec), memory_room(options.memory_limit))
        packs = _packs(stored_experts, options)
        keys = set().union(*(weights.keys for weights in located.values()))
        records = checkpoint.records
        experts = sum(record.nbytes for key, record in records.items() if key in keys)
        total = sum(record.nbytes for record in records.values())
        stored = Stored(
            ", ".join(sorted({weights.format for weights in located.values()})),
            len({record.path for record in records.values()}), total, experts, total - experts,
        )  # fmt: skip
    memory = detect_memory()
    others = spec.non_expert_params * DTYPE_BITS["BF16"] // 8
    names = list(FORMATS)
    if stored is not None and stored.format in BITS_PER_WEIGHT and stored.format not in names:
        names.insert(0, stored.format)
    formats = tuple(
        FormatSize(
            each, BITS_PER_WEIGHT[each], spec.expert_bytes(each), spec.expert_bytes(each) + others,
            spec.bytes_per_token(each), fit(spec.expert_bytes(each), others, memory),
        )
        for each in names
    )  # fmt: skip
    automatic = choice.packed or (stored.format if stored is not None else "")
    dense = options.dense_format(choice.packed is not None)
    return Report(
        name, folder, spec, stored, formats, packs, pack_folder(options), automatic, choice.reason, dense, memory
    )


def _packs(experts: StoredExperts, options: Options) -> tuple[PackFile, ...]:
    """The packs that can be made of a model's experts."""
    formats: list[PackFormat] = ["int8", "int4"]
    if experts.formats == ("mxfp4",):
        formats.append("mxfp4")
    caches = [(each, find_pack(experts, each, options)) for each in formats]
    return tuple(
        PackFile(each, cache.plan.size, str(cache.path) if cache.is_there() else None) for each, cache in caches
    )


def fit(expert_bytes: int, other_bytes: int, memory: Memory) -> Fit:
    """Whether a model's weights fit in this machine's memory.

    Experts may stay on disk, all else may not.
    """
    if expert_bytes + other_bytes <= memory.available:
        return "fits"
    if expert_bytes + other_bytes <= memory.total:
        return "fits, but not with what is free now"
    return "runs from disk" if other_bytes <= memory.total else "does not fit"


def _checkpoint(folder: Path) -> Checkpoint | None:
    """The model's files; None where only the configuration was downloaded."""
    if not any(folder.glob("*.safetensors")):
        return None
    return Checkpoint.open(folder)
