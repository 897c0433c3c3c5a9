"""How long do the kernels take to compile at the first use on a machine, and to load at every later start?

    python -m benchmarks.first_use [--tier avx2] [--smoke]

Each run is a process of its own that loads a model with Qwen3-30B-A3B's attention and few experts, prefills and decodes
some tokens: the first with an empty kernel cache, later ones with what it left. Every kernel reports its own time; the
process's whole time is told beside it, most of which is Python importing torch and transformers.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import RESULTS, WORK, machine, progress, spread, write_result

TIERS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
}
FORMATS = ("int4", "auto")  # packed experts and linears; bf16 in place


class Kernels(logging.Handler):
    """What the kernel cache reports: (compiled or loaded, kernel, seconds)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 3:
            verb, name, seconds = record.args
            self.found.append((str(verb), str(name), float(str(seconds))))


def start(folder: str, weights: Any, packs: str) -> dict[str, Any]:
    """Load, prefill, decode; what was compiled and loaded for it."""
    import torch
    import transformers

    import moe_offload

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    kernels, logger = Kernels(), logging.getLogger("moe_offload.cpu_kernels.kernel_cache")
    logger.addHandler(kernels)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    began = time.perf_counter()
    model = moe_offload.load(folder, weights=weights, pack_dir=Path(packs))
    for rows in (1, 2):
        ids = torch.full((rows, 40), 5)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return {
        "run": time.perf_counter() - began,
        **{verb: sum(s for v, _, s in kernels.found if v == verb) for verb in ("compiled", "loaded")},
        "kernels": [(verb, name, round(seconds, 3)) for verb, name, seconds in kernels.found],
    }


def in_a_process(folder: Path, weights: str, packs: Path, cache: str, tier: str) -> dict[str, Any]:
    """`start` in a process of its own."""
    code = (
        "import json, sys; from benchmarks.first_use import start; print(json.dumps(start(*sys.argv[1:])))",
        str(folder), weights, str(packs),
    )  # fmt: skip
    environment = os.environ | TIERS[tier] | {"NUMBA_CACHE_DIR": cache}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *code], env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"process": time.perf_counter() - began}


def measure(folder: Path, weights: str, packs: Path, tier: str, rounds: int) -> dict[str, Any]:
    """Rounds of a first start and a later one."""
    first, later = [], []
    with tempfile.TemporaryDirectory() as ready:  # the pack is made before anything is timed
        in_a_process(folder, weights, packs, ready, "native")
    for number in range(rounds):
        progress(f"{weights}, {tier}: round {number + 1} of {rounds}")
        with tempfile.TemporaryDirectory() as cache:
            first.append(in_a_process(folder, weights, packs, cache, tier))
            later.append(in_a_process(folder, weights, packs, cache, tier))
    assert all(one["compiled"] == 0 for one in later)
    return {
        "compile_s": spread([one["compiled"] for one in first]),
        "load_s": spread([one["loaded"] for one in later]),
        **{
            f"{when}_{what}_s": spread([one[what] for one in runs])
            for when, runs in (("first", first), ("later", later))
            for what in ("run", "process")
        },
        "kernels": {name: seconds for _, name, seconds in first[-1]["kernels"]},
    }


def main(
    work_dir: Annotated[Path, typer.Option(help="Where checkpoint and packs are made (and found again).")] = WORK,
    tier: Annotated[str, typer.Option(help=f"One of {', '.join(TIERS)}.")] = "native",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    smoke: Annotated[bool, typer.Option(help="One format, one round; writes nothing.")] = False,
) -> None:
    """Time the kernels' compilation at first use, and their loading later."""
    if tier not in TIERS:
        raise typer.BadParameter(f"tiers: {', '.join(TIERS)}")
    folder = make_checkpoint(work_dir, "thin", 2, progress)
    formats, rounds = (FORMATS[:1], 1) if smoke else (FORMATS, rounds)
    found = {name: measure(folder, name, work_dir / "packs", tier, rounds) for name in formats}
    table = Table("weights", "kernels", "compile s", "load s", "first run s", "later run s", title=f"tier {tier}")
    for name, one in found.items():
        seconds = [one[key]["median"] for key in ("compile_s", "load_s", "first_run_s", "later_run_s")]
        table.add_row(name, str(len(one["kernels"])), *(f"{each:.2f}" for each in seconds))
    Console().print(table)
    slowest = sorted(found[formats[0]]["kernels"].items(), key=lambda item: -item[1])[:5]
    Console().print("slowest:", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest))
    if not smoke:
        _save(tier, found, rounds)


def _save(tier: str, found: dict[str, Any], rounds: int) -> None:
    """Write this tier; those that the same machine and versions wrote before stay beside it."""
    try:
        before = json.loads((RESULTS / "first_use.json").read_text())
    except FileNotFoundError:
        before = {"machine": None}
    kept = before["tiers"] if before["machine"] == machine() else {}
    question = "seconds to compile all kernels of a Qwen3 model at first use, and to load them at a later start"
    write_result("first_use", {"question": question, "rounds": rounds, "tiers": {**kept, tier: found}})


if __name__ == "__main__":
    typer.run(main)
