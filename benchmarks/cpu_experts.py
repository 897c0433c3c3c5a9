"""What share of the machine's read limit do a layer's experts reach?

    python -m benchmarks.cpu_experts [--dtype f16] [--transposed] [--smoke]

One MoE layer of Qwen3-30B-A3B's shape (H 2048, I 768, 8 active experts) with weights that no
cache holds: every sample takes other experts out of --gib of memory. All active experts get T
tokens each. The read limit is measured in the same rounds, because neighbours on the host move
it; torch runs the same experts as transformers' eager loop does (F.linear in the stored type).
"""

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from moe_offload.cpu_kernels import (
    Activation,
    ExpertKernel,
    ExpertLayout,
    Groups,
    ThreadTeam,
    default_threads,
    group_tokens,
    warm_up,
)
from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.cpu_kernels.target import current_target

HIDDEN, INTERMEDIATE, ACTIVE = 2048, 768, 8
TOKENS = (1, 2, 4, 8, 16, 32, 64)
PAUSE = 0.01  # seconds after torch: its idle threads spin for milliseconds and hold our cores
RESULT = Path(__file__).parent / "results" / "cpu_experts.json"
TORCH_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WeightType = Literal["bf16", "f16", "f32"]


class Layer:
    """Experts in one block of memory: gate, up, down one after the other."""

    def __init__(self, dtype: WeightType, transposed: bool, gib: float, seed: int) -> None:
        self.layout = ExpertLayout(HIDDEN, INTERMEDIATE, dtype, transposed=transposed)
        self.count = max(2 * ACTIVE, int(gib * 2**30) // self.layout.weight_bytes)
        kind = TORCH_TYPES[dtype]
        one = torch.randn(3 * HIDDEN * INTERMEDIATE, generator=torch.Generator().manual_seed(seed))
        one = (one * 0.02).to(kind)
        self.memory = torch.empty(self.count, one.numel(), dtype=kind)
        self.memory[:] = one  # equal experts: only their addresses matter to a kernel
        size, matrix = one.element_size(), HIDDEN * INTERMEDIATE
        self.table = np.zeros((self.count, 6), np.int64)
        starts = self.memory.data_ptr() + np.arange(self.count) * one.numel() * size
        for column in range(3):
            self.table[:, column] = starts + column * matrix * size

    def eager(self, groups: Groups, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """transformers' loop over the active experts."""
        linear = torch.nn.functional.linear
        tokens, weights = torch.from_numpy(groups.tokens.astype(np.int64)), groups.weights
        for a, expert in enumerate(groups.experts.tolist()):
            rows = slice(int(groups.offsets[a]), int(groups.offsets[a + 1]))
            gate, up, down = self.memory[expert].view(3, -1)
            x = hidden[tokens[rows]]
            if self.layout.transposed:
                g, u = (x @ w.view(HIDDEN, INTERMEDIATE) for w in (gate, up))
                y = (torch.nn.functional.silu(g) * u) @ down.view(INTERMEDIATE, HIDDEN)
            else:
                g, u = (linear(x, w.view(INTERMEDIATE, HIDDEN)) for w in (gate, up))
                h = torch.nn.functional.silu(g) * u
                y = linear(h, down.view(HIDDEN, INTERMEDIATE))
            weight = torch.from_numpy(weights[rows])[:, None]
            out.index_add_(0, tokens[rows], (y * weight.to(y.dtype)).to(out.dtype))


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(
    layer: Layer, threads: int, rounds: int, limit_mib: int, seed: int, tokens: tuple[int, ...]
) -> tuple[float, dict[int, tuple[float, float]]]:
    """The read limit, and per T the median seconds of our kernel and of torch."""
    rng = np.random.default_rng(seed)
    kernel = ExpertKernel(layer.layout, Activation("silu"))
    warm_up([kernel])
    order = rng.permutation(layer.count)
    position = 0

    def next_groups(count: int) -> Groups:
        nonlocal position
        if position + ACTIVE > layer.count:
            position = 0
        chosen = np.sort(order[position : position + ACTIVE])
        position += ACTIVE
        index = np.tile(chosen, (count, 1)).astype(np.int64)
        return group_tokens(index, np.full(index.shape, 1 / ACTIVE, np.float32), layer.count)

    ours: dict[int, list[float]] = {count: [] for count in tokens}
    theirs: dict[int, list[float]] = {count: [] for count in tokens}
    with ThreadTeam(threads) as team, ReadLimit(team, limit_mib) as limit:
        for turn in range(rounds + 1):  # the first warms up
            limit.sample()
            for count in tokens:
                hidden = rng.standard_normal((count, HIDDEN)).astype(np.float32)
                out = np.zeros_like(hidden)
                x = torch.from_numpy(hidden).to(layer.memory.dtype)
                y = torch.zeros(x.shape, dtype=x.dtype)
                for _ in range(3):
                    groups = next_groups(count)
                    seconds = timed(partial(kernel, layer.table, groups, hidden, out, team))
                    groups = next_groups(count)
                    torch_seconds = timed(partial(layer.eager, groups, x, y))
                    time.sleep(PAUSE)
                    if turn:
                        ours[count].append(seconds)
                        theirs[count].append(torch_seconds)
        gb_per_s = limit.gb_per_s()
    medians = {c: (float(np.median(ours[c])), float(np.median(theirs[c]))) for c in tokens}
    return gb_per_s, medians


def machine() -> dict[str, object]:
    target = current_target()
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bf16", "avx512vnni", "amx-tile")
    have = set(target.features.split(","))
    return {
        "cpu": model,
        "llvm_cpu": target.cpu,
        "cores": default_threads(),
        "vector_lanes": target.lanes,
        "features": [name for name in wanted if f"+{name}" in have],
        "torch": torch.__version__,
    }


def write(results: dict[str, object]) -> None:
    """Add this case to the result file: written beside it, then renamed over it."""
    RESULT.parent.mkdir(exist_ok=True)
    content: dict[str, Any] = {}
    if RESULT.exists():
        content = cast(dict[str, Any], json.loads(RESULT.read_text()))
    content["machine"] = machine()
    content.setdefault("cases", {}).update(results)
    beside = RESULT.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(RESULT)


def main(
    dtype: Annotated[str, typer.Option(help="bf16, f16 or f32")] = "bf16",
    transposed: Annotated[bool, typer.Option(help="weights as [in, out]")] = False,
    threads: Annotated[int, typer.Option(help="0: physical cores")] = 0,
    rounds: Annotated[int, typer.Option()] = 9,
    gib: Annotated[float, typer.Option(help="memory the experts rotate through")] = 2.0,
    seed: Annotated[int, typer.Option()] = 0,
    smoke: Annotated[bool, typer.Option(help="seconds, for CI; writes nothing")] = False,
) -> None:
    if dtype not in TORCH_TYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(TORCH_TYPES)}")
    threads = threads or default_threads()
    torch.set_num_threads(threads)
    tokens = TOKENS[:4] if smoke else TOKENS
    rounds, gib, limit_mib = (2, 0.25, 256) if smoke else (rounds, gib, 1024)
    layer = Layer(cast(WeightType, dtype), transposed, gib, seed)
    with torch.inference_mode():
        limit, medians = measure(layer, threads, rounds, limit_mib, seed, tokens)
    read = ACTIVE * layer.layout.weight_bytes
    shape = "transposed" if transposed else "row-major"
    table = Table(
        title=f"{machine()['cpu']}, {threads} threads, {dtype} {shape}, "
        f"{ACTIVE} experts of H {HIDDEN}, I {INTERMEDIATE}; read limit {limit:.1f} GB/s"
    )
    for name in ("tokens per expert", "us per layer", "GB/s", "% of limit", "GFLOP/s", "x torch"):
        table.add_column(name, justify="right")
    rows = []
    for count, (ours, theirs) in medians.items():
        rate = read / ours / 1e9
        flops = count * ACTIVE * 6 * HIDDEN * INTERMEDIATE / ours / 1e9
        row = {
            "tokens": count,
            "us": round(ours * 1e6),
            "gb_per_s": round(rate, 2),
            "percent_of_limit": round(100 * rate / limit, 1),
            "gflops": round(flops, 1),
            "times_torch": round(theirs / ours, 2),
            "torch_us": round(theirs * 1e6),
        }
        rows.append(row)
        table.add_row(
            str(count), f"{ours * 1e6:.0f}", f"{rate:.1f}", f"{100 * rate / limit:.0f}",
            f"{flops:.0f}", f"{theirs / ours:.2f}",
        )  # fmt: skip
    Console().print(table)
    if not smoke:
        case = {"threads": threads, "rounds": rounds, "seed": seed, "read_limit_gb_per_s": limit}
        write({f"{dtype} {shape}": {**case, "rows": rows}})


if __name__ == "__main__":
    typer.run(main)
