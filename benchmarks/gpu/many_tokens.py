"""Many tokens of one expert: dequantised tiles beside cuBLAS, and from how many tokens on they are the better way."""

import torch

from benchmarks.gpu.bench import Bench, Shape
from benchmarks.gpu.contestants import FusedLayer, Products, TiledExpert, check
from benchmarks.gpu.experts import Experts, Routed, route
from benchmarks.gpu.few_tokens import Row
from benchmarks.reporting import progress

GOAL = 60.0  # percent of cuBLAS's speed
_ROUNDED = 3e-2  # inputs, weights and what lies between are of 16 bits


def many_tokens(bench: Bench) -> list[Row]:
    """The whole expert, from gathering its rows to adding them, beside its matrix products alone."""
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        products = Products(bench, shape, bench.copies(6 * shape.hidden * shape.inner, 1))
        for dtype in shape.formats:
            progress(f"many tokens: {shape.name}, {dtype}")
            experts = Experts.make(bench, shape, dtype)
            tiled = TiledExpert(bench, experts, bench.half)
            for tokens in bench.sizes.many_tokens:
                routed = route(experts, tokens, 1, bench.half, 1)[0]
                rows.append(_row(bench, experts, tiled, products, routed))
            del experts, tiled
            bench.forget()
        del products
        bench.forget()
    return rows


def _row(bench: Bench, experts: Experts, tiled: TiledExpert, products: Products, routed: Routed) -> Row:
    out = torch.zeros(routed.hidden.shape, device=bench.device)
    tiled.call(0, routed.hidden, out)()
    check(experts, routed, out, _ROUNDED, "the tiled expert")
    turns = range(bench.sizes.calls)
    series = bench.times(
        tiled=[tiled.call(turn % len(experts.slots), routed.hidden, out) for turn in turns],
        cublas=[products.call(turn, routed.hidden) for turn in turns],
    )
    record = experts.record
    operations = 6 * routed.tokens * record.hidden_size * record.intermediate_size
    return {
        "shape": experts.shape.name, "format": record.dtype, "tokens": routed.tokens,
        "tflop_per_s": round(operations / series["tiled"].seconds / 1e12, 2),
        "cublas_tflop_per_s": round(operations / series["cublas"].seconds / 1e12, 2),
        "percent_of_cublas": round(100 * series["cublas"].seconds / series["tiled"].seconds, 1),
        **series["tiled"].to_dict(),
        "cublas_us_median": round(series["cublas"].seconds * 1e6, 2),
    }  # fmt: skip


def crossover(bench: Bench) -> list[Row]:
    """Both ways for T tokens that all want one expert, and from which T on the tiles win."""
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        for dtype in shape.formats:
            progress(f"crossover: {shape.name}, {dtype}")
            experts = Experts.make(bench, shape, dtype)
            seconds = [_both(bench, shape, experts, tokens) for tokens in bench.sizes.crossover]
            rows += [
                {
                    "shape": shape.name, "format": dtype, "tokens": tokens, "fused_us": round(fused * 1e6, 2),
                    "tiled_us": round(tiled * 1e6, 2), "tiles_from": _from(bench.sizes.crossover, seconds),
                }
                for tokens, (fused, tiled) in zip(bench.sizes.crossover, seconds, strict=True)
            ]  # fmt: skip
            del experts
            bench.forget()
    return rows


def _both(bench: Bench, shape: Shape, experts: Experts, tokens: int) -> tuple[float, float]:
    layer, tiled = FusedLayer(bench, experts, tokens, 1), TiledExpert(bench, experts, bench.half)
    drawn = route(experts, tokens, 1, bench.half, 1)[0]
    fused_out, tiled_out = torch.empty_like(drawn.hidden), torch.zeros(drawn.hidden.shape, device=bench.device)
    turns = [turn % len(experts.slots) for turn in range(bench.sizes.calls)]
    routed = [Routed(drawn.hidden, torch.full_like(drawn.index, e), drawn.weights, [e], tokens) for e in turns]
    series = bench.times(
        fused=[layer.call(each, fused_out) for each in routed],
        tiled=[tiled.call(e, drawn.hidden, tiled_out) for e in turns],
    )
    return series["fused"].seconds, series["tiled"].seconds


def _from(tokens: tuple[int, ...], seconds: list[tuple[float, float]]) -> int:
    """The least number of tokens from which on the tiles are always faster; 0 where they are not at the last."""
    least = 0
    for count, (fused, tiled) in zip(reversed(tokens), reversed(seconds), strict=True):
        if fused <= tiled:
            break
        least = count
    return least
