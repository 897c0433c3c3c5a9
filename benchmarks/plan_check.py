"""Does `moe-offload plan` know how fast a model decodes on this CPU?

Three shapes, a few layers deep, in three weight formats: the prediction that `plan` makes from the configuration and
this machine's rates, against what `bench` measures of the loaded model. Rates are measured anew in every round, right
before the model is. Where neighbours come and go, what memory gives doubles and halves within seconds, so both sides
measure its read limit, and a round counts where the two agree; the error of a cell is the median of its rounds'. All
rounds are in the result. Goal: within 20 % in each cell.
"""

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import transformers
import typer
from rich.table import Table

import moe_offload
from benchmarks.deepseek_checkpoint import make_deepseek
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import WORK, progress, wide_console, write_result
from moe_offload.bench_model import Test, measure
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.options import Weights
from moe_offload.plan_calibration import host_rates
from moe_offload.plan_placement import Budgets, place
from moe_offload.plan_predict import Case, predict
from moe_offload.plan_sizes import ModelSizes, PlannedModel

GOAL = 0.20
FORMATS: tuple[Weights, ...] = ("bf16", "int8", "int4")
LAYERS = {"qwen3": 4, "mixtral": 4, "deepseek": 4}
PROMPT_TOKENS, NEW_TOKENS = 64, 32
AGREE = 0.15  # relative difference of the read limits of a round that counts
MOST_ROUNDS = 8
MOST_SECONDS = 900.0
_PLENTY = 1 << 50


def predicted_seconds(
    sizes: ModelSizes, threads: int, folder: Path, context: int
) -> tuple[float, float, dict[str, float]]:
    """Of a decode step, with rates measured now; what memory gave then, and what the step is made of."""
    host = host_rates(sizes, threads, measure=True, folder=folder)
    where = place(sizes, Budgets(0, _PLENTY), context, 1, 0)
    found = predict(sizes, where, host, 1.0, None, Case(1, context, 1))
    return found.seconds, host.read_gbs, found.parts


def check_cell(
    name: str, checkpoint: Path, weights: Weights, rounds: int, new_tokens: int, work: Path, most: int = MOST_ROUNDS
) -> dict[str, Any]:
    """Predict and measure by turns, until so many rounds count."""
    sizes = PlannedModel(checkpoint).sizes(weights)
    loaded: Any = moe_offload.load(checkpoint, weights=weights, device="cpu", pack_dir=work / "packs")
    made: list[dict[str, Any]] = []
    try:
        threads = loaded.offload.threads
        test = Test(PROMPT_TOKENS, new_tokens)
        measure(loaded, None, [test], 1, warm_ups=1, limit_mib=0)
        while sum(each["counts"] for each in made) < rounds and len(made) < max(most, rounds):
            seconds, before, parts = predicted_seconds(sizes, threads, work / "plan", PROMPT_TOKENS + new_tokens // 2)
            (found,) = measure(loaded, None, [test], 3, warm_ups=1, limit_mib=256)
            during = found.limits.cpu
            assert found.step_seconds is not None and during is not None
            made.append(
                {
                    "predicted_seconds": seconds, "measured_seconds": found.step_seconds, "read_gbs": before,
                    "read_gbs_during": during, "counts": abs(during / before - 1) <= AGREE, "parts": parts,
                }
            )  # fmt: skip
    finally:
        loaded.offload.close()
    counted = [each for each in made if each["counts"]]
    used = counted or made
    return {
        "shape": name, "weights": weights, "layers": sizes.num_layers, "threads": threads, "step": sizes.step,
        "predicted_tokens_per_s": 1 / median(each["predicted_seconds"] for each in used),
        "measured_tokens_per_s": 1 / median(each["measured_seconds"] for each in used),
        "error": median(each["measured_seconds"] / each["predicted_seconds"] for each in used) - 1,
        "error_of_all_rounds": median(each["measured_seconds"] / each["predicted_seconds"] for each in made) - 1,
        "counted": len(counted), "rounds": made,
    }  # fmt: skip


def main(
    work_dir: Annotated[Path, typer.Option(help="Where checkpoints and packs are made (and found again).")] = WORK,
    rounds: Annotated[int, typer.Option(min=1, help="That count, of a cell.")] = 3,
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LAYERS)}; all if not given.")] = None,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare predictions with measurements, cell by cell."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    work_dir.mkdir(parents=True, exist_ok=True)
    wanted = {name: LAYERS[name] for name in shape or LAYERS} if not smoke else {"small": 2}
    started, cells = time.perf_counter(), []
    heads = "shape", "weights", "predicted t/s", "measured t/s", "error", "all rounds", "count"
    table = Table(*heads, title=f"decode, {default_threads()} threads")
    for name, layers in wanted.items():
        progress(f"checkpoint {name}")
        checkpoint = make_deepseek(work_dir, layers) if name == "deepseek" else make_checkpoint(work_dir, name, layers)
        for weights in FORMATS[-1:] if smoke else FORMATS:
            if time.perf_counter() - started > MOST_SECONDS:
                progress(f"{name}, {weights}: left out, {MOST_SECONDS:.0f} s are over")
                continue
            progress(f"{name}, {weights}")
            if smoke:
                cell = check_cell(name, checkpoint, weights, 1, 8, work_dir, 1)
            else:
                cell = check_cell(name, checkpoint, weights, rounds, NEW_TOKENS, work_dir)
            cells.append(cell)
            progress(f"{name}, {weights}: {cell['error']:+.0%}")
            table.add_row(
                name, weights, f"{cell['predicted_tokens_per_s']:.1f}", f"{cell['measured_tokens_per_s']:.1f}",
                f"{cell['error']:+.0%}", f"{cell['error_of_all_rounds']:+.0%}",
                f"{cell['counted']} of {len(cell['rounds'])}",
            )  # fmt: skip
    wide_console().print(table)
    worst = max(abs(cell["error"]) for cell in cells)
    verdict = "not judged, a smoke run" if smoke else "met" if worst <= GOAL else "missed"
    wide_console().print(f"largest error {worst:.0%}, goal {GOAL:.0%}: {verdict}")
    if not smoke and not shape:
        write_result(
            "plan_check",
            {
                "question": "decode seconds that plan predicts against those that bench measures, CPU alone",
                "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": rounds, "goal": GOAL,
                "agree": AGREE, "largest_error": worst, "cells": cells,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
