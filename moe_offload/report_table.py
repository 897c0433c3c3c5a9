"""`moe-offload info` for human eyes."""

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload.memory import format_bytes
from moe_offload.models.spec import MoeLayerSpec
from moe_offload.report import Report

_COLOURS = {
    "fits": "green",
    "fits, but not with what is free now": "yellow",
    "runs from disk": "yellow",
    "does not fit": "red",
}
_DENSE = {
    "stored": "other linears as stored (int8 with --weights int8 or int4)",
    "int8": "other linears (attention, shared experts, output head) converted to int8",
    "int4": "other linears (attention, shared experts, output head) converted to int4",
}
_WIDTH = 100  # where stdout is no terminal


def print_report(report: Report) -> None:
    """Two tables and a line on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    free, total = format_bytes(report.memory.available), format_bytes(report.memory.total)
    memory = Text(
        f"This machine has {total} of memory, {free} free. Sizes are weights alone, what is not an expert in 16 bits."
    )
    console.print(Group(_facts(report), Text(), _formats(report), memory))


def _facts(report: Report) -> Table:
    spec = report.spec
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("model", Text(report.model, style="bold"))
    table.add_row("architecture", f"{spec.architecture} ({spec.model_type})")
    table.add_row("layers", f"{spec.num_layers}, {len(spec.layers)} of them with experts")
    table.add_row("hidden size", str(spec.hidden_size))
    table.add_row("experts", _experts(spec.layers))
    if spec.shared_expert_params:
        table.add_row("shared experts", f"{count(spec.shared_expert_params)} parameters")
    table.add_row("context", f"{spec.max_context} tokens" if spec.max_context else "no limit given")
    share = spec.active_params / spec.total_params
    table.add_row(
        "parameters",
        f"{count(spec.total_params)}, {count(spec.active_params)} active per token ({share:.0%})",
    )
    stored = report.stored
    if stored is None:
        table.add_row("stored as", "the weights are not here, only the configuration")
    else:
        files = f"{stored.files} file{'s' if stored.files > 1 else ''}"
        table.add_row(
            "stored as",
            f"{stored.format}, {format_bytes(stored.bytes)} in {files}: "
            f"{format_bytes(stored.expert_bytes)} experts, "
            f"{format_bytes(stored.non_expert_bytes)} other",
        )
        table.add_row("weights auto", report.reason)
        table.add_row("dense auto", _DENSE[report.dense])
        packs = (
            f"{each.format} here ({format_bytes(each.bytes)})" if each.path
            else f"{each.format} would need {format_bytes(each.bytes)}"
            for each in report.packs
        )  # fmt: skip
        table.add_row("converted", f"{', '.join(packs)}, in {report.pack_dir}")
    return table


def _experts(layers: Sequence[MoeLayerSpec]) -> str:
    """One line, also where layers differ."""
    kinds = dict.fromkeys(
        (
            layer.num_experts,
            layer.top_k,
            layer.hidden_size,
            layer.intermediate_size,
            layer.params_per_expert,
        )
        for layer in layers
    )
    return "; ".join(
        f"{experts} per layer, {top_k} per token, {hidden} x {inner} ({count(params)} parameters each)"
        for experts, top_k, hidden, inner, params in kinds
    )


def _formats(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights")
    table.add_column("bits", justify="right")
    for title in ("experts", "in all", "read per token"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("on this machine")
    for each in report.formats:
        stored = report.stored is not None and report.stored.format == each.format
        table.add_row(
            f"{each.format} (stored)" if stored else each.format,
            f"{each.bits_per_weight:g}",
            format_bytes(each.expert_bytes),
            format_bytes(each.total_bytes),
            format_bytes(each.bytes_per_token),
            Text(each.fit, style=_COLOURS[each.fit]),
            style="bold" if stored else "",
        )
    return table


def count(number: int) -> str:
    """30532122624 -> '30.5 billion'."""
    for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"
