"""What does loading cost: seconds and private memory, for the engine and for transformers, on the same checkpoint
in one run?

Each load happens in a process of its own, alternating, so that one's memory and warm caches do not favour the
other; imports and kernel compilation are outside of the timed part. The files are in the page cache (the first,
untimed round reads them).
"""

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import WORK, progress, resident, spread, write_result


def load_once(folder: Path, ours: bool) -> dict[str, float]:
    """Load in this process; seconds, and growth of private and file-backed memory."""
    import torch
    import transformers

    import moe_offload

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as tiny:
        # Imports, first-use initialisation and the kernels, on a model of the same kind.
        small = make_checkpoint(Path(tiny), "small", 1)
        moe_offload.load(small).offload.close()
        transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    before = resident()
    started = time.perf_counter()
    if ours:
        model = moe_offload.load(folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    after = resident()
    result = {
        "seconds": seconds,
        "anon": after["RssAnon"] - before["RssAnon"],
        "file": after["RssFile"] - before["RssFile"],
    }
    if ours:
        spec = model.offload.spec
        result["expert_bytes"] = spec.expert_bytes("bf16")
        result["other_bytes"] = spec.non_expert_params * 2
    return result


def main(
    work_dir: Annotated[Path, typer.Option(help="Where the random checkpoint is made (and found again).")] = WORK,
    layers: Annotated[int, typer.Option(min=1, help="Layers of Qwen3 shape, 1.2 GB of experts each.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare loading by moe_offload and by transformers."""
    shape, rounds = ("small", 1) if smoke else ("qwen3", rounds)
    folder = make_checkpoint(work_dir, shape, 2 if smoke else layers, progress)
    series: dict[str, list[dict[str, float]]] = {"moe_offload": [], "transformers": []}
    context = multiprocessing.get_context("spawn")
    for number in range(rounds + 1):
        for name, found in series.items():
            progress(f"round {number} of {rounds}: {name}")
            with context.Pool(1) as pool:
                one = pool.apply(load_once, (folder, name == "moe_offload"))
            if number or smoke:  # round 0 warms the page cache
                found.append(one)
    experts = series["moe_offload"][0]["expert_bytes"]
    rows: dict[str, Any] = {
        name: {key: spread([one[key] for one in found]) for key in ("seconds", "anon", "file")}
        for name, found in series.items()
    }
    table = Table(
        "", "load s", "private MB", "share of the experts' bytes", title=f"{experts / 1e9:.2f} GB of experts, bf16"
    )
    for name, row in rows.items():
        anon = row["anon"]["median"]
        table.add_row(name, f"{row['seconds']['median']:.2f}", f"{anon / 1e6:.0f}", f"{anon / experts:.1%}")
    Console().print(table)
    ratio = rows["moe_offload"]["seconds"]["median"] / rows["transformers"]["seconds"]["median"]
    Console().print(f"load time: {ratio:.1%} of transformers'")
    if not smoke:
        write_result(
            "loading",
            {
                "question": "load time and private memory against transformers, alternating processes, page cache warm",
                "shape": shape, "layers": layers, "rounds": rounds, "expert_bytes": experts,
                "other_bytes": series["moe_offload"][0]["other_bytes"], "load_time_ratio": ratio, **rows,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
