"""How fast are moe_offload, llama.cpp and transformers on the same random weights, prompt and decoding, in one run?

    python -m benchmarks.peers [--llama-python PATH] [--shape mixtral] [--rows int4] [--smoke]

Rows pair formats of one size: bf16 with BF16, int8 with Q8_0, int4 with Q4_0 (all matrices of the GGUF in that type);
transformers stays bf16. Each row first shows that both compute the checkpoint's model (agreement.py), then times
prompts of 128 and 512 tokens, 64 tokens after a prompt, and batches of 1 to 32 sequences.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.comparison import LLAMA, OURS, ROWS, TRANSFORMERS, Bench, DisagreementError
from benchmarks.peers.turns import FULL, SMOKE, Test
from benchmarks.random_checkpoint import SHAPES, make_checkpoint
from benchmarks.reporting import RESULTS, WORK, machine, progress, write_result
from moe_offload.cpu_kernels import ThreadTeam, default_threads
from moe_offload.cpu_kernels.bandwidth import ReadLimit


def main(
    work_dir: Annotated[Path, typer.Option(help="Where checkpoint, GGUF files and packs are made, and found.")] = WORK,
    llama_python: Annotated[str, typer.Option(help="Interpreter with llama-cpp-python and gguf.")] = sys.executable,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3",
    layers: Annotated[int, typer.Option(min=1)] = 6,
    rows: Annotated[list[str] | None, typer.Option(help="bf16, int8, int4; all if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0: physical cores")] = 0,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare moe_offload with llama.cpp and transformers, end to end."""
    chosen = [row for row in ROWS if not rows or row.name in rows]
    if shape not in SHAPES or len(chosen) < len(set(rows or ())):
        raise typer.BadParameter(f"shapes: {', '.join(SHAPES)}; rows: {', '.join(row.name for row in ROWS)}")
    transformers.logging.set_verbosity_error()
    threads = threads or default_threads()
    tests: tuple[Test, ...] = FULL
    if smoke:
        # One thread: on a machine that does other things, spinning threads of three engines take minutes.
        shape, layers, rounds, tests, threads = "small", 2, 1, SMOKE, 1
        chosen = chosen if rows else [ROWS[-1]]
    folder = make_checkpoint(work_dir, shape, layers, progress)
    bench = Bench.prepare(folder, threads, llama_python, Test("check", 32, sequences=4).prompts(seed=99))
    found, limits = {}, {}
    with ThreadTeam(threads) as team:
        for row in chosen:
            with ReadLimit(team, 128 if smoke else 512) as limit:
                try:
                    found[row.name] = bench.run(row, tests, rounds, limit)
                except DisagreementError as error:
                    progress(str(error))
                    raise typer.Exit(1) from error
                limits[row.name] = limit.gb_per_s()
    console = Console()
    for name, one in found.items():
        console.print(table(f"{name} / {one['gguf']}, read limit {limits[name]:.1f} GB/s", one["tests"]))
        for engine, text in one["missing"].items():
            console.print(f"without {engine}: {text}")
    if not smoke:
        common = {"layers": layers, "rounds": rounds, "threads": threads, "bf16_noise": bench.noise}
        save(shape, {name: {**common, "read_limit_gb_per_s": limits[name], **one} for name, one in found.items()})


def save(shape: str, rows: dict[str, Any]) -> None:
    """Write these rows; others that this machine and these versions wrote before stay beside them."""
    name = "peers" if shape == "qwen3" else f"peers_{shape}"
    try:
        before = json.loads((RESULTS / f"{name}.json").read_text())
    except FileNotFoundError:
        before = {"machine": None}
    kept = before["rows"] if before["machine"] == machine() else {}
    question = "prompt and decode speed against llama.cpp and transformers, same weights; each row is one run"
    write_result(name, {"question": question, "shape": shape, "rows": {**kept, **rows}})


def table(title: str, tests: dict[str, Any]) -> Table:
    """Median tokens/s of each engine, and how many times as fast moe_offload is as the others."""
    first = next(iter(tests.values()))["tokens_per_s"]
    others = [name for name in (LLAMA, TRANSFORMERS) if name in first]
    made = Table("", OURS, *others, title=f"tokens/s, and how many times as fast {OURS} is; {title}")
    for name, one in tests.items():
        rates, ratios = one["tokens_per_s"], one["ratio_to"]
        cells = (f"{rates[other]['median']:.1f} ({ratios[other]['median']:.2f}x)" for other in others)
        made.add_row(name, f"{rates[OURS]['median']:.1f}", *cells)
    return made


if __name__ == "__main__":
    typer.run(main)
