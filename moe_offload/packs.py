"""Converted experts for a model: which pack, where, and what to do when there cannot be one."""

import logging
from pathlib import Path

from moe_offload.conversion import PackFormat, StoredExperts, convert
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.models.errors import PackError
from moe_offload.options import Options, Progress
from moe_offload.pack_cache import PackCache, default_folder, pack_path
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.weight_choice import WeightChoice

logger = logging.getLogger(__name__)


def pack_folder(options: Options) -> Path:
    """Where packs are looked for and made."""
    return default_folder() if options.pack_dir is None else Path(options.pack_dir).expanduser()


def find_pack(
    experts: StoredExperts, format_: PackFormat, options: Options, progress: Progress | None = None
) -> PackCache:
    """The place of these experts' pack; nothing is made. Raises CheckpointError when the checkpoint cannot be read."""
    plan = experts.plan(format_)
    path = pack_path(pack_folder(options), experts.spec.model_type, format_, plan)
    return PackCache(path, plan, options.threads or default_threads(), progress)


def make_pack(cache: PackCache, experts: StoredExperts, *, trust: bool = True) -> ExpertPack:
    """The pack at `cache`, converted if need be; see `PackCache.open`."""
    return cache.open(lambda writer, report: convert(experts, writer, cache.threads, report), trust=trust)


def open_pack(
    choice: WeightChoice, experts: StoredExperts, options: Options, progress: Progress | None = None
) -> ExpertPack | None:
    """The pack that `choice` asks for; None where the experts are read as stored.

    Raises PackError when it cannot be made although the user named the format; "auto" then stays with what is stored.
    """
    if choice.reason:
        logger.log(logging.WARNING if choice.notable else logging.INFO, "weights: %s", choice.reason)
    if choice.packed is None:
        return None
    cache = find_pack(experts, choice.packed, options, progress)
    try:
        return make_pack(cache, experts)
    except PackError as error:
        if options.weights != "auto":
            raise
        logger.warning("the experts run as they are stored: %s", error)
        return None
