"""The goal lines: ours against HybriMoE and the oracle at the paper's setting, and against every static placement.

HybriMoE stands there twice: as a rule in our engine, which the goal is about, and as the paper's constants have its
engine (rule_times.py), which says what programs differ by.

"Ours" of a cell is the predictor's figure, or popularity's where that is faster: both run in the product, and its gate
takes the faster one. The figures are simulated, so a goal that is met here is met in simulation.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import geometric_mean

from benchmarks.legacy_servers.contestants import HYBRIMOE, KNOWING, NEXT, OURS, STATICS
from benchmarks.legacy_servers.published import CONSTANTS
from benchmarks.legacy_servers.rule_times import step_time
from benchmarks.legacy_servers.settings import PAPER_BATCHES, PAPER_SERVER, PAPER_WEIGHTS, Cell
from benchmarks.legacy_servers.simulated import Outcome
from benchmarks.servers.routing import generate
from moe_offload.scheduling.policies import plan_greedy
from moe_offload.transfer.server_profile import find_profile

TIMES_HYBRIMOE = 2.0
OF_ORACLE = 0.90
EQUAL = 0.01  # relative: as fast as


def ours(outcome: Outcome) -> float:
    """Tokens per second."""
    return max(outcome.speeds[name] for name in OURS)


def oracle(outcome: Outcome) -> float:
    """Tokens per second of whoever knows: ours, where knowing did not help."""
    return max(ours(outcome), *(outcome.speeds[name] for name in KNOWING))


def best_static(outcome: Outcome) -> tuple[str, float]:
    """The fastest placement that never changes."""
    name = max(STATICS, key=lambda each: outcome.speeds[each])
    return name, outcome.speeds[name]


def in_paper(outcome: Outcome) -> bool:
    """bf16 on the V100, batch 4 to 64."""
    cell = outcome.cell
    return (
        cell.server == PAPER_SERVER
        and cell.weights == PAPER_WEIGHTS
        and cell.batch in PAPER_BATCHES
        and cell.batch >= 4
    )


@dataclass(frozen=True, slots=True)
class PaperGoal:
    """One cell of the paper's setting. The goal is `TIMES_HYBRIMOE` where the oracle reaches that, else `OF_ORACLE`.
    over_its_engine: ours over HybriMoE's rule at the paper's constants. of_next: ours over an oracle that knows every
    layer's next call, or over ours where that is faster.
    """

    cell: str
    over_hybrimoe: float
    of_oracle: float
    reachable: bool
    over_its_engine: float
    of_next: float

    @property
    def met(self) -> bool:
        return self.over_hybrimoe >= TIMES_HYBRIMOE or (not self.reachable and self.of_oracle >= OF_ORACLE)


@dataclass(frozen=True, slots=True)
class Below:
    """A cell where a static placement is faster; ratio: ours over it."""

    cell: str
    static: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Goals:
    """paper: every cell of the paper's setting. below: cells distinctly below a static placement; slightly: how many
    more are below it by no more than `EQUAL`; cells: of all.
    """

    paper: tuple[PaperGoal, ...]
    below: tuple[Below, ...]
    slightly: int
    cells: int

    def lines(self) -> list[str]:
        """For people."""
        return [self._paper_line(), *self._engine_line(), self._static_line()]

    def _paper_line(self) -> str:
        if not self.paper:
            return "goal at the paper's setting: no cell of it was run"
        met, twice = sum(goal.met for goal in self.paper), sum(g.over_hybrimoe >= TIMES_HYBRIMOE for g in self.paper)
        gains = [goal.over_hybrimoe for goal in self.paper]
        shares = [goal.of_oracle for goal in self.paper]
        next_shares = [goal.of_next for goal in self.paper]
        verdict = "met" if met == len(gains) else "MISSED"
        return (
            f"goal at the paper's setting (V100, bf16, batch 4 to 64), simulated: {verdict},"
            f" {met} of {len(gains)} cells: at least {TIMES_HYBRIMOE:g}x HybriMoE in {twice} (least {min(gains):.2f}x,"
            f" most {max(gains):.2f}x), else at least {OF_ORACLE:.0%} of the oracle (least {min(shares):.1%}, mean"
            f" {sum(shares) / len(shares):.1%}); of an oracle that knows every layer's next call: least"
            f" {min(next_shares):.1%}, mean {sum(next_shares) / len(next_shares):.1%}"
        )

    def _engine_line(self) -> list[str]:
        if not self.paper:
            return []
        gains = [goal.over_its_engine for goal in self.paper]
        return [
            f"the same cells against HybriMoE's rule in an engine by the paper's constants, simulated: at least"
            f" {TIMES_HYBRIMOE:g}x in {sum(gain >= TIMES_HYBRIMOE for gain in gains)} of {len(gains)} cells (least"
            f" {min(gains):.2f}x, geometric mean {geometric_mean(gains):.2f}x, most {max(gains):.1f}x)"
        ]

    def _static_line(self) -> str:
        if not self.cells:
            return "goal of never below static placement: no cell was run"
        worst = f" (worst {min(each.ratio for each in self.below):.3f})" if self.below else ""
        verdict = "MISSED" if self.below else "met"
        return (
            f"goal never below any static placement, simulated: {verdict}, {len(self.below)} of {self.cells} cells more"
            f" than {EQUAL:.0%} below{worst}, {self.slightly} below by less"
        )

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "lines": self.lines(), "paper": [{**asdict(goal), "met": goal.met} for goal in self.paper],
            "below_static": [asdict(each) for each in self.below], "slightly_below_static": self.slightly,
            "cells": self.cells,
        }  # fmt: skip


def hybrimoe_in_its_engine(cell: Cell) -> float:
    """Tokens per second of its rule by the paper's constants, link, card and CPU at once."""
    shape, steps = cell.shape, cell.steps
    choices = generate(shape, cell.batch, steps.total)
    found = step_time(
        find_profile(cell.server), shape, CONSTANTS[cell.model], plan_greedy, choices, steps.seen + steps.warm,
        cell.slots,
    )  # fmt: skip
    return cell.batch / found.at_once


def goals_of(outcomes: Sequence[Outcome]) -> Goals:
    """Of all cells that were run."""
    paper, below, slightly = [], [], 0
    for outcome in outcomes:
        speed, hybrimoe, most = ours(outcome), outcome.speeds[HYBRIMOE], oracle(outcome)
        if in_paper(outcome):
            reachable = most >= TIMES_HYBRIMOE * hybrimoe
            engine = round(speed / hybrimoe_in_its_engine(outcome.cell), 4)
            goal = PaperGoal(
                outcome.cell.key, round(speed / hybrimoe, 4), round(speed / most, 4), reachable, engine,
                round(speed / max(speed, outcome.speeds[NEXT]), 4),
            )  # fmt: skip
            paper.append(goal)
        name, static = best_static(outcome)
        ratio = speed / static
        if ratio < 1 - EQUAL:
            below.append(Below(outcome.cell.key, name, round(ratio, 4)))
        elif ratio < 1:
            slightly += 1
    return Goals(tuple(paper), tuple(sorted(below, key=lambda each: each.ratio)), slightly, len(outcomes))
