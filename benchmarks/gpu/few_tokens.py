"""A layer's experts at decode: do they read their weights as fast as the card copies?"""

import torch

from benchmarks.gpu.bench import Bench, Shape
from benchmarks.gpu.contestants import FusedLayer, check
from benchmarks.gpu.experts import Experts, route
from benchmarks.reporting import progress
from moe_offload.cpu_kernels.packed_layout import StoredType

GOAL = 80.0  # percent of the copy bandwidth, of gate, up and down
ROUNDED = 2e-2  # of the largest output: inputs and outputs are of 16 bits
Row = dict[str, str | int | float | bool]


def few_tokens(bench: Bench, copy_gb_per_s: float) -> list[Row]:
    """Each model's top-k, random routing. Bytes are those of the active experts' weights, each counted once.

    `percent_of_copy` is of the two launches that read weights; `layer_us` and `layer_percent` are of all four, with
    the tokens' rounding before and the sum behind.
    """
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        for dtype in shape.formats:
            what = f"few tokens: {shape.name}, {dtype}"
            progress(what)
            with bench.within_memory(what):
                rows += _rows(bench, shape, dtype, copy_gb_per_s)
    return rows


def _rows(bench: Bench, shape: Shape, dtype: StoredType, copy_gb_per_s: float) -> list[Row]:
    experts = Experts.make(bench, shape, dtype)
    return [_row(bench, experts, tokens, copy_gb_per_s) for tokens in bench.sizes.tokens]


def _row(bench: Bench, experts: Experts, tokens: int, copy_gb_per_s: float) -> Row:
    shape, each = experts.shape, experts.record.weight_bytes
    routed = route(experts, tokens, bench.calls(shape.top_k * each), bench.half, shape.top_k)
    out = torch.empty_like(routed[0].hidden)
    layer = FusedLayer(bench, experts, tokens, shape.top_k)
    calls = [layer.call(one, out) for one in routed]
    calls[0]()
    check(experts, routed[0], out, ROUNDED, "the fused layer")
    prepared = [FusedLayer(bench, experts, tokens, shape.top_k).add_alone(one) for one in routed]
    series = bench.times(experts=prepared, layer=calls)
    active = sum(len(one.experts) for one in routed) / len(routed)

    def rate(seconds: float) -> float:
        return active * each / seconds / 1e9

    alone, whole = series["experts"], series["layer"].seconds
    return {
        "shape": shape.name, "format": experts.record.dtype, "tokens": tokens, "top_k": shape.top_k,
        "active_experts": round(active, 1), "gb_per_s": round(rate(alone.seconds), 1),
        "percent_of_copy": round(100 * rate(alone.seconds) / copy_gb_per_s, 1),
        "layer_percent": round(100 * rate(whole) / copy_gb_per_s, 1), "layer_us": round(whole * 1e6, 2),
        "times_the_cache": bench.times_the_cache(min(len(experts.slots), int(active * len(routed))) * each),
        **alone.to_dict(),
    }  # fmt: skip
