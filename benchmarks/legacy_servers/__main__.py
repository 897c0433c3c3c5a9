"""LayerScope, its rivals and ours on simulated legacy servers: validation first, then every policy in every cell.

    python -m benchmarks.legacy_servers [--server v100-6230r] [--model qwen3] [--weights int4] [--quick] [--smoke]

A cell is a server, a model, a weight format, a batch and a cache (settings.py). Every contestant (contestants.py)
decodes the same synthetic routing (benchmarks/servers/routing.py) on the same simulated engine; beside them stand an
oracle and the physical bound (bound.py). Cells that are done are kept (journal.py): a run that is interrupted goes
on, and gives the same result. Writes results/legacy_servers.json, docs/legacy_servers.md and its plots; a part of the
cells only prints. Everything is simulated, all routing synthetic.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.legacy_servers.contestants import CONTESTANTS, FARTHER, PREDICTION
from benchmarks.legacy_servers.goals import Goals, goals_of
from benchmarks.legacy_servers.journal import JOURNAL, Journal, code_version, missing
from benchmarks.legacy_servers.plots import MISSING, PLOTS, draw
from benchmarks.legacy_servers.report import REPORT, generated, put_between_markers
from benchmarks.legacy_servers.settings import MODELS, PAPER_SERVER, SMOKE_STEPS, WEIGHTS, Cell, cells
from benchmarks.legacy_servers.simulated import Outcome, outcome
from benchmarks.legacy_servers.validation import STEPS, UNKNOWN, Check, describe, validate
from benchmarks.legacy_servers.worker import end_at_once
from benchmarks.reporting import RESULTS, progress, wide_console, write_result
from benchmarks.servers.simulation import CONTEXT, WORKSPACE
from moe_offload.transfer.server_profile import PROFILES

Report = Callable[[str], None]


def simulate(wanted: list[Cell], journal: Journal, jobs: int, say: Report = progress) -> list[Outcome]:
    """Every cell's outcome, those of earlier runs included, in the order of `wanted`."""
    done = journal.read()
    left = missing(wanted, done)
    if len(left) < len(wanted):
        say(f"{len(wanted) - len(left)} of {len(wanted)} cells are done already: {JOURNAL.name}")
    all_effort, effort, began = sum(cell.effort for cell in left), 0.0, time.monotonic()

    def note(found: Outcome) -> None:
        nonlocal effort
        journal.add(found)
        done[found.cell.key] = found
        effort += found.cell.effort
        seconds = (time.monotonic() - began) * (all_effort - effort) / effort
        say(f"[{len(wanted) - len(missing(wanted, done))}/{len(wanted)}, {_span(seconds)} left] {found.cell.key}")

    if jobs == 1 or len(left) < 2:
        for cell in left:
            note(outcome(cell))
    else:
        # not fork: compiled code's threads do not survive it
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=end_at_once) as pool:
            futures = [pool.submit(outcome, cell) for cell in left]
            try:
                for future in as_completed(futures):
                    note(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [done[cell.key] for cell in wanted]


def result_of(checks: Sequence[Check], outcomes: Sequence[Outcome], goals: Goals) -> dict[str, object]:
    """For JSON."""
    return {
        "question": "simulated decode speed of LayerScope, its rivals and ours on legacy servers",
        "simulated": "figures are of a virtual accelerator's clock, with estimated servers; the routing is synthetic",
        "code": code_version(), "context": CONTEXT, "workspace_bytes": WORKSPACE,
        "prediction_seconds": {"layer": PREDICTION[0], "token": PREDICTION[1]}, "recall_lost_per_layer": FARTHER,
        "contestants": {each.name: {"label": each.label, "recall": each.recall or None} for each in CONTESTANTS},
        "servers": {name: list(PROFILES[name].sources) for name in dict.fromkeys(o.cell.server for o in outcomes)},
        "validation": [check.to_dict() for check in checks], "not_validated": UNKNOWN,
        "goals": goals.to_dict(), "cells": [_cell(each) for each in outcomes],
    }  # fmt: skip


def _cell(each: Outcome) -> dict[str, object]:
    return {
        **asdict(each.cell), "cache": round(each.cell.share, 4), "bound": asdict(each.bound),
        "tokens_per_s": dict(each.speeds), "looks_ahead": dict(each.ways), "hits": dict(each.hits),
        "busy": {name: dict(busy) for name, busy in each.busy.items()},
    }  # fmt: skip


def write_report(text: str, path: Path = REPORT) -> None:
    """Between the markers of the report."""
    path.write_text(put_between_markers(path.read_text(encoding="utf-8"), text), encoding="utf-8")


def _span(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _named(wanted: Sequence[str] | None, known: Sequence[str], what: str, *, part: bool = False) -> list[str]:
    """Those of `known` that are asked for, all if none is; part: by a part of their names."""
    if not wanted:
        return list(known)
    found = [name for name in known if any(w == name or (part and w.lower() in name.lower()) for w in wanted)]
    unknown = [w for w in wanted if not any(w == name or (part and w.lower() in name.lower()) for name in known)]
    if unknown:
        raise typer.BadParameter(f"no {what} is called {', '.join(unknown)}: there are {', '.join(known)}")
    return found


def main(
    server: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PROFILES)}; all if not given.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Part of a model's name; all if not given.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WEIGHTS)}; all if not given.")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes at a time.")] = 2,
    quick: Annotated[
        bool, typer.Option(help="Few batches, one cache; prints, and writes a report that says so.")
    ] = False,
    smoke: Annotated[bool, typer.Option(help="One cell, few steps; writes nothing.")] = False,
) -> None:
    """Compare LayerScope, its rivals and ours on simulated legacy servers."""
    servers = _named(server, tuple(PROFILES), "server")
    models = _named(model, MODELS, "model", part=True)
    formats = _named(weights, WEIGHTS, "weight format")
    console = wide_console()
    if smoke:
        found = outcome(Cell(PAPER_SERVER, "DeepSeek-V2-Lite", "bf16", 4, 582, SMOKE_STEPS))
        console.print(f"smoke: simulated, synthetic: {goals_of([found]).lines()[0]}; {dict(found.speeds)}")
        return
    wanted = cells(servers, models, formats, quick=quick)
    if not wanted:
        raise typer.BadParameter(
            f"no cell: {', '.join(models)} with {', '.join(formats)} experts on {', '.join(servers)} is not compared"
            " (bf16 and int8 on the paper's server alone, gpt-oss in mxfp4), or does not fit"
        )
    checks = validate(STEPS)
    for check in checks:
        console.print(f"simulated, {describe(check)}")
    try:
        outcomes = simulate(wanted, Journal(), jobs)
    except KeyboardInterrupt:
        progress(f"interrupted: the same command goes on from what is done ({JOURNAL.name})")
        raise typer.Exit(130) from None
    except BrokenProcessPool:
        progress("a worker was killed, for want of memory perhaps: the same command goes on, --jobs 1 takes half of it")
        raise typer.Exit(1) from None
    goals = goals_of(outcomes)
    _show(outcomes)
    for line in goals.lines():
        console.print(line)
    for each in goals.below:
        console.print(f"  below {each.static}: {each.cell}, {each.ratio:.3f}")
    if server or model or weights:
        return
    note = "A quick subset of the cells" if quick else "All cells"
    note += ", simulated on virtual servers, with synthetic routing: `python -m benchmarks.legacy_servers"
    note += f"{' --quick' if quick else ''}`."
    try:
        plots = draw(outcomes, PLOTS)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        progress(MISSING)
        plots = {}
    if not quick:
        write_result("legacy_servers", result_of(checks, outcomes, goals), RESULTS)
    write_report(generated(checks, outcomes, goals, note, plots))


def _show(outcomes: Sequence[Outcome]) -> None:
    """A table of every cell, short."""
    names = [each.name for each in CONTESTANTS]
    shown = Table("cell", *names, "bound", title="tokens/s, simulated, routing synthetic")
    for each in outcomes:
        cell = each.cell
        what = f"{cell.server} {cell.model} {cell.weights} b{cell.batch} {cell.share:.0%}"
        shown.add_row(what, *(f"{each.speeds[name]:.4g}" for name in names), f"{each.bound.tokens_per_second:.4g}")
    wide_console().print(shown)


if __name__ == "__main__":
    typer.run(main)
