"""What this machine's CPU takes for a model's experts and for what lies around them: measured in a second or two.

Experts in memory that no cache holds, in the model's own shape and number, and in pages as those of a mapped file (with
huge ones, as `bench_cpu` has them, large experts are read a tenth faster); linears likewise; torch's products; and the
bundled demo model, which has hardly any weights, so that a step of it is what the program itself takes. All in rounds,
medians of which are kept in the user's cache folder, under the machine's name and what was measured. `measure` takes
them anew.
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import platformdirs
import torch

from moe_offload.bench_cpu import ColdExperts, ExpertFormat
from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.cpu_kernels.experts import ExpertKernel, warm_up
from moe_offload.cpu_kernels.grouping import Groups, group_tokens
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import StoredType
from moe_offload.cpu_kernels.team import Team
from moe_offload.cpu_setup import gemm_crossover, make_team
from moe_offload.machine import cpu_name
from moe_offload.plan_program import ProgramTimes, measure_program
from moe_offload.plan_rates import Curve, MeasuredHost, kind_of
from moe_offload.plan_sizes import ExpertLayers, ModelSizes

logger = logging.getLogger(__name__)

VERSION = 2
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = 1.5  # of rounds, beside compiling and filling memory
_MOST_BYTES = 12 << 20  # of an expert that is measured; larger ones are as fast by the byte
_MIB = 192  # of memory for each kind of expert
_READ_MIB = 256
_TORCH = (2048, 4096)  # a linear
_SLOW = 10  # times the reading, for experts that run through torch
# progress(what, share done)
Report = Callable[[str, float], None]


def host_rates(
    sizes: ModelSizes, threads: int, *, measure: bool = False, folder: Path | None = None,
    report: Report = lambda what, share: None,
) -> MeasuredHost:  # fmt: skip
    """This machine's rates for a model: those that are kept, or measured and then kept."""
    folder = folder or Path(platformdirs.user_cache_dir("moe-offload")) / "plan"
    groups = _kinds(sizes)
    key = {
        "version": VERSION, "cpu": cpu_name(), "host": platform.node(), "threads": threads,
        "torch": version("torch"), "numba": version("numba"),
        "kinds": [[each.weights, each.hidden, each.inner, each.top_k] for each in groups],
    }  # fmt: skip
    text = json.dumps(key, sort_keys=True)
    path = folder / f"host-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    found = None if measure else _read(path, text)
    if found is None:
        found = measure_host(groups, threads, report)
        _write(path, text, found)
    return found


def _kinds(sizes: ModelSizes) -> list[ExpertLayers]:
    """The model's experts, and one in the linears' format, that stands for them; each once."""
    first = sizes.groups[0]
    wanted = [*sizes.groups, replace(first, weights=sizes.dense, top_k=8)]
    return list({(kind_of(each), each.top_k): replace(each, layers=1) for each in wanted}.values())


