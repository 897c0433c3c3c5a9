"""How do planning time, memory and throughput grow with experts, layers, batch and context?

    python -m benchmarks.growth [--axis experts] [--server gtx1080ti] [--smoke]

One thing grows at a time (axes.py). The scheduler's own time and memory are measured, throughput is simulated
(measure.py). Prints the exponents, writes results/growth.json, docs/growth.md and docs/plots/growth_*.svg.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.growth.axes import AXES, BASE, SMOKE_AXES, SMOKE_BASE, along
from benchmarks.growth.fits import MEASURED, SIMULATED, Fit, figure, fits
from benchmarks.growth.measure import measure
from benchmarks.growth.plots import draw
from benchmarks.growth.report import NAMES, report
from benchmarks.reporting import progress, wide_console, write_result
from benchmarks.servers.simulation import Steps
from moe_offload.transfer.server_profile import PROFILES

DOCS = Path(__file__).parents[2] / "docs"
STEPS, SMOKE_STEPS = Steps(24, 8, 8), Steps(2, 1, 1)


def show(console: Console, axes: dict[str, list[dict[str, Any]]], found: dict[str, dict[str, Fit | None]]) -> None:
    """A table for each axis, and one of the exponents."""
    names = (*MEASURED, *SIMULATED)
    for axis, cells in axes.items():
        table = Table(axis, *(NAMES[name] for name in names), title=f"{axis} growing, medians")
        for cell in cells:
            table.add_row(str(cell[axis]), *(_short(name, figure(cell, name)) for name in names))
        console.print(table)
    table = Table("figure ~ grown^a", *found, title="exponents, and those of the upper half")
    for name in names:
        table.add_row(NAMES[name], *("-" if one[name] is None else str(one[name]) for one in found.values()))
    console.print(table)


def _short(name: str, value: float | None) -> str:
    if value is None:
        return "does not fit"
    return f"{value / 1e6:.3g}" if name == "scheduler_bytes" else f"{value:.4g}"


def main(
    axis: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(AXES)}; all if not given.")] = None,
    server: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "gtx1080ti",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each figure is measured.")] = 15,
    smoke: Annotated[bool, typer.Option(help="A small model, two points an axis; writes nothing.")] = False,
) -> None:
    """Measure and simulate how cost grows."""
    chosen, base = (SMOKE_AXES, SMOKE_BASE) if smoke else (AXES, BASE)
    wrong = [name for name in axis or () if name not in chosen] + ([] if server in PROFILES else [server])
    if wrong:
        raise typer.BadParameter(f"{', '.join(wrong)}: axes are {', '.join(AXES)}, servers {', '.join(PROFILES)}")
    axes: dict[str, list[dict[str, Any]]] = {}
    for name in axis or chosen:
        axes[name] = []
        for cell in along(name, base, chosen):
            progress(f"{name}: {getattr(cell, name)}")
            steps, times = (SMOKE_STEPS, 1) if smoke else (STEPS, rounds)
            axes[name].append(measure(server, cell, steps, times))
    found = {name: fits(name, cells) for name, cells in axes.items()}
    console = wide_console()
    show(console, axes, found)
    if smoke:
        console.print("smoke: nothing is written")
        return
    if axis:
        return  # a part of the figures; the report is of all of them, from one run
    result = {
        "question": "planning time, memory and simulated throughput as experts, layers, batch and context grow",
        "server": server, "base": asdict(base), "steps": asdict(STEPS), "axes": axes,
        "exponents": {
            name: {key: None if one is None else asdict(one) for key, one in each.items()}
            for name, each in found.items()
        },
    }  # fmt: skip
    written = json.loads(write_result("growth", result).read_text())
    (DOCS / "growth.md").write_text(report(written, found))
    try:
        draw(written, DOCS / "plots")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        console.print('no plots without matplotlib: pip install "moe-offload[plots]"', markup=False)


if __name__ == "__main__":
    typer.run(main)
