"""How fast does a model decode that is several times as large as the memory allowed: the engine mapping its experts
from disk, against transformers with accelerate's disk offload?

Every engine is a process in a control group of its own. It loads without a limit (accelerate needs more than the whole
model for that, and loading is not the question), then its files are dropped from the page cache, the group is limited,
and the engines generate in turns. Where no group can be made, the budget is policy only: accelerate is told it, the
page cache is whatever the system gives, and the output says so.
"""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.control_group import ControlGroup, evict
from benchmarks.peers.client import Worker
from benchmarks.peers.turns import Test
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import WORK, progress, spread, write_result
from moe_offload.cpu_kernels import default_threads

OURS, ACCELERATE = "moe_offload", "accelerate"
_BODY_SHARE = 0.5  # of the budget for accelerate's resident weights: Python and torch take 0.3 GB, page cache the rest


@dataclass(frozen=True, slots=True)
class Contender:
    """A process to be measured: its worker, the options it opens with, and its group if there is one."""

    name: str
    engine: str
    options: dict[str, Any]
    files: Path


def contenders(folder: Path, work_dir: Path, budget: int, threads: int) -> tuple[Contender, ...]:
    """moe_offload with the weights as stored and as int4, and accelerate."""
    offload = work_dir / "offload"
    shutil.rmtree(offload, ignore_errors=True)
    common = {"folder": str(folder), "threads": threads}
    placement = {"offload_folder": str(offload), "cpu_bytes": int(budget * _BODY_SHARE)}
    return (
        Contender(f"{OURS} bf16", OURS, {**common, "weights": "bf16", "dense": "stored"}, folder),
        Contender(f"{OURS} int4", OURS, {**common, "weights": "int4", "dense": "int8"}, work_dir / "packs"),
        Contender(f"transformers and {ACCELERATE}, bf16", ACCELERATE, {**common, **placement}, offload),
    )


def open_all(
    stack: ExitStack, all_contenders: tuple[Contender, ...], budget: int
) -> tuple[dict[str, Worker], dict[str, ControlGroup], str]:
    """Workers with their models, limited; their groups; and why not, where they are not limited."""
    workers: dict[str, Worker] = {}
    groups: dict[str, ControlGroup] = {}
    unlimited = ""
    for number, one in enumerate(all_contenders):
        progress(f"opening {one.name}")
        try:
            groups[one.name] = stack.enter_context(ControlGroup(f"moe-offload-budget-{number}"))
        except OSError as error:
            unlimited = str(error)
        worker = workers[one.name] = stack.enter_context(Worker(one.engine))
        if one.name in groups:
            groups[one.name].add(worker.pid)
        worker.call("open", **one.options)
    for one in all_contenders:
        evict(one.files)
        if one.name in groups:
            groups[one.name].limit(budget)
            groups[one.name].reset_peak()
    return workers, groups, unlimited


def main(
    work_dir: Annotated[Path, typer.Option(help="Where the random checkpoint is made (and found again).")] = WORK,
    layers: Annotated[int, typer.Option(min=1, help="Layers of Qwen3 shape, 1.2 GB of experts each.")] = 4,
    budget_gb: Annotated[float, typer.Option(help="Memory of each process, page cache included, in 1e9 bytes.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(min=3)] = 6,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare decoding under a memory budget."""
    threads, shape = default_threads(), "qwen3"
    if smoke:
        shape, layers, rounds, new_tokens, threads = "small", 2, 1, 4, 1
    folder, budget = make_checkpoint(work_dir, shape, layers, progress), int(budget_gb * 1e9)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    all_contenders = contenders(folder, work_dir, budget, threads)
    rates: dict[str, list[float]] = {one.name: [] for one in all_contenders}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, all_contenders[-1].files, ignore_errors=True)
        workers, groups, unlimited = open_all(stack, all_contenders, budget)
        for number in range(rounds + 1):
            for name, worker in workers.items():
                progress(f"round {number} of {rounds}: {name}")
                test = Test("decode", 8, 1, new_tokens if number else 3)
                steps = worker.call("decode", prompts=test.prompts(number), new_tokens=test.new)
                if number:  # round 0 brings in what a process needs only once
                    rates[name].append(len(steps) / sum(steps))  # a mean: a step that waits for the disk counts
        peaks = {name: group.peak() for name, group in groups.items()}
    theirs = rates[all_contenders[-1].name]
    ratios = {
        name: spread([one / other for one, other in zip(found, theirs, strict=True)])
        for name, found in rates.items()
        if found is not theirs
    }
    table = Table("", "tokens/s", "times accelerate's", title=f"{size / 1e9:.1f} GB of weights in {budget_gb:g} GB")
    for name, found in rates.items():
        ratio = f"{ratios[name]['median']:.1f}" if name in ratios else ""
        table.add_row(name, f"{spread(found)['median']:.2f}", ratio)
    console = Console()
    console.print(table)
    if unlimited:
        console.print(f"The budget was NOT enforced, only told to accelerate: no control group ({unlimited}).")
    else:
        console.print("The budget was enforced by control groups, page cache included.")
    if not smoke:
        write_result(
            "memory_budget",
            {
                "question": "decode with a memory budget below the model's size, against accelerate's disk offload",
                "layers": layers, "weight_bytes": size, "budget_bytes": budget, "enforced": not unlimited,
                "rounds": rounds, "new_tokens": new_tokens, "threads": threads, "peak_bytes": peaks,
                "tokens_per_s": {name: spread(found) for name, found in rates.items()}, "ratios": ratios,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
