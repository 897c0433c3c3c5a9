"""What `moe-offload verify` found, for eyes or machines."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload import __version__, terminal
from moe_offload.verify_metrics import Agreement
from moe_offload.verify_model import Verified

_WIDTH = 100  # where stdout is no terminal


@dataclass(frozen=True, slots=True)
class Ran:
    """How the model ran that was compared."""

    weights: str
    dense: str
    activations: str
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Report:
    """The figures and what they are of."""

    model: str
    engine: Ran
    reference_dtype: str
    text: str
    text_id: str  # a hash of the token ids: figures of two runs compare where it is the same
    sequences: int
    found: Verified
    complaints: list[str]
    seconds: float


def write_json(report: Report) -> None:
    """One object on stdout."""
    said: dict[str, Any] = {"version": __version__, **asdict(report)}
    for name, part in said.pop("found").items():
        said[name] = None if part is None else {key: _number(value) for key, value in part.items()}
    terminal.write(json.dumps(said, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _number(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def write_table(report: Report) -> None:
    """Two tables on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    found, ran = report.found, report.engine
    heads = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    heads.add_column(style="dim", no_wrap=True)
    heads.add_column()
    heads.add_row("model", Text(report.model, style="bold"))
    here = f"experts {ran.weights}, activations {ran.activations}, other linears {ran.dense}, the rest {ran.dtype}"
    heads.add_row("here", Text(f"{here}; on {ran.device}"))
    heads.add_row("reference", f"transformers, eager experts, {report.reference_dtype}, layer by layer")
    sequences = "1 sequence" if report.sequences == 1 else f"{report.sequences} sequences"
    heads.add_row("text", Text(f"{report.text}: {found.all.tokens} tokens in {sequences}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    parts = [("all tokens", found.all), ("in prompts", found.prompt)]
    if found.decode is not None:
        parts.append(("one by one", found.decode))
    for name, _ in parts:
        table.add_column(name, justify="right", no_wrap=True)
    for label, figure in _FIGURES:
        table.add_row(label, *(figure(part) for _, part in parts))
    console.print(Group(heads, Text(), table))
    terminal.figures(f"errors are of logits, which spread by {found.all.spread:.3g}; in {report.seconds:.1f} s")


def _change(part: Agreement) -> str:
    if not part.scored:
        return "-"
    error = f" ± {part.change_error:.2g}" if math.isfinite(part.change_error) else ""
    return f"{part.change:+.3f}{error} %"


_FIGURES: tuple[tuple[str, Callable[[Agreement], str]], ...] = (
    ("tokens", lambda part: f"{part.tokens}"),
    ("largest error", lambda part: f"{part.max_error:.4g}"),
    ("mean error", lambda part: f"{part.mean_error:.4g}"),
    ("same first choice", lambda part: f"{part.top1:.2f} %"),
    ("mean KL divergence", lambda part: f"{part.divergence:.3g}"),
    ("largest KL divergence", lambda part: f"{part.max_divergence:.3g}"),
    ("perplexity, reference", lambda part: f"{part.reference_perplexity:.4f}" if part.scored else "-"),
    ("perplexity, here", lambda part: f"{part.perplexity:.4f}" if part.scored else "-"),
    ("change of perplexity", _change),
)
