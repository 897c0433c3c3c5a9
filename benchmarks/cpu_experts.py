"""What share of the machine's read limit do a layer's experts reach, and how many operations with many tokens?

    python -m benchmarks.cpu_experts [--tier avx2] [--formats int4,int8:128] [--smoke]

One MoE layer of Qwen3-30B-A3B's shape (H 2048, I 768, 8 active experts) with weights that no cache holds: every call
takes other experts out of --gib of memory for each format. All active experts get T tokens each. The read limit is
measured in the same rounds, because neighbours on the host move it; torch runs bf16 experts as transformers' eager loop
does (three F.linear and a silu). Up to 4 tokens a sample is several calls back to back, as in decoding.

--tier avx2 holds kernels and torch to a CPU without AVX-512, in a process started anew.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import RESULTS, progress, spread, write_result
from moe_offload.bench_cpu import ACTIVE, CALLS, ColdExperts, ExpertFormat, tier_name
from moe_offload.cpu_kernels import Groups, Team, ThreadTeam, default_threads
from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.cpu_kernels.packed_experts import Activations
from moe_offload.cpu_kernels.target import current_target

HIDDEN, INTERMEDIATE = 2048, 768
TOKENS = (1, 2, 4, 8, 16, 64, 512)
FORMATS = "bf16,int8,int8:128,int4,int4:128,mxfp4"
PAUSE = 0.01  # seconds after torch: its idle threads spin for milliseconds and hold our cores
SLOW = 0.5  # seconds: what takes longer is sampled once
TIERS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
_MARK = "MOE_OFFLOAD_BENCHMARK_TIER"


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one format with so many tokens for each expert."""

    tokens: int
    us: float
    gb_per_s: float
    percent_of_limit: float
    gop_per_s: float
    times_torch_bf16: float
    torch_us: float


class TorchExperts:
    """The bf16 experts as torch sees them."""

    def __init__(self, experts: ColdExperts) -> None:
        self.experts = experts
        self.memory = torch.from_numpy(experts.memory).view(torch.bfloat16)

    def seconds(self, tokens: int) -> float:
        groups = self.experts.next_groups(tokens)
        x = torch.from_numpy(self.experts.draw(tokens)).to(torch.bfloat16)
        out = torch.zeros_like(x)
        started = time.perf_counter()
        self._eager(groups, x, out)
        return time.perf_counter() - started

    def _eager(self, groups: Groups, hidden: torch.Tensor, out: torch.Tensor) -> None:
        linear = torch.nn.functional.linear
        tokens, weights = torch.from_numpy(groups.tokens.astype(np.int64)), groups.weights
        for a, expert in enumerate(groups.experts.tolist()):
            rows = slice(int(groups.offsets[a]), int(groups.offsets[a + 1]))
            gate, up, down = self.memory[expert][: 3 * HIDDEN * INTERMEDIATE].view(3, -1)
            x = hidden[tokens[rows]]
            g, u = (linear(x, w.view(INTERMEDIATE, HIDDEN)) for w in (gate, up))
            y = linear(torch.nn.functional.silu(g) * u, down.view(HIDDEN, INTERMEDIATE))
            weight = torch.from_numpy(weights[rows])[:, None]
            out.index_add_(0, tokens[rows], y * weight.to(y.dtype))


def errors(experts: ColdExperts, team: Team) -> dict[str, float]:
    """Of each precision of activations: the largest error of a layer's output, relative to the largest output."""
    modes: tuple[Activations, ...] = ("f32", "int16", "int8")
    groups, hidden = experts.next_groups(16), experts.draw(16)
    outs = {}
    for mode in modes:
        outs[mode] = np.zeros_like(hidden)
        experts.format.kernel(HIDDEN, INTERMEDIATE, mode)(experts.table, groups, hidden, outs[mode], team)
    exact = outs.pop("f32")
    return {mode: float(np.abs(out - exact).max() / np.abs(exact).max()) for mode, out in outs.items()}


