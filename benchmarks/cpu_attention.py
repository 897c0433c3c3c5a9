"""What share of the machine's read limit does decode attention reach, and how much faster than torch is it?

    python -m benchmarks.cpu_attention [--smoke]

One query position, 32 query and 4 KV heads of 128 (Qwen3-30B-A3B), over caches that no CPU cache
holds: every sample takes another one out of --gib of memory. The read limit is measured in the same
rounds, because neighbours on the host move it. Torch runs scaled_dot_product_attention with
enable_gqa, and with the query heads of a KV head folded into the query positions (which a model
would have to do by itself), in bf16 and, twice the bytes, in f32. `exact`: queries are bf16, weights
f32; `rounded`: weights are rounded to bf16, as torch does. Timed is what a decode step pays for a
prepared kernel: writing the argument block and the launch. Threads are pinned, one to a core, if
there are as many.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import machine, spread, write_result
from moe_offload.cpu_kernels import ThreadTeam, default_threads
from moe_offload.cpu_kernels.attention import AttentionShape, DecodeAttention, Strides
from moe_offload.cpu_kernels.bandwidth import ReadLimit

Q_HEADS, KV_HEADS, HEAD = 32, 4, 128
CONTEXTS = (1024, 4096, 8192, 32768)
PAUSE = 0.03  # seconds after torch: its idle threads spin for milliseconds and hold our cores
VARIANTS = {
    f"{dtype} {'rounded' if rounded else 'exact'}": AttentionShape(
        Q_HEADS, KV_HEADS, HEAD, HEAD, dtype, q_is_bf16=True, bf16_weights=rounded
    )
    for dtype in ("bf16", "int8")
    for rounded in (False, True)
}
RIVAL_TYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
RIVALS = tuple(f"torch {dtype} {form}" for dtype in RIVAL_TYPES for form in ("enable_gqa", "folded"))
SIZES = {"bf16": 2, "int8": 1, "f32": 4}


@dataclass(frozen=True, slots=True)
class Caches:
    """Memory that keys and values of any context are cut out of; int8 takes half as much of it."""

    memory: torch.Tensor  # bf16
    query: torch.Tensor  # bf16 [1, Hq, 1, D]

    @classmethod
    def make(cls, gib: float, seed: int) -> "Caches":
        generator = torch.Generator().manual_seed(seed)
        memory = torch.empty(int(gib * 2**29), dtype=torch.bfloat16)
        some = torch.randn(1 << 20, generator=generator).to(memory.dtype)
        memory.view(-1, some.numel())[:] = some
        query = torch.randn(1, Q_HEADS, 1, HEAD, generator=generator).to(memory.dtype)
        return cls(memory, query)

    def cut(self, number: int, context: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, Hkv, context, D] of one of the caches that fit; two bf16 make an f32 of their size."""
        size, memory = KV_HEADS * context * HEAD, self.memory.view(dtype)
        start = number % (memory.numel() // (2 * size)) * 2 * size
        keys, values = memory[start : start + 2 * size].view(2, 1, KV_HEADS, context, HEAD)
        return keys, values


class Ours:
    """A variant for one context, ready to be launched."""

    def __init__(self, shape: AttentionShape, caches: Caches, context: int, team: ThreadTeam) -> None:
        self.attention, self.team, self.context = DecodeAttention(shape), team, context
        self.attention.load()
        self.query = caches.query.float().numpy().reshape(-1)
        self.out = np.zeros((Q_HEADS, HEAD), np.float32)
        self.lengths = np.array([context])
        self.scales = np.full(KV_HEADS * context, 1 / 60, np.float32)
        size = HEAD * (1 if shape.dtype == "int8" else 2)
        self.strides = Strides(KV_HEADS * context * size, context * size, size)
        self.block = np.zeros(self.attention.block_bytes(1, context, team.threads) + 64, np.uint8)

    def timed(self, keys: int, values: int) -> float:
        args = -(-self.block.ctypes.data // 64) * 64
        query, out, lengths = self.query.ctypes.data, self.out.ctypes.data, self.lengths.ctypes.data
        scales = self.scales.ctypes.data if self.attention.shape.dtype == "int8" else 0
        started = time.perf_counter()
        with self.team.lock:
            self.attention.fill(
                args, queries=query, keys=keys, values=values, out=out, lengths=lengths, batch=1,
                threads=self.team.threads, key_strides=self.strides, value_strides=self.strides,
                key_scales=scales, value_scales=scales, scale_strides=(0, 4 * self.context),
            )  # fmt: skip
            self.team.launch(self.attention.job_address, args)
        return time.perf_counter() - started


def gqa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def folded(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    grouped = query.view(1, KV_HEADS, -1, HEAD)
    return torch.nn.functional.scaled_dot_product_attention(grouped, keys, values).view(query.shape)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def pin(team: ThreadTeam) -> None:
    """Give each thread of the team a core: two that share one halve every figure, the read limit's too."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < team.threads:
        return
    for thread in threading.enumerate():
        number = thread.name.removeprefix("moe-offload-")
        if number.isdigit() and thread.native_id is not None:
            os.sched_setaffinity(thread.native_id, {cores[int(number)]})
    os.sched_setaffinity(threading.get_native_id(), {cores[0]})


def measure(
    caches: Caches, contexts: Sequence[int], threads: int, rounds: int, limit_mib: int
) -> tuple[float, dict[int, dict[str, list[float]]]]:
    """The read limit in GB/s, and the seconds of every sample by context and by who ran."""
    times: dict[int, dict[str, list[float]]] = {c: {name: [] for name in (*VARIANTS, *RIVALS)} for c in contexts}
    with ThreadTeam(threads) as team, ReadLimit(team, limit_mib) as limit:
        ours = {c: {name: Ours(shape, caches, c, team) for name, shape in VARIANTS.items()} for c in contexts}
        for context in contexts:
            verify(ours[context]["bf16 exact"], caches, context)  # starts torch's threads, before ours are pinned
        if hasattr(os, "sched_setaffinity"):
            pin(team)
        number = 0
        for turn in range(rounds + 1):  # the first warms up
            limit.sample()
            for context in contexts:
                names = list(VARIANTS)
                for _ in range(max(4, min(8, 32768 // context))):
                    names.append(names.pop(0))  # nobody is always the first after torch
                    for name in names:
                        kernel = ours[context][name]
                        keys, values = caches.cut(number := number + 1, context)
                        seconds = kernel.timed(keys.data_ptr(), values.data_ptr())
                        if turn:
                            times[context][name].append(seconds)
                for name in RIVALS:
                    _, dtype, form = name.split()
                    rival, query = (gqa if form == "enable_gqa" else folded), caches.query.to(RIVAL_TYPES[dtype])
                    for _ in range(2):
                        keys, values = caches.cut(number := number + 1, context, query.dtype)
                        seconds = timed(partial(rival, query, keys, values))
                        if turn:
                            times[context][name].append(seconds)
                    time.sleep(PAUSE)
        return limit.gb_per_s(), times


def verify(kernel: Ours, caches: Caches, context: int) -> None:
    """Nothing is timed that does not compute the same."""
    keys, values = caches.cut(0, context)
    kernel.timed(keys.data_ptr(), values.data_ptr())
    for rival in (gqa, folded):
        wanted = rival(caches.query, keys, values).float().numpy().reshape(kernel.out.shape)
        np.testing.assert_allclose(kernel.out, wanted, rtol=0, atol=0.01 * np.abs(wanted).max() + 1e-3)


def main(
    threads: Annotated[int, typer.Option(help="0: physical cores")] = 0,
    rounds: Annotated[int, typer.Option()] = 15,
    gib: Annotated[float, typer.Option(help="memory the caches rotate through")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    smoke: Annotated[bool, typer.Option(help="seconds, for CI; writes nothing")] = False,
) -> None:
    threads = threads or default_threads()
    torch.set_num_threads(threads)
    contexts = CONTEXTS[:2] if smoke else CONTEXTS
    rounds, gib, limit_mib = (2, 0.125, 256) if smoke else (rounds, gib, 1024)
    with torch.inference_mode():
        limit, times = measure(Caches.make(gib, seed), contexts, threads, rounds, limit_mib)
    table = Table(
        title=f"{machine()['cpu']}, {threads} threads, {Q_HEADS} query and {KV_HEADS} KV heads of {HEAD}; "
        f"read limit {limit:.1f} GB/s"
    )
    for name in ("context", "kernel", "us", "GB/s", "% of limit", *(rival.replace("torch", "x") for rival in RIVALS)):
        table.add_column(name, justify="right")
    rows = []
    for context, of_context in times.items():
        medians = {name: spread(values) for name, values in of_context.items()}
        for name, figures in medians.items():
            size = SIZES[name.removeprefix("torch ").split()[0]]
            rate = 2 * KV_HEADS * context * HEAD * size / figures["median"] / 1e9
            row = {
                "context": context,
                "kernel": name,
                **{key: round(figures[key] * 1e6) for key in ("median", "min", "max")},
                "samples": figures["n"],
                "gb_per_s": round(rate, 2),
                "percent_of_limit": round(100 * rate / limit, 1),
                **{f"times {rival}": round(medians[rival]["median"] / figures["median"], 2) for rival in RIVALS},
            }
            rows.append(row)
            shown = ("context", "kernel", "median", "gb_per_s", "percent_of_limit", *(f"times {r}" for r in RIVALS))
            table.add_row(*(str(row[key]) for key in shown))
    Console(width=120).print(table)
    if not smoke:
        settings = {"threads": threads, "rounds": rounds, "seed": seed, "gib": gib, "unit": "us"}
        write_result("cpu_attention", {**settings, "read_limit_gb_per_s": round(limit, 2), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
