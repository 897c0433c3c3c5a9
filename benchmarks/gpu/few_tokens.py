"""A layer's experts at decode: do they read their weights as fast as the card copies?"""

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contestants import FusedLayer, check
from benchmarks.gpu.experts import Experts, route
from benchmarks.reporting import progress

GOAL = 80.0  # percent of the copy bandwidth, of formats and shapes at one token
ROUNDED = {"bf16": 2e-2, "int4": 2e-2, "int8": 2e-2, "mxfp4": 2e-2}  # outputs and inputs are of 16 bits
Row = dict[str, str | int | float | bool]


def few_tokens(bench: Bench, copy_gb_per_s: float) -> list[Row]:
    """Each model's top-k, random routing. Bytes are those of the active experts' weights, each counted once."""
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        for dtype in shape.formats:
            progress(f"few tokens: {shape.name}, {dtype}")
            experts = Experts.make(bench, shape, dtype)
            for tokens in bench.sizes.tokens:
                rows.append(_row(bench, experts, tokens, copy_gb_per_s))
            del experts
            bench.forget()
    return rows


def _row(bench: Bench, experts: Experts, tokens: int, copy_gb_per_s: float) -> Row:
    shape = experts.shape
    routed = route(experts, tokens, bench.sizes.calls, bench.half, shape.top_k)
    layer = FusedLayer(bench, experts, tokens, shape.top_k)
    out = torch.empty_like(routed[0].hidden)
    calls = [layer.call(each, out) for each in routed]
    calls[0]()
    check(experts, routed[0], out, ROUNDED[experts.record.dtype], "the fused layer")
    series = bench.times(fused=calls)["fused"]
    active = sum(len(each.experts) for each in routed) / len(routed)
    rate = active * experts.record.weight_bytes / series.seconds / 1e9
    return {
        "shape": shape.name, "format": experts.record.dtype, "tokens": tokens, "top_k": shape.top_k,
        "active_experts": round(active, 1), "gb_per_s": round(rate, 1),
        "percent_of_copy": round(100 * rate / copy_gb_per_s, 1),
        "times_the_cache": _times_the_cache(bench, experts),
        **series.to_dict(),
    }  # fmt: skip


def _times_the_cache(bench: Bench, experts: Experts) -> float:
    """How often the L2 cache could be filled by what calls rotate through."""
    nbytes = len(experts.slots) * experts.record.nbytes
    return round(nbytes / bench.cache_bytes, 1) if bench.cache_bytes else 0.0
