"""Many tokens of one expert: dequantised tiles beside cuBLAS, and from how many tokens on they are the better way."""

import torch

from benchmarks.gpu.bench import Bench, Shape
from benchmarks.gpu.contestants import FusedLayer, Products, TiledExpert, check
from benchmarks.gpu.experts import Experts, Routed, route
from benchmarks.gpu.few_tokens import Row
from benchmarks.reporting import progress
from moe_offload.cpu_kernels.packed_layout import StoredType
from moe_offload.gpu_kernels.tiled_experts import compute_type

GOAL = 60.0  # percent of cuBLAS's speed
_ROUNDED = 3e-2  # inputs, weights and what lies between are of 16 bits


def many_tokens(bench: Bench) -> list[Row]:
    """The whole expert, from gathering its rows to adding them, beside its matrix products alone in the same type."""
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        for dtype in shape.formats:
            what = f"many tokens: {shape.name}, {dtype}"
            progress(what)
            with bench.within_memory(what):
                rows += _beside_cublas(bench, shape, dtype)
    return rows


def _beside_cublas(bench: Bench, shape: Shape, dtype: StoredType) -> list[Row]:
    compute = compute_type(bench.capability, bench.half)
    nbytes = 3 * shape.hidden * shape.inner * compute.itemsize
    experts, products = Experts.make(bench, shape, dtype), Products(bench, shape, compute, bench.copies(nbytes, 1))
    tiled = TiledExpert(bench, experts, compute)
    rows: list[Row] = []
    for tokens in bench.sizes.many_tokens:
        routed = route(experts, tokens, 1, compute, 1)[0]
        out = torch.zeros(routed.hidden.shape, device=bench.device)
        tiled.call(0, routed.hidden, out)()
        check(experts, routed, out, _ROUNDED, "the tiled expert")
        turns = range(bench.sizes.calls)
        series = bench.times(
            tiled=[tiled.call(turn % len(experts.slots), routed.hidden, out) for turn in turns],
            cublas=[products.call(turn, routed.hidden) for turn in turns],
        )
        ours, theirs = series["tiled"], series["cublas"].seconds
        operations = 6 * tokens * shape.hidden * shape.inner
        rows.append({
            "shape": shape.name, "format": dtype, "compute": str(compute).removeprefix("torch."), "tokens": tokens,
            "tflop_per_s": round(operations / ours.seconds / 1e12, 2),
            "cublas_tflop_per_s": round(operations / theirs / 1e12, 2),
            "percent_of_cublas": round(100 * theirs / ours.seconds, 1),
            "cublas_us": round(theirs * 1e6, 2), **ours.to_dict(),
        })  # fmt: skip
    return rows


def crossover(bench: Bench) -> list[Row]:
    """Both ways for T tokens that all want one expert. `tiles_from`: the T from which on the tiles win, 0: none."""
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        for dtype in shape.formats:
            what = f"crossover: {shape.name}, {dtype}"
            progress(what)
            with bench.within_memory(what):
                experts = Experts.make(bench, shape, dtype)
                seconds = [_both(bench, experts, tokens) for tokens in bench.sizes.crossover]
                least = first_win(bench.sizes.crossover, seconds)
                rows += [
                    {
                        "shape": shape.name, "format": dtype, "tokens": tokens, "fused_us": round(fused * 1e6, 2),
                        "tiled_us": round(tiled * 1e6, 2), "tiles_from": least,
                    }
                    for tokens, (fused, tiled) in zip(bench.sizes.crossover, seconds, strict=True)
                ]  # fmt: skip
                del experts
    return rows


def _both(bench: Bench, experts: Experts, tokens: int) -> tuple[float, float]:
    layer = FusedLayer(bench, experts, tokens, 1)
    tiled = TiledExpert(bench, experts, compute_type(bench.capability, bench.half))
    drawn = route(experts, tokens, 1, bench.half, 1)[0]
    fused_out, tiled_out = torch.empty_like(drawn.hidden), torch.zeros(drawn.hidden.shape, device=bench.device)
    turns = [turn % len(experts.slots) for turn in range(bench.calls(experts.record.weight_bytes))]
    routed = [Routed(drawn.hidden, torch.full_like(drawn.index, e), drawn.weights, [e], tokens) for e in turns]
    series = bench.times(
        fused=[layer.call(each, fused_out) for each in routed],
        tiled=[tiled.call(e, drawn.hidden, tiled_out) for e in turns],
    )
    return series["fused"].seconds, series["tiled"].seconds


def first_win(tokens: tuple[int, ...], seconds: list[tuple[float, float]]) -> int:
    """The least number of tokens from which on the second is always faster; 0 where it is not at the last."""
    least = 0
    for count, (first, second) in zip(reversed(tokens), reversed(seconds), strict=True):
        if first <= second:
            break
        least = count
    return least