class _Bench:
    """One kind of expert in memory."""

    def __init__(self, group: ExpertLayers) -> None:
        self.group = group
        self.format = ExpertFormat.parse(group.weights)
        nbytes = self.format.record(group.hidden, group.inner).weight_bytes
        inner = group.inner if nbytes <= _MOST_BYTES else max(group.inner * _MOST_BYTES // nbytes // 64 * 64, 64)
        self.scale = group.inner / inner
        self.kernel: ExpertKernel | PackedExpertKernel = self.format.kernel(group.hidden, inner)
        self._inner, self._next = inner, 0
        self._cold: ColdExperts | None = None
        self.times: dict[int, list[float]] = {rows: [] for rows in ROWS}

    def fill(self) -> None:
        self._cold = ColdExperts(self.format, self.group.hidden, self._inner, _MIB, huge_pages=False)

    def sample(self, rows: int, team: Team) -> None:
        """Seconds of an expert, among as many as a token has; several jobs back to back where they are short."""
        cold = self._cold
        assert cold is not None
        hidden, calls = cold.draw(rows), 4 if rows == 1 else 1
        out = np.zeros_like(hidden)
        groups = [self._groups(rows, cold.count) for _ in range(calls)]
        began = time.perf_counter()
        for each in groups:
            self.kernel(cold.table, each, hidden, out, team)
        count = len(groups[0].experts)
        self.times[rows].append((time.perf_counter() - began) / (calls * count) * self.scale)

    def _groups(self, rows: int, count: int) -> Groups:
        active = min(self.group.top_k, count // 2)
        chosen = (self._next + np.arange(active)) % count
        self._next = int(self._next + active) % count
        index = np.tile(np.sort(chosen), (rows, 1)).astype(np.int64)
        return group_tokens(index, np.full(index.shape, 1 / active, np.float32), count)

    def curve(self, torch_flops: float) -> Curve:
        """Medians, none above that of more tokens (neighbours only ever add); torch's product where that takes over."""
        rows = [each for each in ROWS if self.times[each]]
        seconds = [median(self.times[each]) for each in rows]
        crossover = gemm_crossover("bf16") if self.format.dtype == "bf16" else math.inf
        taken = [
            min(one, self.group.flops_per_row * count / torch_flops) if count >= crossover else one
            for count, one in zip(rows, seconds, strict=True)
        ]
        return Curve(tuple(rows), tuple(min(taken[place:]) for place in range(len(taken))))


def measure_host(groups: Sequence[ExpertLayers], threads: int, report: Report) -> MeasuredHost:
    """Measure `groups`, the last of which stands for linears, and what lies around them."""
    known = [group for group in groups if group.weights in get_args(StoredType)]
    benches = [_Bench(group) for group in known]
    warm_up([bench.kernel for bench in benches], lambda name, done, total: report(f"compiling {name}", done / total))
    team = make_team(threads)
    for done, bench in enumerate(benches):
        report(f"filling memory with {bench.format}", done / len(benches))
        bench.fill()
    program = measure_program(threads, report)
    torch_times: dict[int, list[float]] = {1: [], 64: []}
    weights = [torch.zeros(_TORCH[::-1], dtype=_torch_type(groups[-1].weights)) for _ in range(6)]
    with ReadLimit(team, _READ_MIB) as limit:
        for bench in benches:
            bench.sample(1, team)
            bench.times[1].clear()
        started, rounds = time.perf_counter(), 0
        while rounds < 3 or (rounds < 50 and time.perf_counter() - started < SECONDS):
            report("measuring", min(1.0, (time.perf_counter() - started) / SECONDS))
            if rounds % 3 == 0:
                limit.sample()
            for bench in benches:
                for rows in ROWS if rounds % 3 == 0 else ROWS[:1]:
                    bench.sample(rows, team)
            for tokens, times in torch_times.items():
                times.append(_torch_seconds(weights, tokens))
            rounds += 1
        read = limit.gb_per_s()
    team.close()
    return _rates(
        groups, benches, threads, read, {tokens: median(each) for tokens, each in torch_times.items()}, program
    )


def _rates(
    groups: Sequence[ExpertLayers], benches: Sequence[_Bench], threads: int, read: float,
    torch_seconds: Mapping[int, float], program: ProgramTimes,
) -> MeasuredHost:  # fmt: skip
    size = _TORCH[0] * _TORCH[1]
    torch_gbs = size * _torch_type(groups[-1].weights).itemsize / torch_seconds[1] / 1e9
    torch_flops = 2 * size * 64 / torch_seconds[64]
    curves = {kind_of(bench.group): bench.curve(torch_flops) for bench in benches}
    for group in groups:  # decoded and multiplied by torch
        slow = _SLOW * group.nbytes / (read * 1e9)
        curves.setdefault(kind_of(group), Curve((1,), (slow,)))
    linear, last = curves[kind_of(groups[-1])], groups[-1]
    nbytes = benches[-1].format.record(last.hidden, last.inner).weight_bytes if benches else last.nbytes
    return MeasuredHost(
        threads, read, curves, nbytes / linear.seconds[0] / 1e9,
        last.flops_per_row * linear.rows[-1] / linear.seconds[-1], torch_gbs, torch_flops,
        program.step, program.layer, program.module,
    )  # fmt: skip


def _torch_type(name: str) -> torch.dtype:
    return {"f32": torch.float32, "f16": torch.float16}.get(name, torch.bfloat16)


def _torch_seconds(weights: Sequence[torch.Tensor], tokens: int) -> float:
    """One linear of torch, over weights that the cache has lost since."""
    hidden = torch.ones(tokens, _TORCH[0], dtype=weights[0].dtype)
    began = time.perf_counter()
    for weight in weights:
        torch.nn.functional.linear(hidden, weight)
    return (time.perf_counter() - began) / len(weights)


def _read(path: Path, key: str) -> MeasuredHost | None:
    """What was kept; None for anything that cannot be used."""
    try:
        data = json.loads(path.read_bytes())
        if data["key"] != key:
            raise ValueError("of another machine")
        return _from_dict(data["host"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.info("%s cannot be used (%s): this machine is measured again", path, error)
        return None


def _from_dict(content: Mapping[str, Any]) -> MeasuredHost:
    curves = {
        str(name): Curve(tuple(int(n) for n in each["rows"]), tuple(float(s) for s in each["seconds"]))
        for name, each in content["curves"].items()
    }
    numbers = {name: content[name] for name in MeasuredHost.__slots__ if name != "curves"}
    every = [*numbers.values(), *(second for curve in curves.values() for second in curve.seconds)]
    if not all(isinstance(each, int | float) and 0 < each < 1e18 for each in every):
        raise ValueError("a figure is not above 0")
    if not curves or any(len(curve.rows) != len(curve.seconds) or not curve.rows for curve in curves.values()):
        raise ValueError("a curve without its points")
    return MeasuredHost(curves=curves, **numbers)


def _write(path: Path, key: str, host: MeasuredHost) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"key": key, "host": asdict(host)}))
        os.replace(fresh, path)
    except OSError as error:
        logger.info("this machine's rates are not kept: %s", error)
        with suppress(OSError):
            fresh.unlink()
