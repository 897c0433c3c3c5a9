"""What is prefetching worth with popularity, look-ahead, a learned predictor and perfect knowledge? Simulated.

    python -m benchmarks.prefetch [TRACE] [--train TRACE] [--predictor FILE] [--smoke]

A cell is a virtual server, a routing, a batch and a cache of 10, 35 or 70 % of the experts, on a card that has the
memory for it. Everything runs with our policy, its guard and its gate, and is compared with the same without copies
ahead (simulation.py). TRACE is of held-out text of the demo model, run with experts of gpt-oss's size; look-ahead is
calibrated on the training sequences of another trace (--train), or on one half of TRACE, and then only the other half
is run. The other routing is synthetic, of a model with Qwen3-30B-A3B's experts but fewer of them.

A predictor takes the host --cost microseconds a layer and --cost-token more for each token. "free" is the last
predictor if it took none; perfect knowledge takes none and knows the next three layers of the step; the ceiling is
the same without guard and gate. Guard and gate find out what pays by trials of some steps: these are counted with the
rest ("gain"), told ("trial_steps"), and left out once ("settled_gain"). Times are means of three runs on different
parts of the routing: which experts the guard freezes, and when, alone makes 2 to 3 % at one sequence.
"""

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.predictor.__main__ import DEMO_TRACE
from benchmarks.prefetch.routes import Route, StepsOf, demo_route, demo_steps, synthetic_route, synthetic_steps
from benchmarks.prefetch.simulation import Prefetched, run
from benchmarks.reporting import progress, wide_console, write_result
from benchmarks.servers.simulation import CONTEXT, Steps
from moe_offload.predictor.network import LearnedPredictor
from moe_offload.predictor.network_file import read_networks
from moe_offload.predictor.synthetic import Routing, Size
from moe_offload.predictor.trace import read_trace

SERVERS = ("gtx1080ti", "rtx3090", "a100")
SYNTHETIC_SERVERS = SERVERS[:1]
BATCHES = (1, 4, 16, 64)
CACHES = (0.10, 0.35, 0.70)
NOISE = 0.01
RUNS = 3
SMOKE = Size(layers=4, experts=16, top_k=2, sequences=40, tokens=24, prompt_tokens=12, hidden=16)
SMOKE_ROUTING = Routing(0.45, 0.35, (0.8, 0.7, 0.6))


def cell(server: str, route: Route, batch: int, share: float, runs: list[dict[str, Prefetched]]) -> dict[str, Any]:
    """For JSON; gain: speed over that without copies ahead; settled: leaving out steps that tried something.

    runs: by name, of several parts of the routing. What the guard freezes, and when, differs from run to run.
    """

    def seconds(name: str) -> float:
        return fmean(run[name].result.seconds_per_step for run in runs)

    def settled(name: str) -> float:
        return fmean(run[name].settled_seconds for run in runs)

    names = list(runs[0])
    gains = {
        name: [run["none"].result.seconds_per_step / run[name].result.seconds_per_step for run in runs]
        for name in names[1:]
    }
    return {
        "server": server, "routing": route.name, "batch": batch, "cache": share, "slots": runs[0]["none"].result.slots,
        "gain": {name: round(seconds("none") / seconds(name), 4) for name in names[1:]},
        "gain_of_runs": {name: [round(gain, 4) for gain in each] for name, each in gains.items()},
        "settled_gain": {name: round(settled("none") / settled(name), 4) for name in names[1:]},
        "simulated": {
            name: {
                "ms_per_step": round(1e3 * seconds(name), 4),
                "hits": round(fmean(run[name].result.hits for run in runs), 4),
                "busy": {
                    key: round(fmean(run[name].result.busy[key] for run in runs), 3)
                    for key in runs[0][name].result.busy
                },
                "gate": [run[name].gate for run in runs],
                "trial_steps": round(fmean(run[name].trial_steps for run in runs), 3),
            }
            for name in names
        },
    }  # fmt: skip


