"""Whether products with many tokens may go through AMX's tiles: the CPU, the system's permission, and a check.

Tiles take 8 KB more of every thread's saved state, so Linux gives them to a process that asks, once for all threads;
without it the first tile instruction is fatal. Nothing is ever probed by executing it: the CPU's part is read from the
features that Numba compiles for. We have no such CPU, so before the first use of a format a small product is computed
both ways; unless every bit agrees, tiles stay off.
"""

import ctypes
import logging
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.activation_rows import LARGEST, Arithmetic, row_bytes
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.packed_layout import WIDTH, ZERO_POINT, PackedMatrix
from moe_offload.cpu_kernels.panel import make_panel
from moe_offload.cpu_kernels.target import Target, current_target
from moe_offload.cpu_kernels.tile_panel import PANEL_TOKENS, make_collect, make_tile_panel, panel_bytes, tile_shapes
from moe_offload.cpu_kernels.tiles import TileMode, make_configure, make_release

logger = logging.getLogger(__name__)

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18


@cache
def permission() -> bool:
    """Ask the system for tiles, for every thread of this process. A kernel that knows nothing of them refuses."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None).syscall
    system_call.restype = ctypes.c_long
    numbers = (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)
    granted: bool = system_call(*(ctypes.c_long(number) for number in numbers)) == 0
    logger.debug("permission to use AMX tiles: %s", "granted" if granted else "refused")
    return granted


def tile_mode(dtype: str, group: int, arithmetic: Arithmetic) -> TileMode | None:
    """How products of these weights with many tokens use tiles in this process; None: not at all."""
    if arithmetic != "planes" or not current_target().tiles or not permission():
        return None
    return "hardware" if _sound(dtype, group) else None


@cache
def _sound(dtype: str, group: int) -> bool:
    layout = PackedMatrix(WIDTH, 3 * group, dtype, group)  # type: ignore[arg-type]
    sound = all(tiles_agree(layout, planes, PANEL_TOKENS - 3, "hardware") for planes in (1, 2))
    if not sound:
        logger.warning("AMX products of %s weights in groups of %d differ; they go without AMX", dtype, group)
    return sound


def tiles_agree(layout: PackedMatrix, planes: int, tokens: int, mode: TileMode) -> bool:
    """Whether a random block of `layout` times tokens <= 32 tokens has the same bits by tiles and by vectors."""
    by_tiles, by_vectors = compare(layout, planes, tokens, mode)
    return by_tiles.tobytes() == by_vectors.tobytes()


def compare(
    layout: PackedMatrix, planes: int, tokens: int, mode: TileMode, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The products [tokens, 32] of a random block of `layout`, by tiles and by vectors. Compiles a kernel."""
    rng = np.random.default_rng(seed)
    weights, rows = _random_block(rng, layout), _random_rows(rng, layout, tokens)
    addresses = rows.ctypes.data + np.arange(tokens) * rows.shape[1]
    panel = np.empty(panel_bytes(layout.padded_cols, layout.group, planes), np.uint8)
    results = np.full((2, tokens, WIDTH), np.nan, np.float32)
    _comparison(layout.dtype, layout.group, planes, mode).ctypes(
        weights.ctypes.data, layout.records, addresses.ctypes.data, tokens, layout.padded_cols,
        panel.ctypes.data, results[0].ctypes.data, results[1].ctypes.data,
    )  # fmt: skip
    return results[0], results[1]


@cache
def _comparison(dtype: str, group: int, planes: int, mode: TileMode) -> Any:
    layout = PackedMatrix(WIDTH, group, dtype, group)  # type: ignore[arg-type]
    key = f"tiles-{mode}-{dtype}-{group}x{planes}"
    function = make_comparison(layout, planes, mode, current_target())
    return compile_job(function, f"void({','.join(['int64'] * 8)})", key)


def make_comparison(layout: PackedMatrix, planes: int, mode: TileMode, target: Target) -> Callable[..., None]:
    """A function (weights, records, rows, tokens, padded, panel, by_tiles, by_vectors) to be compiled.

    weights: address of a block; rows: of the addresses of tokens <= 32 rows; panel: of memory for them. The other two
    get f32 [tokens, 32].
    """
    configure, release = make_configure(mode, tile_shapes(layout.group)), make_release(mode)
    collect, tile_panel = make_collect(layout.group, planes), make_tile_panel(layout, planes, mode)
    vectors = make_panel(layout, "planes", 1, planes, target)
    step = 4 * WIDTH

    def comparison(
        weights: int, records: int, rows: int, tokens: int, padded: int, panel: int, by_tiles: int, by_vectors: int
    ) -> None:
        configure()
        collect(rows, tokens, padded, panel)
        tile_panel(weights, records, panel, tokens, padded, by_tiles, step)
        release()
        for t in range(tokens):
            vectors(weights, records, rows + 8 * t, padded, by_vectors + step * t, step)

    return comparison


def _random_block(rng: np.random.Generator, layout: PackedMatrix) -> NDArray[np.uint8]:
    """One block, every byte of it at random but for scales of ordinary size."""
    block: NDArray[np.uint8] = rng.integers(0, 256, (layout.records, layout.record_bytes)).astype(np.uint8)
    count = layout.groups_per_record * WIDTH
    if layout.dtype == "mxfp4":
        block[:, layout.scales_at :] = rng.integers(110, 130, (layout.records, count))
    else:
        scales = rng.standard_normal((layout.records, count)).astype(np.float16)
        block[:, layout.scales_at :] = scales.view(np.uint8)
    return block


def _random_rows(rng: np.random.Generator, layout: PackedMatrix, tokens: int) -> NDArray[np.uint8]:
    """Rows of activations as activation_rows has them, in planes."""
    padded, groups = layout.padded_cols, layout.padded_cols // layout.group
    values = rng.integers(-LARGEST, LARGEST + 1, (tokens, padded))
    high = (values + 128) >> 8
    fixes = [-ZERO_POINT[layout.dtype] * v.reshape(tokens, groups, -1).sum(2).astype(np.int32) for v in (values, high)]
    parts = [
        high.astype(np.int8), (values - 256 * high).astype(np.int8),
        rng.standard_normal((tokens, groups)).astype(np.float32), *(fix.astype(np.int32) for fix in fixes),
    ]  # fmt: skip
    stored = np.concatenate([part.view(np.uint8) for part in parts], axis=1)
    rows = np.zeros((tokens, row_bytes(padded, layout.group, "planes")), np.uint8)
    rows[:, : stored.shape[1]] = stored
    return rows
