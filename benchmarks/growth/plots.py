"""The figures as pictures: small SVG files in docs/plots, the same bytes for the same figures.

`growth_planning.svg`: microseconds of the scheduler's parts; `growth_memory.svg`: what they hold; `growth_speed.svg`:
simulated tokens/s. A panel for each thing that grows, both axes logarithmic.
"""

from pathlib import Path
from typing import Any

from benchmarks.growth.fits import points

PICTURES = {
    "growth_planning": (("plan_us", "forecast_us", "lookup_us", "divide_us", "layer_us"), "microseconds, measured"),
    "growth_memory": (("scheduler_bytes",), "bytes of the scheduler, measured"),
    "growth_speed": (("tokens_per_s",), "decode tokens/s, simulated"),
}
LABELS = {
    "plan_us": "plan of a layer", "forecast_us": "forecast of a layer", "lookup_us": "cache lookup of a layer",
    "divide_us": "division of device memory", "layer_us": "a layer's whole host time, simulator included",
    "scheduler_bytes": "scheduler", "tokens_per_s": "ours",
}  # fmt: skip


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all pictures. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "moe-offload"}
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (figures, unit) in PICTURES.items():
        figure = _panels(result["axes"], figures, unit, pyplot)
        written.append(folder / f"{name}.svg")
        figure.savefig(written[-1], bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return written


def _panels(axes: dict[str, Any], figures: tuple[str, ...], unit: str, pyplot: Any) -> Any:
    made, panels = pyplot.subplots(1, len(axes), figsize=(2.7 * len(axes), 2.6), sharey=True, squeeze=False)
    for panel, (axis, cells) in zip(panels[0], axes.items(), strict=True):
        for number, name in enumerate(figures):
            x, y = points(axis, cells, name)
            panel.loglog(x, y, label=LABELS[name], color=f"C{number}", marker="o", markersize=3, linewidth=1.2)
        panel.set_xscale("log", base=2)
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(unit)
    if len(figures) > 1:
        handles, labels = panels[0][0].get_legend_handles_labels()
        made.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncol=3, frameon=False)
    return made