def cells_of(
    route: Route,
    servers: tuple[str, ...],
    batches: tuple[int, ...],
    steps_of: StepsOf,
    cost: float,
    each: float,
    runs: int = RUNS,
) -> list[dict[str, Any]]:
    """Every cell of a routing. cost, each: microseconds of a predictor for a layer, and for each token more. runs: on
    different parts of the routing, whose times are averaged.
    """
    found = []
    for batch in batches:
        steps = steps_of(batch)
        parts = []
        for part in range(runs):
            tokens = route.tokens(batch, steps.total, part / runs / batch)
            parts.append((route.ways(tokens, 1e-6 * (cost + each * batch)), route.choices(tokens)))
        for server in servers:
            progress(f"{route.name}, batch {batch}, {server}")
            for share in CACHES:
                results = [
                    {name: run(server, route.shape, choices, steps, share, way) for name, way in ways.items()}
                    for ways, choices in parts
                ]
                found.append(cell(server, route, batch, share, results))
    return found


def show(console: Console, cells: list[dict[str, Any]]) -> None:
    """A table for each routing."""
    for name in dict.fromkeys(each["routing"] for each in cells):
        group = [each for each in cells if each["routing"] == name]
        ways = list(group[0]["gain"])
        table = Table("", "without: ms a step, hits", *ways, title=f"{name} routing: simulated speed over no prefetch")
        for each in group:
            none = each["simulated"]["none"]
            gains = [f"{each['gain'][way]:.3f}{'' if each['gain'][way] >= 1 - NOISE else ' !'}" for way in ways]
            what = f"{each['server']}, batch {each['batch']}, {each['cache']:.0%}"
            table.add_row(what, f"{none['ms_per_step']:.2f}, {none['hits']:.0%}", *gains)
        console.print(table)


def summary(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By way of looking ahead: least, mean, greatest gain, and how many cells are slower; settled: without trials."""
    found = {}
    for way in dict.fromkeys(name for each in cells for name in each["gain"]):
        gains = [each["gain"][way] for each in cells if way in each["gain"]]
        settled = [each["settled_gain"][way] for each in cells if way in each["settled_gain"]]
        found[way] = {
            "cells": len(gains), "least": min(gains), "mean": round(sum(gains) / len(gains), 4), "most": max(gains),
            "slower": sum(gain < 1 - NOISE for gain in gains), "settled_least": min(settled),
            "settled_slower": sum(gain < 1 - NOISE for gain in settled),
        }  # fmt: skip
    return found


def main(
    trace: Annotated[Path, typer.Argument(help="Trace of held-out text.")] = DEMO_TRACE,
    train: Annotated[Path | None, typer.Option(help="Trace to calibrate look-ahead on; none: half of TRACE.")] = None,
    predictor: Annotated[Path | None, typer.Option(help="Trained predictor.")] = None,
    cost: Annotated[float, typer.Option(min=0, help="Microseconds of a predictor for a layer.")] = 60.0,
    cost_token: Annotated[float, typer.Option(min=0, help="And for each token more.")] = 4.0,
    smoke: Annotated[bool, typer.Option(help="One server, a small synthetic trace; writes nothing.")] = False,
) -> None:
    """Measure what prefetching is worth on virtual servers."""
    console = wide_console()
    if smoke:
        route = synthetic_route(SMOKE, SMOKE_ROUTING)
        cells = cells_of(route, SERVERS[:1], BATCHES[:2], lambda batch: Steps(4, 4, 4), cost, cost_token, 1)
        show(console, cells)
        console.print(f"smoke: simulated, synthetic: {summary(cells)}")
        return
    held_out = read_trace(trace)
    learned = (LearnedPredictor(read_networks(predictor, held_out.info.model).networks),) if predictor else ()
    fitted = None if train is None else read_trace(train, held_out.info.model)
    cells = cells_of(demo_route(held_out, fitted, learned), SERVERS, BATCHES, demo_steps, cost, cost_token)
    cells += cells_of(synthetic_route(), SYNTHETIC_SERVERS, BATCHES, synthetic_steps, cost, cost_token)
    show(console, cells)
    sums = {name: summary([each for each in cells if each["routing"] == name]) for name in ("demo", "synthetic")}
    for name, found in sums.items():
        console.print(f"simulated, {name} routing: {found}")
    write_result(
        "prefetch",
        {
            "question": "simulated speed of decoding with prefetch over that without, on virtual servers",
            "simulated": "all figures are of a virtual accelerator's clock, with estimated servers",
            "routing": {
                "demo": f"{held_out.info.note}; {'all of it' if train else 'one half, look-ahead fitted on the other'}",
                "synthetic": "synthetic: made up, as predictable as published; 12 layers x 64 experts",
            },
            "predictor_microseconds": {"layer": cost, "token": cost_token}, "context": CONTEXT, "runs": RUNS,
            "summary": sums, "cells": cells,
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
