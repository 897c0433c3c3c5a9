"""What only a card can say about the GPU kernels: one command, and it writes the result file.

    python -m benchmarks.gpu [--json FILE] [--only few_tokens,...] [--smoke]

Card and bandwidths; experts for few tokens as a share of the measured copy bandwidth (goal: 80 %); for many tokens as a
share of cuBLAS (goal: 60 %); from how many tokens on the second way is the better one; a layer's experts beside
transformers' `grouped_mm`; decode attention beside torch's; what launches cost the host; the gpu tests and
compute-sanitizer. docs/gpu_checks.md tells how to read the figures.

--smoke runs the same code on the CPU, through the tests' host shim, with tiny shapes: it says nothing about speed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu.attention import attention
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.card import bandwidth, card_facts
from benchmarks.gpu.few_tokens import GOAL as FEW_GOAL
from benchmarks.gpu.few_tokens import Row, few_tokens
from benchmarks.gpu.many_tokens import GOAL as MANY_GOAL
from benchmarks.gpu.many_tokens import crossover, many_tokens
from benchmarks.gpu.numerics import gpu_tests, sanitized
from benchmarks.gpu.tables import show
from benchmarks.gpu.whole_layer import launches, whole_layer
from benchmarks.reporting import RESULTS, progress, wide_console, write_result
from moe_offload.gpu_kernels.launch import KernelError
from moe_offload.transfer.cupy_check import cupy_problem
from moe_offload.transfer.find_device import cuda_problem, detect_cuda

Section = Callable[[Bench, float], list[Row]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "few_tokens": (f"experts for few tokens (goal: {FEW_GOAL:g} % of the copy bandwidth)", few_tokens),
    "many_tokens": (
        f"one expert with many tokens (goal: {MANY_GOAL:g} % of cuBLAS)",
        lambda bench, _: many_tokens(bench),
    ),
    "crossover": ("fused or tiled, T tokens of one expert", lambda bench, _: crossover(bench)),
    "whole_layer": ("a layer's experts beside transformers' grouped_mm", lambda bench, _: whole_layer(bench)),
    "attention": ("decode attention beside torch's", attention),
    "launches": ("one layer, one token: the host's time", lambda bench, _: launches(bench)),
}
NUMERICS = "numerics"
_SMOKE_TESTS = ("tests/gpu_kernels/test_legacy_ptx_gpu.py",)


def measure(bench: Bench, only: tuple[str, ...], console: Console, smoke: bool = False) -> dict[str, Any]:
    """Every section that is wanted, shown as it is there; smoke: nothing is shown, and what fails is raised."""
    progress("bandwidths")
    rates = bandwidth(bench)
    result: dict[str, Any] = {"card": card_facts(bench), "gb_per_s": rates}
    if not smoke:
        console.print(result["card"], rates)
    for name, (title, section) in SECTIONS.items():
        if name in only:
            try:
                result[name] = section(bench, rates["copy"])
            except Exception as error:  # one section costs no other its figures
                if smoke:
                    raise
                result[name] = []
                bench.left_out.append(f"{name} failed: {type(error).__name__}: {error}")
                progress(bench.left_out[-1])
            if not smoke:
                show(console, title, result[name])
    result["left_out"] = bench.left_out
    return result


def verify(smoke: bool = False) -> dict[str, Any]:
    """What is right or wrong; on the CPU a few of the gpu tests, which are skipped."""
    progress("gpu tests")
    tests = gpu_tests(_SMOKE_TESTS) if smoke else gpu_tests()
    progress("compute-sanitizer")
    return {"gpu_tests": tests, "compute_sanitizer": sanitized()}


def parsed(only: str) -> tuple[str, ...]:
    """Names of sections; all for none."""
    known = (*SECTIONS, NUMERICS)
    names = tuple(name.strip() for name in only.split(",") if name.strip()) or known
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no section {name!r}: choose from {', '.join(known)}")
    return names


def main(
    json: Annotated[Path, typer.Option(help="Where the result is written.")] = RESULTS / "gpu.json",
    only: Annotated[str, typer.Option(help="Sections, with commas between; by default all.")] = "",
    device: Annotated[int, typer.Option(min=0, help="Number of the card.")] = 0,
    smoke: Annotated[bool, typer.Option(help="The same code on the CPU with tiny shapes; writes nothing.")] = False,
) -> None:
    """Measure the GPU kernels on a card."""
    names, console = parsed(only), wide_console()
    if json.suffix != ".json":
        raise typer.BadParameter(f"the result is JSON, and {json.name} does not end in .json")
    if smoke:
        if shutil.which("g++") is None:
            console.print("smoke: nothing ran, kernels cannot be tried on the CPU without g++")
            return
        with torch.inference_mode():
            result = measure(Bench.of_host(), names, console, smoke=True)
        result |= verify(smoke=True) if NUMERICS in names else {}
        console.print(f"smoke: no figures, {', '.join(result)} ran on the CPU")
        return
    problem = cuda_problem(detect_cuda(), device) or cupy_problem()
    if problem is not None:
        console.print(f"this benchmark needs an NVIDIA card that CuPy can compile for: {problem}", soft_wrap=True)
        raise typer.Exit(1)
    result = {"question": "what the GPU kernels reach on a card", "sections": list(names)}
    try:
        with torch.inference_mode():
            result |= measure(Bench.of_card(device), names, console)
    except KernelError as error:
        console.print(f"kernels cannot be run on this card: {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    path = write_result(json.stem, result, json.parent)
    if NUMERICS in names:
        found = verify()
        console.print(found)
        path = write_result(json.stem, result | found, json.parent)
    console.print(f"written to {path}")
    if any(" failed: " in reason for reason in result["left_out"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
