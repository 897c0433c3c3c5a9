"""The report in Markdown: exponents, then the cells of every axis."""

from collections.abc import Mapping
from typing import Any

from benchmarks.growth.fits import MEASURED, SIMULATED, Fit, figure

NAMES = {
    "plan_us": "plan, us", "forecast_us": "forecast, us", "lookup_us": "lookup, us", "divide_us": "division, us",
    "layer_us": "host time, us", "scheduler_bytes": "scheduler, MB", "tokens_per_s": "tokens/s, simulated",
}  # fmt: skip
_COMMAND = "python -m benchmarks.growth"


def report(result: Mapping[str, Any], fits: Mapping[str, Mapping[str, Fit | None]]) -> str:
    """All of docs/growth.md."""
    base, machine = result["base"], result["machine"]
    lines = [
        "# How cost grows",
        "",
        f"Written by `{_COMMAND}` from benchmarks/results/growth.json; do not edit.",
        "",
        f"One thing grows, the others stay at {base['experts']} experts, {base['layers']} layers,"
        f" {base['batch']} sequences and {base['context']} positions of context; 4 experts a token, int4, of"
        " Qwen3-30B-A3B's size.",
        f"Times and the scheduler's memory are **measured** on {machine['cpu']}, {machine['cores']} cores, and are the"
        " program's own planner, forecast, cache and division of device memory. Tokens/s are **simulated**, on a"
        f" virtual {result['server']}, where all experts are in host memory, however large that would have to be.",
        "",
        "- plan: of one layer. forecast: observing a layer's routing, and what is expected next. lookup: a layer's"
        " experts in the cache. division: device memory between KV cache and expert slots, once a generation and again"
        " as the context grows.",
        "- host time: all that one layer takes in Python, the virtual accelerator's bookkeeping included; on a real"
        " card that is replaced by launches.",
        "- scheduler: what plans, forecast and cache tables hold.",
        "",
        "## Exponents",
        "",
        "The a in figure ~ grown^a by least squares, and over the upper half of the points.",
        "",
        *_table(
            ["", *fits],
            [[NAMES[name], *(_fit(found[name]) for found in fits.values())] for name in (*MEASURED, *SIMULATED)],
        ),
        "",
        "![planning time](plots/growth_planning.svg)",
        "![scheduler's memory](plots/growth_memory.svg)",
        "![simulated speed](plots/growth_speed.svg)",
    ]
    for axis, cells in result["axes"].items():
        heads = [axis, *(NAMES[name] for name in (*MEASURED, *SIMULATED)), "slots", "KV layers on the card", "KV, GB"]
        lines += ["", f"## {axis.capitalize()}", "", *_table(heads, [_row(axis, cell) for cell in cells])]
    return "\n".join(lines) + "\n"


def _row(axis: str, cell: Mapping[str, Any]) -> list[str]:
    values = [_number(name, figure(cell, name)) for name in (*MEASURED, *SIMULATED)]
    simulated = cell["simulated"]
    places = ["does not fit", ""] if simulated is None else [str(simulated[k]) for k in ("slots", "kv_layers_on_card")]
    return [str(cell[axis]), *values, *places, f"{cell['kv_cache_gb']:.2f}"]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.2f}" if name == "scheduler_bytes" else f"{value:.1f}"


def _fit(found: Fit | None) -> str:
    return "-" if found is None else str(found)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]
