"""A model on two devices, with room for a quarter, half and three quarters of its experts on the card: how fast is each
policy, and are the tokens those of the CPU alone?

Random weights of Qwen3-30B-A3B's layer shape, a few layers deep. Where there is an NVIDIA card it is measured. Without
one a virtual server computes the same numbers on the CPU and models the times: the figures are then simulated, and the
answer is about the tokens, budgets and the machinery, not about speed (`python -m benchmarks.servers` has the real
shapes). Random weights route evenly, so caches find less than they would with a real model.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import moe_offload
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import WORK, progress, write_result
from moe_offload.transfer.find_device import detect_cuda, parse_device, resolve_device

SHARES = (0.25, 0.5, 0.75)
POLICIES = ("ours", "static", "lru", "qstar")
VIRTUAL = "virtual:gtx1080ti"


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens, [B, new_tokens]."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    tokens: torch.Tensor = found[:, ids.shape[1] :]
    return tokens


def run(folder: Path, device: str, memory: int, policy: str, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """One policy: a warm-up generation, then one that is measured on the accelerator's clock."""
    model = moe_offload.load(folder, device=device, gpu_memory=memory, policy=policy, weights="bf16")
    with model.offload as engine:
        generate(model, ids, new_tokens)
        before = engine.stats()
        tokens = generate(model, ids, new_tokens)
        after = engine.stats()
    copied = after.copied_on_demand + after.prefetched - before.copied_on_demand - before.prefetched
    steps = sum(after.seconds.values()) - sum(before.seconds.values())
    return {
        "device": after.device,
        "simulated": after.simulated,
        "tokens_per_s_with_prefill": tokens.numel() / steps,
        "share_of_experts_in_slots": after.slots / sum(1 for _ in after.layers) / engine.spec.layers[0].num_experts,
        "hit_rate": after.hit_rate,
        "copied_gb": copied / 1e9,
        "link_gb_per_s": after.link_gb_per_s,
        "overlap": after.overlap,
        "peak_within_budget": after.memory_peak <= memory,
        "crossover": after.crossover,
        "tokens": tokens,
    }


def main(
    work_dir: Annotated[Path, typer.Option(help="Where the random checkpoint is made (and found again).")] = WORK,
    device: Annotated[str, typer.Option(help="As of moe-offload's --device; by default a card, or a simulation.")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Layers of Qwen3 shape, 1.2 GB of experts each.")] = 4,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=3)] = 12,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare policies on a card, or on a simulated one."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if smoke:
        prompt_tokens, new_tokens, batch = 8, 3, 2
    device = device or str(resolve_device(parse_device("auto"), detect_cuda()))
    device = VIRTUAL if device == "cpu" else device
    folder = make_checkpoint(work_dir, "small" if smoke else "qwen3", 2 if smoke else layers, progress)
    ids = torch.randint(3, 8000, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    progress("the CPU alone")
    model = moe_offload.load(folder, device="cpu", fused_decode=False, weights="bf16")
    expected = generate(model, ids, new_tokens)
    experts = model.offload.spec.expert_bytes("bf16")
    others = sum(p.numel() * p.itemsize for p in model.parameters())
    model.offload.close()

    table = Table("experts on the card", "policy", "tokens/s", "found", "copied", "hidden", "tokens as on the CPU")
    rows = []
    for share in SHARES[:1] if smoke else SHARES:
        memory = int(others + share * experts * 17 / 16) + (2 << 20)  # a part is left for activations and keys
        for policy in POLICIES[:2] if smoke else POLICIES:
            progress(f"{policy} with room for {share:.0%} of the experts")
            row = run(folder, device, memory, policy, ids, new_tokens)
            tokens = row.pop("tokens")
            row |= {"share": share, "policy": policy, "equal_tokens": float((tokens == expected).float().mean())}
            rows.append(row)
            overlap = "" if row["overlap"] is None else f"{row['overlap']:.0%}"
            table.add_row(
                f"{row['share_of_experts_in_slots']:.0%}", policy, f"{row['tokens_per_s_with_prefill']:.1f}",
                f"{row['hit_rate']:.0%}", f"{row['copied_gb']:.2f} GB", overlap, f"{row['equal_tokens']:.0%}",
            )  # fmt: skip
            if not row["peak_within_budget"]:
                raise RuntimeError(f"{policy}: more memory than the budget of {memory} bytes was used")
    simulated = rows[0]["simulated"]
    table.title = f"{rows[0]['device']}{' (simulated times)' if simulated else ''}, {batch} sequences, bf16"
    console = Console()
    console.print(table)
    console.print(rows[0]["crossover"])
    if not smoke:
        write_result(
            "device",
            {
                "question": "policies on a card with room for some of the experts; tokens compared with the CPU's",
                "device": rows[0]["device"], "simulated": simulated, "layers": layers, "batch": batch,
                "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rows": rows,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
