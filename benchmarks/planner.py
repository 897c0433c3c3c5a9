"""How good are the plans, and what does planning cost? Every policy's planner against the best that any plan can do.

Random layers of six kinds of server and batch; with up to 10 active experts every choice is tried. The gap is what a
plan's objective (makespan less what its fetches save later) is above the best one's, as a share of the shortest
makespan. Gaps are taken twice: with nothing coming and nothing to save, as it is for policies without prefetch, and
with both. With more experts the planners are compared with ours. Planning is timed from Python to the plan, call by
call.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import progress, spread, write_result
from moe_offload.scheduling.layer_plan import LayerCosts, LayerState
from moe_offload.scheduling.policies import POLICIES
from moe_offload.scheduling.timing import objective
from tests.scheduling.exhaustive import REGIMES, least_objective, random_layer

TIMED = (1, 8, 32, 64, 128)
MANY = (32, 128)
PLANNERS = [name for name in POLICIES if name != "oracle"]  # its planner is ours


def cases(regime: str, sizes: list[int], prefetch: bool) -> Iterator[tuple[LayerState, LayerCosts]]:
    """Random layers with these numbers of active experts; with prefetch some are coming, and fetches save something."""
    rng = np.random.default_rng([list(REGIMES).index(regime), prefetch])
    for active in sizes:
        yield random_layer(rng, REGIMES[regime], active, values=prefetch, coming=0.3 if prefetch else 0.0)


def gaps_to_optimum(regime: str, count: int, prefetch: bool) -> dict[str, list[float]]:
    """Of every policy's plans for 1 to 10 active experts."""
    found: dict[str, list[float]] = {name: [] for name in PLANNERS}
    for state, costs in cases(regime, [1 + number % 10 for number in range(count)], prefetch):
        best = least_objective(state, costs)
        seconds = least_objective(replace(state, value=np.zeros(len(state.rows))), costs) if prefetch else best
        for name in PLANNERS:
            found[name].append((objective(state, costs, POLICIES[name].planner(state, costs)) - best) / seconds)
    return found


def times_ours(regime: str, count: int) -> dict[str, list[float]]:
    """Makespans of the policies' plans for many active experts, over that of ours."""
    found: dict[str, list[float]] = {name: [] for name in PLANNERS}
    for state, costs in cases(regime, [MANY[number % len(MANY)] for number in range(count)], prefetch=False):
        ours = POLICIES["ours"].planner(state, costs).seconds
        for name in PLANNERS:
            found[name].append(POLICIES[name].planner(state, costs).seconds / ours)
    return found


def planning_times(active: int, count: int) -> list[float]:
    """Microseconds of ours, over all kinds of layers, each layer planned a few times in a row."""
    plan = POLICIES["ours"].planner
    seconds = []
    for regime in REGIMES:
        for state, costs in cases(regime, [active] * count, prefetch=True):
            for _ in range(5):
                started = perf_counter()
                plan(state, costs)
                seconds.append(1e6 * (perf_counter() - started))
    return seconds


def main(
    layers: Annotated[int, typer.Option(min=10, help="Random layers of each kind.")] = 500,
    smoke: Annotated[bool, typer.Option(help="A quick run on a few layers; writes nothing.")] = False,
) -> None:
    """Compare the planners and time ours."""
    count = 10 if smoke else layers
    quality: dict[str, Any] = {}
    for regime in REGIMES:
        progress(f"planning {regime}")
        quality[regime] = {}
        gaps, ahead = (gaps_to_optimum(regime, count, prefetch) for prefetch in (False, True))
        many = times_ours(regime, max(count // 5, 2))
        for name in PLANNERS:
            quality[regime][name] = {
                "mean_gap": mean(gaps[name]),
                "worst_gap": max(gaps[name]),
                "mean_gap_with_prefetch": mean(ahead[name]),
                "worst_gap_with_prefetch": max(ahead[name]),
                "mean_times_ours_many_experts": mean(many[name]),
                "least_times_ours_many_experts": min(many[name]),
            }
    progress("timing")
    times = {active: spread(planning_times(active, max(count // 10, 1))) for active in TIMED}

    table = Table(title="Plans for up to 10 active experts: mean (worst) percent above the best")
    for column in ("policy", *REGIMES):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name in PLANNERS:
        cells = [quality[regime][name] for regime in REGIMES]
        table.add_row(name, *(f"{100 * c['mean_gap']:.1f} ({100 * c['worst_gap']:.0f})" for c in cells))
    Console().print(table)
    table = Table(title=f"Plans for {' or '.join(map(str, MANY))} active experts: mean (least) makespan, of ours")
    for column in ("policy", *REGIMES):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name in PLANNERS:
        cells = [quality[regime][name] for regime in REGIMES]
        many_cells = [(c["mean_times_ours_many_experts"], c["least_times_ours_many_experts"]) for c in cells]
        table.add_row(name, *(f"{average:.2f} ({least:.2f})" for average, least in many_cells))
    Console().print(table)
    table = Table(title="Planning, microseconds a call")
    for column in ("active experts", "median", "least"):
        table.add_column(column, justify="right")
    for active, time in times.items():
        table.add_row(str(active), f"{time['median']:.1f}", f"{time['min']:.1f}")
    Console().print(table)
    if not smoke:
        result = {"layers": layers, "quality": quality, "planning_us": {str(a): t for a, t in times.items()}}
        write_result("planner", result)


if __name__ == "__main__":
    typer.run(main)
