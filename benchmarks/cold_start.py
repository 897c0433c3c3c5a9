"""How long from nothing in memory to the first token, for the engine and for transformers, on the same checkpoint?

Before each run the checkpoint's pages are dropped from the page cache, so that every byte comes from the disk. Each
run is a process of its own, alternating; imports and kernel compilation are outside of the timed part. The engine
reads only the experts that the prompt is routed to, transformers the whole file.
"""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import WORK, progress, spread, write_result


def evict(folder: Path) -> None:
    """Drop the files' clean pages from the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def start_once(folder: Path, ours: bool, prompt_tokens: int) -> dict[str, float]:
    """Seconds to load and to the first token, from a cold disk."""
    import torch
    import transformers

    import moe_offload

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as tiny:
        small = make_checkpoint(Path(tiny), "small", 1)
        moe_offload.load(small).offload.close()
        transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    ids = torch.randint(3, 8000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    evict(folder)
    started = time.perf_counter()
    if ours:
        model = moe_offload.load(folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return {"load": loaded - started, "first_token": time.perf_counter() - started}


def main(
    work_dir: Annotated[Path, typer.Option(help="Where the random checkpoint is made (and found again).")] = WORK,
    layers: Annotated[int, typer.Option(min=1, help="Layers of Qwen3 shape, 1.2 GB of experts each.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 8,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare cold starts of moe_offload and transformers."""
    shape, rounds = ("small", 1) if smoke else ("qwen3", rounds)
    folder = make_checkpoint(work_dir, shape, 2 if smoke else layers, progress)
    os.sync()  # dirty pages cannot be dropped
    series: dict[str, list[dict[str, float]]] = {"moe_offload": [], "transformers": []}
    context = multiprocessing.get_context("spawn")
    for number in range(rounds):
        for name, found in series.items():
            progress(f"round {number + 1} of {rounds}: {name}")
            with context.Pool(1) as pool:
                found.append(pool.apply(start_once, (folder, name == "moe_offload", prompt_tokens)))
    table = Table("", "load s", "load and first token s", title=f"cold disk, {prompt_tokens} prompt tokens")
    for name, found in series.items():
        table.add_row(name, *(f"{median(one[key] for one in found):.2f}" for key in ("load", "first_token")))
    Console().print(table)
    if not smoke:
        write_result(
            "cold_start",
            {
                "question": "load and first token from a cold page cache against transformers, alternating processes",
                "shape": shape,
                "layers": layers,
                "rounds": rounds,
                "prompt_tokens": prompt_tokens,
                **{
                    name: {key: spread([one[key] for one in found]) for key in ("load", "first_token")}
                    for name, found in series.items()
                },
            },
        )


if __name__ == "__main__":
    typer.run(main)
