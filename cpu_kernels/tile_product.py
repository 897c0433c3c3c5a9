"""A block times any number of tokens, through tiles where there are enough of them.

Tiles are configured for a job's rows and released behind them, so a thread owns no tile state that another runtime, or
the next job's shapes, could trip over.
"""

from typing import Any, NamedTuple

from moe_offload.cpu_kernels.jit import native, specialised
from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.tile_panel import PANEL_TOKENS, make_collect, make_tile_panel, panel_bytes, tile_shapes
from moe_offload.cpu_kernels.tiles import TileMode, make_configure, make_release

MOST_BY_VECTORS = 16  # rows; from the next on, tiles earn what unpacking and gathering cost them

_panel_bytes = native(panel_bytes)


class Products(NamedTuple):
    """Compiled functions, to be called in this order for some rows of an expert."""

    begin: Any  # (rows, tokens, planes, padded, panels); panels: address of `panels_bytes` bytes of the thread's own
    multiply: Any  # (block, records, rows, tokens, planes, padded, to, step, panels), for each block
    end: Any  # (tokens)


def panels_bytes(tokens: int, padded: int, group: int, planes: int) -> int:
    """Bytes of the token panels of `tokens` rows of up to `padded` inputs."""
    return -(-tokens // PANEL_TOKENS) * panel_bytes(padded, group, planes)


def make_products(key: str, layout: PackedMatrix, product: Any, tiles: TileMode | None) -> Products:
    """`product`, as of packed_job, and tiles in its place where they are to be used; `key` must name them."""
    return _vectors_alone(key, product) if tiles is None else _with_tiles(key, layout, product, tiles)


def _vectors_alone(key: str, product: Any) -> Products:
    @specialised(key)
    def begin(rows: int, tokens: int, planes: int, padded: int, panels: int) -> None:
        pass

    @specialised(key)
    def multiply(
        block: int, records: int, rows: int, tokens: int, planes: int, padded: int, to: int, step: int, panels: int
    ) -> None:
        product(block, records, rows, tokens, planes, padded, to, step)

    @specialised(key)
    def end(tokens: int) -> None:
        pass

    return Products(begin, multiply, end)


def _with_tiles(key: str, layout: PackedMatrix, product: Any, tiles: TileMode) -> Products:
    group = layout.group
    configure, release = make_configure(tiles, tile_shapes(group)), make_release(tiles)
    collect_high, collect_both = make_collect(group, 1), make_collect(group, 2)
    panel_high, panel_both = make_tile_panel(layout, 1, tiles), make_tile_panel(layout, 2, tiles)

    @specialised(key)
    def begin(rows: int, tokens: int, planes: int, padded: int, panels: int) -> None:
        if tokens > MOST_BY_VECTORS:
            configure()
            for t in range(0, tokens, PANEL_TOKENS):
                panel = panels + t // PANEL_TOKENS * _panel_bytes(padded, group, planes)
                count = min(PANEL_TOKENS, tokens - t)
                if planes == 2:
                    collect_both(rows + 8 * t, count, padded, panel)
                else:
                    collect_high(rows + 8 * t, count, padded, panel)

    @specialised(key)
    def multiply(
        block: int, records: int, rows: int, tokens: int, planes: int, padded: int, to: int, step: int, panels: int
    ) -> None:
        if tokens > MOST_BY_VECTORS:
            for t in range(0, tokens, PANEL_TOKENS):
                panel = panels + t // PANEL_TOKENS * _panel_bytes(padded, group, planes)
                count = min(PANEL_TOKENS, tokens - t)
                if planes == 2:
                    panel_both(block, records, panel, count, padded, to + t * step, step)
                else:
                    panel_high(block, records, panel, count, padded, to + t * step, step)
        else:
            product(block, records, rows, tokens, planes, padded, to, step)

    @specialised(key)
    def end(tokens: int) -> None:
        if tokens > MOST_BY_VECTORS:
            release()

    return Products(begin, multiply, end)
