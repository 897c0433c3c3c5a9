"""All experts of a layer at decode: ours beside transformers' `grouped_mm`, and what launching them costs the host."""

import torch

from benchmarks.gpu.bench import Bench, Shape
from benchmarks.gpu.contestants import FusedLayer, GroupedExperts, check
from benchmarks.gpu.experts import Experts, Routed, route
from benchmarks.gpu.few_tokens import ROUNDED, Row
from benchmarks.gpu.timer import host_seconds
from benchmarks.reporting import progress
from moe_offload.cpu_kernels.packed_layout import StoredType

_OURS: tuple[StoredType, ...] = ("bf16", "int4")


def whole_layer(bench: Bench) -> list[Row]:
    """bf16 tokens and, for transformers, bf16 experts, all in device memory; each with its own copy of the weights.

    `times_grouped_mm`: how much faster ours is on the device. `times_grouped_mm_with_host`: when the host's own time
    for asking is on the way, as in a model without CUDA graphs.
    """
    rows: list[Row] = []
    if bench.capability < (8, 0):
        bench.left_out.append("whole layer: grouped_mm and bf16 products are for compute capability 8.0 and later")
        return rows
    for shape in bench.sizes.shapes:
        what = f"whole layer: {shape.name}"
        if not shape.bias:
            progress(what)
            with bench.within_memory(what):
                rows += _beside_grouped_mm(bench, shape)
    return rows


def _beside_grouped_mm(bench: Bench, shape: Shape) -> list[Row]:
    stored = {dtype: Experts.make(bench, shape, dtype) for dtype in _OURS}
    grouped = GroupedExperts(stored["bf16"])
    rows: list[Row] = []
    for tokens in bench.sizes.tokens:
        rows += _rows(bench, shape, stored, grouped, tokens)
    return rows


def _rows(
    bench: Bench, shape: Shape, stored: dict[StoredType, Experts], grouped: GroupedExperts, tokens: int
) -> list[Row]:
    least = min(stored.values(), key=lambda experts: len(experts.slots))  # so that every routing is one of them all
    routed = route(least, tokens, bench.sizes.calls, torch.bfloat16, shape.top_k)
    out = torch.empty_like(routed[0].hidden)
    layers = {dtype: FusedLayer(bench, experts, tokens, shape.top_k) for dtype, experts in stored.items()}
    calls = {str(dtype): [layer.call(each, out) for each in routed] for dtype, layer in layers.items()}
    calls["grouped_mm"] = [grouped.call(each, out) for each in routed]
    for name, experts in [*stored.items(), ("grouped_mm", stored["bf16"])]:
        calls[name][0]()
        check(experts, routed[0], out, ROUNDED, name)
    series = bench.times(**calls)
    host = {name: host_seconds(bench.timer, each, bench.sizes.rounds) for name, each in calls.items()}
    theirs = series["grouped_mm"].seconds
    return [
        {
            "shape": shape.name, "format": name, "tokens": tokens,
            "times_grouped_mm": round(theirs / each.seconds, 3),
            "times_grouped_mm_with_host": round(
                max(theirs, host["grouped_mm"]) / max(each.seconds, host[name]), 3
            ),
            "host_us": round(host[name] * 1e6, 2),
            **each.to_dict(),
        }
        for name, each in series.items()
    ]  # fmt: skip


def launches(bench: Bench) -> list[Row]:
    """The host's time for one layer of one token beside the device's: experts by name (`add`), by a table of slots
    (`table`), and the latter as a CUDA graph.
    """
    rows: list[Row] = []
    for shape in bench.sizes.shapes:
        dtype = shape.formats[0]
        what = f"launches: {shape.name}, {dtype}"
        progress(what)
        with bench.within_memory(what):
            experts = Experts.make(bench, shape, dtype)
            rows += _launches(bench, experts, route(experts, 1, bench.sizes.calls, bench.half, shape.top_k))
            del experts
    return rows


def _launches(bench: Bench, experts: Experts, routed: list[Routed]) -> list[Row]:
    by_name, by_table = (FusedLayer(bench, experts, 1, experts.shape.top_k, way) for way in (False, True))
    outs = {way: torch.empty_like(routed[0].hidden) for way in ("add", "table", "graph")}
    calls = {
        "add": [by_name.call(each, outs["add"]) for each in routed],
        "table": [by_table.call(each, outs["table"]) for each in routed],
        "graph": [bench.timer.captured(by_table.call(each, outs["graph"])) for each in routed],
    }
    for each in calls.values():
        each[0]()
    for way, out in outs.items():
        if not torch.equal(out, outs["add"]):
            raise RuntimeError(f"{experts.shape.name}: the layer by {way} gives other numbers than by add")
    series = bench.times(**calls)
    return [
        {
            "shape": experts.shape.name, "format": experts.record.dtype, "way": way,
            "host_us": round(host_seconds(bench.timer, calls[way], bench.sizes.rounds) * 1e6, 2),
            **each.to_dict(),
        }
        for way, each in series.items()
    ]  # fmt: skip
