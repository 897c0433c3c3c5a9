"""The report: what stands between the markers of docs/legacy_servers.md is of the last run; the rest is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean

from benchmarks.legacy_servers.contestants import CONTESTANTS, HYBRIMOE, KNOWING, NAMES
from benchmarks.legacy_servers.goals import Goals, best_static, in_paper, oracle, ours
from benchmarks.legacy_servers.published import GAIN_OVER_HYBRIMOE
from benchmarks.legacy_servers.simulated import Outcome
from benchmarks.legacy_servers.validation import UNKNOWN, Check

REPORT = Path(__file__).parents[2] / "docs" / "legacy_servers.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def validation_section(checks: Sequence[Check], outcomes: Sequence[Outcome]) -> str:
    """The paper's figures beside ours."""
    rows = [
        [
            check.card, check.model, str(check.batch), check.system,
            f"{check.slots}{'' if check.slots_known or not check.slots else ' (assumed)'}", f"{check.hits:.0%}",
            f"{check.published:.2f}", f"{check.at_once:.2f} to {check.in_turn:.2f}", f"{check.error:+.0%}",
            "" if check.engine is None else f"{check.engine:.3f}",
        ]
        for check in checks
    ]  # fmt: skip
    head = (
        "card", "model", "batch", "system", "experts on the card", "found there", "published, s/step",
        "by its constants: at once to in turn", "error", "simulated engine",
    )  # fmt: skip
    parts = ["## Validation against the paper", table(head, rows)]
    paper = [outcome for outcome in outcomes if in_paper(outcome)]
    if paper:
        gains = [outcome.speeds["layerscope"] / outcome.speeds[HYBRIMOE] for outcome in paper]
        parts.append(
            f"LayerScope's throughput over HybriMoE's: published {GAIN_OVER_HYBRIMOE:.2f}x; of their rules in one"
            f" engine, simulated, {geometric_mean(gains):.2f}x on average of {len(gains)} cells."
        )
    return "\n\n".join([*parts, "What cannot be validated:", "\n".join(f"- {line}" for line in UNKNOWN)])


def goal_section(goals: Goals) -> str:
    """The goal lines and every cell that misses one."""
    parts = ["## Goals", "\n".join(f"- {line}" for line in goals.lines())]
    missed = [goal for goal in goals.paper if not goal.met]
    if missed:
        rows = [
            [g.cell, f"{g.over_hybrimoe:.2f}x", f"{g.over_its_engine:.2f}x", f"{g.of_oracle:.1%}", f"{g.of_next:.1%}"]
            for g in missed
        ]
        head = (
            "cell",
            "over HybriMoE",
            "over it in an engine by the paper's constants",
            "of the oracle",
            "of one that knows next calls",
        )
        parts += ["Cells of the paper's setting that miss:", table(head, rows)]
    if goals.below:
        rows = [[each.cell, each.static, f"{each.ratio:.3f}"] for each in goals.below]
        parts += ["Cells below a static placement:", table(("cell", "placement", "ours over it"), rows)]
    return "\n\n".join(parts)


def average_section(outcomes: Sequence[Outcome]) -> str:
    """Every contestant over all cells: shares of the oracle and of the bound."""
    rows = []
    for each in CONTESTANTS:
        of_oracle = [outcome.speeds[each.name] / oracle(outcome) for outcome in outcomes]
        of_bound = [outcome.speeds[each.name] / outcome.bound.tokens_per_second for outcome in outcomes]
        first = sum(outcome.speeds[each.name] >= 0.99 * fastest(outcome) for outcome in outcomes)
        rows.append(
            [each.label, f"{fmean(of_oracle):.1%}", f"{min(of_oracle):.1%}", f"{fmean(of_bound):.1%}",
             "" if each.name in KNOWING else f"{first} of {len(outcomes)}"]
        )  # fmt: skip
    head = ("policy", "of the oracle, mean", "least", "of the physical bound, mean", "within 1 % of the fastest")
    return "\n\n".join([f"## All {len(outcomes)} cells", table(head, rows)])


def fastest(outcome: Outcome) -> float:
    """Of those that do not know what is to come."""
    return max(speed for name, speed in outcome.speeds.items() if name not in KNOWING)


def cell_section(outcomes: Sequence[Outcome]) -> str:
    """A table for each server: tokens per second by model, weights, batch and cache."""
    shown = [name for name in NAMES if name not in ("static-offload32", "ours-never")]
    parts = ["## Cells", "Tokens per second of the whole batch, simulated, routing synthetic."]
    for server in dict.fromkeys(outcome.cell.server for outcome in outcomes):
        rows = []
        for outcome in (each for each in outcomes if each.cell.server == server):
            cell = outcome.cell
            rows.append(
                [cell.model, cell.weights, str(cell.batch), f"{cell.share:.0%}",
                 *(f"{outcome.speeds[name]:.3g}" for name in shown), f"{outcome.bound.tokens_per_second:.3g}",
                 f"{ours(outcome) / oracle(outcome):.0%}", f"{ours(outcome) / best_static(outcome)[1]:.2f}x"]
            )  # fmt: skip
        head = ("model", "weights", "batch", "cache", *shown, "bound", "ours of oracle", "ours over static")
        parts += [f"### {server}", table(head, rows)]
    return "\n\n".join(parts)


def generated(
    checks: Sequence[Check], outcomes: Sequence[Outcome], goals: Goals, note: str, plots: Mapping[str, str]
) -> str:
    """All that is made from a run. note: which run. plots: file names by what they show."""
    parts = [note, validation_section(checks, outcomes), goal_section(goals)]
    if outcomes:
        parts.append(average_section(outcomes))
    parts += [f"![{title}](plots/{name})" for name, title in plots.items()]
    if outcomes:
        parts.append(cell_section(outcomes))
    return "\n\n".join(parts)


def put_between_markers(document: str, text: str) -> str:
    """The document with `text` in the place of what was generated before."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"the report needs the lines {BEGIN} and {END} once each, in this order")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
