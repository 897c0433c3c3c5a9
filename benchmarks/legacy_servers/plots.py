"""Pictures of a run: speed by batch at the paper's setting, and shares of the oracle over all cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.legacy_servers.contestants import KNOWING, NAMES, ORACLE
from benchmarks.legacy_servers.goals import in_paper, oracle
from benchmarks.legacy_servers.simulated import Outcome

PLOTS = Path(__file__).parents[2] / "docs" / "plots"
MISSING = 'plots need matplotlib: pip install "moe-offload[plots]", or pip install matplotlib'
_LINES = ("static", "n-cpu-moe", "lru", "hybrimoe", "layerscope", "ours-predictor", ORACLE)


def paper_setting(outcomes: Sequence[Outcome], pyplot: Any) -> Any:
    """A panel for each model, a line for each policy; the middle one of the caches."""
    cells = [outcome for outcome in outcomes if in_paper(outcome)]
    models = list(dict.fromkeys(outcome.cell.model for outcome in cells))
    figure, panels = pyplot.subplots(1, len(models), figsize=(3.2 * len(models), 3.0), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        own = [outcome for outcome in cells if outcome.cell.model == model]
        batches = sorted({outcome.cell.batch for outcome in own})
        chosen = []
        for batch in batches:
            sizes = sorted((each for each in own if each.cell.batch == batch), key=lambda each: each.cell.slots)
            chosen.append(sizes[len(sizes) // 2])
        for number, name in enumerate(_LINES):
            speeds = [outcome.speeds[name] for outcome in chosen]
            style = "--" if name == ORACLE else "-"
            panel.plot(batches, speeds, style, label=name, color=f"C{number}", marker="o", markersize=3, linewidth=1.2)
        bounds = [outcome.bound.tokens_per_second for outcome in chosen]
        panel.plot(batches, bounds, ":", label="physical bound", color="0.4", linewidth=1.2)
        panel.set(xscale="log", yscale="log", xlabel="batch")
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.set_title(f"{model}, cache {chosen[0].cell.share:.0%}", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s, simulated")
    _legend(figure, panels[0][0], "V100, bf16: simulated, routing synthetic")
    return figure


def oracle_shares(outcomes: Sequence[Outcome], pyplot: Any) -> Any:
    """The spread of each policy's share of the oracle over all cells."""
    names = [name for name in NAMES if name not in KNOWING]
    figure, panel = pyplot.subplots(figsize=(6.4, 3.6))
    shares = [[100 * outcome.speeds[name] / oracle(outcome) for outcome in outcomes] for name in names]
    panel.boxplot(shares, orientation="horizontal", whis=(0, 100), widths=0.6)
    panel.set_yticks(range(1, len(names) + 1), names)
    panel.invert_yaxis()
    panel.set_xlabel(f"share of the oracle, %: {len(outcomes)} cells, simulated, routing synthetic")
    panel.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    return figure


def _legend(figure: Any, panel: Any, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=7, frameon=False)


def draw(outcomes: Sequence[Outcome], folder: Path = PLOTS) -> dict[str, str]:
    """Write SVG files; their titles by name. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # the same run gives the same bytes
    matplotlib.rcParams.update({"svg.hashsalt": "legacy servers", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"legacy_shares.svg": (oracle_shares, "Shares of the oracle", outcomes)}
    if any(in_paper(outcome) for outcome in outcomes):
        wanted["legacy_paper.svg"] = (paper_setting, "Decode speed at the paper's setting", outcomes)
    for name, (make, _, shown) in wanted.items():
        figure = make(shown, pyplot)
        figure.savefig(folder / name, metadata={"Date": None})
        pyplot.close(figure)
    return {name: title for name, (_, title, _) in wanted.items()}
