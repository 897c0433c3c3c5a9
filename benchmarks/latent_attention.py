"""How long a decode step of DeepSeek-V2-Lite's shape takes by context: over latents, and with them expanded.

Random weights, four layers of the real shape, experts in int4. The KV cache is filled with noise up to each context, so
no prompt has to be computed. Both ways run in one process by turns; a step is the model's forward on one token.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table
from transformers import DynamicCache

import moe_offload
from benchmarks.deepseek_checkpoint import make_deepseek
from benchmarks.reporting import WORK, progress, spread, wide_console, write_result
from moe_offload import latent_attention

LAYERS = 4
CONTEXTS = (128, 1024, 4096, 16384)
ROUNDS = 5
NAMES = {"latents": "moe_offload", "expanded": "transformers"}  # in the result
SMALL = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128, n_routed_experts=8, kv_lora_rank=64)
_SLOW = 4096  # from so many positions on one step a round is enough: expanded, it takes hundreds of milliseconds


def filled_cache(model: Any, context: int) -> DynamicCache:
    """As after a prompt of so many tokens: [1, 1, context, size] of latents and of rotated keys in each layer."""
    config, cache = model.config, DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):
        latent, rope = (
            torch.randn(1, 1, context, size).to(model.dtype) for size in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(latent, rope, layer)
    return cache


@torch.no_grad()
def step_seconds(model: Any, context: int, steps: int) -> list[float]:
    """Of steps behind so many positions, the first of which warms up."""
    cache, token, times = filled_cache(model, context), torch.ones(1, 1, dtype=torch.long), []
    for _ in range(1 + steps):
        began = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - began)
    return times[1:]


def main(
    work_dir: Annotated[Path, typer.Option(help="Where the checkpoint is made (and found again).")] = WORK,
    smoke: Annotated[bool, typer.Option(help="A quick run on a short context; writes nothing.")] = False,
) -> None:
    """Compare, context by context."""
    transformers.utils.logging.disable_progress_bar()
    work_dir.mkdir(parents=True, exist_ok=True)
    progress("checkpoint")
    checkpoint = make_deepseek(work_dir, 2, "small-deepseek", **SMALL) if smoke else make_deepseek(work_dir, LAYERS)
    model: Any = moe_offload.load(checkpoint, weights="int4", device="cpu", pack_dir=work_dir / "packs")
    layers = model.config.num_hidden_layers
    table = Table(
        "context", "latents, ms a layer", "expanded, ms a layer", "times", title=f"decode step, {layers} layers"
    )
    found = []
    try:
        for context in CONTEXTS[:1] if smoke else CONTEXTS:
            times: dict[str, list[float]] = {"latents": [], "expanded": []}
            for _ in range(1 if smoke else ROUNDS):
                for way, taken in times.items():
                    latent_attention.detach(model)
                    if way == "latents" and not latent_attention.attach(model, model.offload.team):
                        raise RuntimeError("this transformers caches keys and values, not latents: nothing to compare")
                    taken += step_seconds(model, context, 1 if context >= _SLOW else 4)
            ours, theirs = (statistics.median(each) for each in times.values())
            progress(f"{context}: {ours * 1e3:.1f} and {theirs * 1e3:.1f} ms a step")
            table.add_row(
                str(context), f"{1e3 * ours / layers:.2f}", f"{1e3 * theirs / layers:.2f}", f"{theirs / ours:.2f}x"
            )
            spreads = {name: {"seconds": spread(times[way])} for way, name in NAMES.items()}
            found.append({"context": context, "ratio_to": {"transformers": theirs / ours}, **spreads})
    finally:
        threads = model.offload.threads
        model.offload.close()
    wide_console().print(table)
    if not smoke:
        write_result(
            "latent_attention",
            {
                "question": "seconds of a decode step by context, latent attention over latents and expanded",
                "shape": "DeepSeek-V2-Lite", "layers": layers, "weights": "int4", "threads": threads, "cells": found,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
