"""Pictures of the predictors' figures: reads results, writes small SVG files into docs/plots.

    python -m benchmarks.predictor.plots        (needs matplotlib: pip install "moe-offload[plots]")

From results/predictor.json: recall.svg, recall by layer and distance; calibration.svg, what was predicted against what
came; cache_gain.svg, hits of a cache by its size. From results/prefetch.json, where there is one: prefetch_gain.svg,
simulated gain of prefetching by size of the cache.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.reporting import RESULTS

PLOTS = Path(__file__).parents[2] / "docs" / "plots"
MODE = "decode"
MISSING = 'plots need matplotlib: pip install "moe-offload[plots]", or pip install matplotlib'


def recall(result: dict[str, Any], pyplot: Any) -> Any:
    """A panel for each distance, a line for each predictor, intervals as bars."""
    distances = _distances(result)
    figure, panels = pyplot.subplots(1, len(distances), figsize=(3.2 * len(distances), 2.8), sharey=True, squeeze=False)
    for panel, distance in zip(panels[0], distances, strict=True):
        for number, (name, modes) in enumerate(result["predictors"].items()):
            layers = modes[MODE]["distances"][distance]["layers"]
            values = [each["recall"] for each in layers.values()]
            middle = [100 * value for value, _, _ in values]
            known = all(low is not None for _, low, _ in values)
            bars = (
                [[100 * (v - low) for v, low, _ in values], [100 * (high - v) for v, _, high in values]]
                if known
                else None
            )
            at = [int(layer) for layer in layers]
            panel.errorbar(
                at, middle, yerr=bars, label=name, color=f"C{number}", marker="o", markersize=3, linewidth=1.2
            )
        panel.set_title(f"distance {distance}", fontsize=9)
        panel.set_xlabel("layer predicted")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("slot recall, %")
    _legend(figure, panels[0][0], _what(result))
    return figure


def calibration(result: dict[str, Any], pyplot: Any) -> Any:
    """A panel for each distance: the diagonal is a predictor that means what it says."""
    distances = _distances(result)
    figure, panels = pyplot.subplots(1, len(distances), figsize=(3.2 * len(distances), 3.0), sharey=True, squeeze=False)
    for panel, distance in zip(panels[0], distances, strict=True):
        panel.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
        for number, (name, modes) in enumerate(result["predictors"].items()):
            curve = modes[MODE]["distances"][distance]["calibration"]
            panel.plot(
                curve["predicted"], curve["observed"], label=f"{name}", color=f"C{number}", marker="o", markersize=3,
                linewidth=1.2,
            )  # fmt: skip
        panel.set_title(f"distance {distance}", fontsize=9)
        panel.set_xlabel("predicted probability")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("share that came")
    _legend(figure, panels[0][0], _what(result))
    return figure


def cache_gain(result: dict[str, Any], pyplot: Any) -> Any:
    """Hits by size of the cache, with LRU below and Belady and the perfect predictor as marks."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    caches = result["caches"]
    every = result["layers"] * result["experts"]
    first = next(iter(caches.values()))
    sizes = [100 * each["capacity"] / every for each in first]
    panel.plot(sizes, [100 * each["lru"][0] for each in first], color="0.1", linestyle=":", label="LRU alone", zorder=3)
    panel.plot(
        sizes, [100 * each["belady"][0] for each in first], color="0.3", linestyle="--", label="Belady, on demand"
    )
    for number, (name, rates) in enumerate(caches.items()):
        panel.plot(
            sizes,
            [100 * each["predicted"][0] for each in rates],
            label=name,
            color=f"C{number}",
            marker="o",
            markersize=3,
        )
    panel.set_xlabel("cache, % of all experts")
    panel.set_ylabel("found in the cache, %")
    panel.set_ylim(0, 101)
    panel.grid(alpha=0.3)
    _legend(figure, panel, f"{_what(result)}; experts loaded ahead, one sequence")
    return figure


def prefetch_gain(result: dict[str, Any], pyplot: Any) -> Any:
    """Simulated speed with prefetch over that without, by size of the cache; a panel for each batch.

    Of the demo model's routing: the synthetic one would blur the mean.
    """
    cells = [cell for cell in result["cells"] if cell["routing"] == "demo"]
    batches = sorted({cell["batch"] for cell in cells})
    forecasts = list(dict.fromkeys(name for cell in cells for name in cell["gain"]))
    sizes = sorted({cell["cache"] for cell in cells})
    figure, panels = pyplot.subplots(1, len(batches), figsize=(2.8 * len(batches), 2.8), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        panel.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
        for number, name in enumerate(forecasts):
            means = []
            for size in sizes:
                gains = [
                    c["gain"][name] for c in cells if (c["batch"], c["cache"]) == (batch, size) and name in c["gain"]
                ]
                means.append(sum(gains) / len(gains) if gains else float("nan"))
            panel.plot([100 * size for size in sizes], means, label=name, color=f"C{number}", marker="o", markersize=3)
        panel.set_title(f"batch {batch}", fontsize=9)
        panel.set_xlabel("cache, % of all experts")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("speed, of that without prefetch")
    _legend(figure, panels[0][0], "simulated, mean over servers")
    return figure


FROM_PREDICTOR: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "recall": recall, "calibration": calibration, "cache_gain": cache_gain,
}  # fmt: skip
FROM_PREFETCH: dict[str, Callable[[dict[str, Any], Any], Any]] = {"prefetch_gain": prefetch_gain}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw all that there are results for. Raises FileNotFoundError where there are none."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "font.size": 8,
        "svg.fonttype": "none",
        "svg.hashsalt": "moe-offload",
    }  # same bytes each time
    from matplotlib import pyplot

    written = []
    for source, figures in (("predictor", FROM_PREDICTOR), ("prefetch", FROM_PREFETCH)):
        path = results / f"{source}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in figures.items():
            figure = make(result, pyplot)
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], bbox_inches="tight", metadata={"Date": None})
            pyplot.close(figure)
    if not written:
        raise FileNotFoundError(f"there are no results in {results.name}/: run python -m benchmarks.predictor first")
    return written


def _distances(result: dict[str, Any]) -> list[str]:
    return sorted(next(iter(result["predictors"].values()))[MODE]["distances"])


def _what(result: dict[str, Any]) -> str:
    made = "synthetic routing" if result["routing"] == "synthetic" else f"{result['model_type']}, held-out text"
    return f"{made}, {MODE}"


def _legend(figure: Any, panel: Any, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.suptitle(title, fontsize=9, y=1.02)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncol=4, fontsize=8, frameon=False)


def main(
    results: Annotated[Path, typer.Option(help="Folder of results.")] = RESULTS,
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = PLOTS,
) -> None:
    """Draw what the last runs found."""
    try:
        written = draw(results, folder)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise typer.BadParameter(MISSING) from error
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    for path in written:
        Console().print(path.name)


if __name__ == "__main__":
    typer.run(main)
