"""The packed linears' file. It is no part of the experts' pack, which serves whatever format the linears have."""

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.dense_conversion import StoredLinears, convert_in_memory, convert_linears
from moe_offload.models.errors import PackError
from moe_offload.options import DenseFormat, Options, Progress
from moe_offload.pack_cache import PackCache, pack_path
from moe_offload.packs import pack_folder
from moe_offload.transfer.expert_pack import ExpertPack

logger = logging.getLogger(__name__)


def find_dense_pack(
    stored: StoredLinears, format_: DenseFormat, options: Options, progress: Progress | None = None
) -> PackCache:
    """The place of these linears' pack; nothing is made. Raises CheckpointError when the checkpoint cannot be read."""
    plan = stored.plan(format_)
    path = pack_path(pack_folder(options), stored.spec.model_type, f"dense-{format_}", plan)
    return PackCache(path, plan, options.threads or default_threads(), progress, "linears")


def make_dense_pack(cache: PackCache, stored: StoredLinears, *, trust: bool = True) -> ExpertPack:
    """The pack at `cache`, converted if need be; see `PackCache.open`."""
    return cache.open(lambda writer, report: convert_linears(stored, writer, cache.threads, report), trust=trust)


def open_linears(
    stored: StoredLinears, format_: DenseFormat, options: Options, progress: Progress | None = None
) -> tuple[Iterator[tuple[str, NDArray[np.uint8]]], bool]:
    """(path, packed bytes) of one linear after the other, and whether they were there already.

    Bytes of a pack are mapped as long as an array of them lives. Where there can be no pack, they are in memory.
    """
    cache = find_dense_pack(stored, format_, options, progress)
    was_there = cache.is_there()
    try:
        pack = make_dense_pack(cache, stored)
    except PackError as error:
        logger.warning("linears outside of the experts are converted at every load: %s", error)

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress("converting linears", done, total)

        return convert_in_memory(stored, format_, cache.threads, report), False
    return ((path, pack.record(path, 0)) for path in stored.linears), was_there