def measure(
    formats: list[ExpertFormat], threads: int, rounds: int, gib: float, tokens: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """Rounds in which every format and torch take turns."""
    mib = int(gib * 1024)
    times: dict[tuple[str, int], list[float]] = {}
    cold = [(each.kernel(HIDDEN, INTERMEDIATE), ColdExperts(each, HIDDEN, INTERMEDIATE, mib, seed)) for each in formats]
    rival = TorchExperts(ColdExperts(ExpertFormat("bf16"), HIDDEN, INTERMEDIATE, mib, seed))

    def sample(name: str, count: int, work: Callable[[], float]) -> None:
        taken = times.setdefault((name, count), [])
        if not taken or taken[0] < SLOW:
            taken.append(work())

    with ThreadTeam(threads) as team, ReadLimit(team, mib) as limit:
        precision = {str(e.format): errors(e, team) for _, e in cold if e.record.packed}
        for kernel, experts in cold:
            experts.seconds(kernel, 1, team)
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for count in tokens:
                limit.sample()
                calls = CALLS if count <= 4 else 1
                for kernel, experts in cold:
                    sample(str(experts.format), count, lambda k=kernel, e=experts: e.seconds(k, count, team, calls))  # type: ignore[misc]  # noqa: B023
                sample("torch", count, lambda: rival.seconds(count))  # noqa: B023
                time.sleep(PAUSE)
        gb_per_s = limit.gb_per_s()
    rows: dict[str, list[dict[str, float]]] = {}
    for _, experts in cold:
        for count in tokens:
            ours, theirs = (float(np.median(times[name, count])) for name in (str(experts.format), "torch"))
            rate = experts.bytes_per_call / ours / 1e9
            row = Row(
                count, round(ours * 1e6, 1), round(rate, 2), round(100 * rate / gb_per_s, 1),
                round(experts.operations(count) / ours / 1e9, 1), round(theirs / ours, 2), round(theirs * 1e6, 1),
            )  # fmt: skip
            rows.setdefault(str(experts.format), []).append(asdict(row))
    spreads = {
        f"{name} {count}": {k: round(v * 1e6, 1) if k != "n" else v for k, v in spread(taken).items()}
        for (name, count), taken in times.items()
    }
    return {
        "instructions": tier_name(current_target()),
        "threads": threads,
        "rounds": rounds,
        "seed": seed,
        "gib_per_format": gib,
        "read_limit_gb_per_s": round(gb_per_s, 2),
        "error_of_activations": precision,
        "formats": rows,
        "us_spread": spreads,
    }


def show(tier: str, result: dict[str, Any]) -> None:
    table = Table(
        title=f"{tier} ({result['instructions']}), {result['threads']} threads, {ACTIVE} experts of H {HIDDEN}, "
        f"I {INTERMEDIATE}; read limit {result['read_limit_gb_per_s']} GB/s"
    )
    for name in ("experts", "tokens each", "us", "GB/s", "% of limit", "GOP/s", "x torch bf16"):
        table.add_column(name, justify="right")
    for name, rows in result["formats"].items():
        for row in rows:
            table.add_row(
                name, str(row["tokens"]), f"{row['us']:.0f}", f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_limit']:.0f}", f"{row['gop_per_s']:.0f}", f"{row['times_torch_bf16']:.2f}",
            )  # fmt: skip
        table.add_section()
    console = Console()
    console.print(table)
    for name, modes in result["error_of_activations"].items():
        console.print(
            f"{name}: " + ", ".join(f"activations {mode} err by {value:.1e}" for mode, value in modes.items())
        )


def main(
    formats: Annotated[
        str, typer.Option(help="bf16, f16, f32 (or -transposed), int8, int4 (or :GROUP), mxfp4")
    ] = FORMATS,
    tier: Annotated[str, typer.Option(help="native or avx2")] = "native",
    threads: Annotated[int, typer.Option(help="0: physical cores")] = 0,
    rounds: Annotated[int, typer.Option()] = 15,
    gib: Annotated[float, typer.Option(help="memory that each format's experts rotate through")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    smoke: Annotated[bool, typer.Option(help="seconds, for CI; writes nothing")] = False,
) -> None:
    if tier not in TIERS:
        raise typer.BadParameter(f"{tier!r} is not one of {', '.join(TIERS)}")
    if TIERS[tier] and os.environ.get(_MARK) != tier:
        command = [sys.executable, "-m", "benchmarks.cpu_experts", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **TIERS[tier], _MARK: tier})
    threads = threads or default_threads()
    torch.set_num_threads(threads)
    try:
        parsed = [ExpertFormat.parse(name) for name in formats.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    tokens = TOKENS[:4] if smoke else TOKENS
    rounds, gib = (2, 0.125) if smoke else (rounds, gib)
    with torch.inference_mode():
        result = measure(parsed, threads, rounds, gib, tokens, seed)
    show(tier, result)
    if not smoke:
        path = RESULTS / "cpu_experts.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        write_result("cpu_experts", {"tiers": {**before.get("tiers", {}), tier: result}})


if __name__ == "__main__":
    typer.run(main)
