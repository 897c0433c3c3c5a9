"""How fast are moe_offload, llama.cpp and transformers on the same random weights, prompt and decoding, in one run?

    python -m benchmarks.peers [--llama-python PATH] [--shape mixtral] [--rows int4] [--budget-gb 1] [--smoke]

Rows pair formats of one size: bf16 with BF16, int8 with Q8_0, int4 with Q4_0 (all matrices of the GGUF in that type);
transformers stays bf16, with each of its experts implementations. Each row first shows that all compute the
checkpoint's model (agreement.py), then times prompts of 128 and 512 tokens, 64 tokens after a prompt, and batches of 1
to 32 sequences. Then all decode within a memory budget below the model's size, accelerate's disk offload among them
(budget.py). llama.cpp takes part where llama-cpp-python and gguf are installed. One table, ratios from one run.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.table import Table

from benchmarks.peers.budget import Budget, decode_within
from benchmarks.peers.comparison import OURS, RIVALS, ROWS, Bench, DisagreementError
from benchmarks.peers.turns import FULL, SMOKE, Test, summary
from benchmarks.random_checkpoint import SHAPES, make_checkpoint
from benchmarks.reporting import RESULTS, WORK, commit, machine, progress, wide_console, write_result
from moe_offload.cpu_kernels import ThreadTeam, default_threads
from moe_offload.cpu_kernels.bandwidth import ReadLimit


def main(
    work_dir: Annotated[Path, typer.Option(help="Where checkpoint, GGUF files and packs are made, and found.")] = WORK,
    llama_python: Annotated[str, typer.Option(help="Interpreter with llama-cpp-python and gguf.")] = sys.executable,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3",
    layers: Annotated[int, typer.Option(min=1, help="As many as three engines have memory for.")] = 4,
    rows: Annotated[list[str] | None, typer.Option(help="bf16, int8, int4; all if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0: physical cores")] = 0,
    budget_gb: Annotated[float, typer.Option(min=0, help="Memory of a process, in 1e9 bytes; 0: no such test.")] = 1.0,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare moe_offload with llama.cpp, transformers and accelerate, end to end."""
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
    notes = [
        f"{name} without {engine}: {text}" for name, one in found.items() for engine, text in one["missing"].items()
    ]
    if budget_gb:
        notes += add_budget(found, Budget(int(budget_gb * 1e9)), bench, rounds)
    console = wide_console()
    console.print(table(f"{shape}, {layers} layers, {threads} threads", found, limits))
    for text in dict.fromkeys(notes):
        console.print(text, soft_wrap=True, markup=False)
    if not smoke:
        common = {"layers": layers, "rounds": rounds, "threads": threads, "bf16_noise": bench.noise, "commit": commit()}
        save(
            shape, layers, {name: {**common, "read_limit_gb_per_s": limits[name], **one} for name, one in found.items()}
        )


def add_budget(found: dict[str, Any], budget: Budget, bench: Bench, rounds: int) -> list[str]:
    """Put each row's test within the budget beside its others. Returns what is to be said of it."""
    rows = [row for row in ROWS if row.name in found]
    done = decode_within(budget, bench.folder, rows, rounds, bench.threads, bench.llama_python)
    notes = []
    for row in rows:
        one = found[row.name]
        one["tests"].update(summary(done.series[row.name], OURS))
        one["budget"] = {"budget_bytes": budget.nbytes, "enforced": not done.unlimited, "peaks": done.peaks}
        one["missing"] = {**done.missing[row.name], **one["missing"]}
        notes += [f"{row.name} without {engine}: {text}" for engine, text in one["missing"].items()]
    if done.unlimited:
        notes.append(f"{budget.name}: NOT enforced, only told to accelerate: no control group ({done.unlimited})")
    return notes


def save(shape: str, layers: int, rows: dict[str, Any]) -> None:
    """Write these rows; others that this machine and these versions wrote before stay beside them."""
    name = f"peers_{shape}_{layers}"
    try:
        before = json.loads((RESULTS / f"{name}.json").read_text())
    except FileNotFoundError:
        before = {"machine": None}
    kept = before["rows"] if before["machine"] == machine() else {}
    question = "prompt and decode speed against llama.cpp and transformers, same weights; each row is one run"
    write_result(name, {"question": question, "shape": shape, "rows": {**kept, **rows}})


def table(title: str, found: dict[str, Any], limits: dict[str, float]) -> Table:
    """Median tokens/s of each engine, and how many times as fast moe_offload is as the others."""
    tests = [one for row in found.values() for one in row["tests"].values()]
    others = [name for name in RIVALS if any(name in one["tokens_per_s"] for one in tests)]
    made = Table("", "", OURS, *others, title=f"tokens/s, and how many times as fast {OURS} is; {title}")
    for row, one in found.items():
        about = f"{row} / {one['gguf']}\nread limit {limits[row]:.1f} GB/s"
        for test, figures in one["tests"].items():
            made.add_row(about, test, *(_cell(figures, name) for name in (OURS, *others)))
            about = ""
        made.add_section()
    return made


def _cell(figures: dict[str, Any], name: str) -> str:
    """Empty where an engine does not run this test."""
    rate, ratio = figures["tokens_per_s"].get(name), figures.get("ratio_to", {}).get(name)
    if rate is None:
        return ""
    return f"{rate['median']:.1f}" + (f" ({ratio['median']:.2f}x)" if ratio else "")


if __name__ == "__main__":
    typer.run(main)
