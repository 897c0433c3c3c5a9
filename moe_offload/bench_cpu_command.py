"""`moe-offload bench-cpu`: options to a bench, its progress, and its figures for eyes or machines."""

import json
import re
from dataclasses import asdict
from typing import Any

import numba
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload import __version__, terminal
from moe_offload.bench_cpu import ACTIVE, MANY, CpuBench, ExpertFormat, Figures, tier_name
from moe_offload.cpu_kernels.amx import permission
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import ThreadTeam
from moe_offload.machine import cpu_name
from moe_offload.memory import detect_memory
from moe_offload.models.errors import OptionError
from moe_offload.progress import Activity

FORMATS = ("bf16", "int8", "int4", "mxfp4")
SECONDS = 10.0
MOST_MIB = 512  # of each format; many times any last-level cache of one socket's share
_INTERRUPTED = 130


def bench_cpu(shape: str, threads: int | None, as_json: bool) -> int:
    """Measure and print. After Ctrl-C what there is, and 130. Raises OptionError."""
    sizes, count = parse_shape(shape), threads or default_threads()
    if count < 1:
        raise OptionError(f"--threads {count} is too few: 1 is the least")
    formats = [ExpertFormat.parse(name) for name in FORMATS]
    mib = max(16, min(MOST_MIB, detect_memory().available // (4 * (len(formats) + 1)) >> 20))
    code = 0
    with ThreadTeam(count) as team, Activity("starting", enabled=not as_json) as activity:
        bench = CpuBench(formats, sizes, team, mib, lambda what, share: activity.update(what, 100 * share, 100, "%"))
        try:
            bench.run(SECONDS)
        except KeyboardInterrupt:
            code = _INTERRUPTED
    facts = _facts(sizes, count, bench.read_limit)
    if code:
        terminal.note("stopped early: fewer samples, and no figure for what had none")
    if as_json:
        content = {**facts, "complete": code == 0, "kernels": [asdict(each) for each in bench.figures()]}
        terminal.write(json.dumps(content, indent=2) + "\n")
    else:
        _print(facts, bench.figures())
    return code


def parse_shape(text: str) -> tuple[int, int]:
    """'2048,768' -> hidden and intermediate size. Raises OptionError."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[,x]\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None or not all(int(size) for size in match.groups()):
        raise OptionError(f"--shape {text} is no shape: give hidden and intermediate size, like 2048,768")
    return int(match[1]), int(match[2])


def _facts(shape: tuple[int, int], threads: int, limit: float | None) -> dict[str, Any]:
    target = current_target()
    tier = tier_name(target)
    if target.tiles:
        tier += " and AMX" if permission() else " (AMX is there, but the system refuses it)"
    return {
        "version": __version__,
        "numba": numba.__version__,
        "cpu": cpu_name(),
        "tier": tier,
        "compiled_for": target.cpu,
        "threads": threads,
        "read_gb_per_s": limit,
        "hidden_size": shape[0],
        "intermediate_size": shape[1],
        "active_experts": ACTIVE,
    }


def _print(facts: dict[str, Any], figures: list[Figures]) -> None:
    head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    head.add_column(style="dim", no_wrap=True)
    head.add_column()
    limit = facts["read_gb_per_s"]
    head.add_row("CPU", Text(facts["cpu"]))
    head.add_row("instructions", Text(facts["tier"]))
    head.add_row("threads", str(facts["threads"]))
    head.add_row("memory", f"{limit:.1f} GB/s read at best" if limit else "not measured")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experts")
    for title in ("1 token: GB/s", "of the best", f"{MANY} tokens: GOP/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in figures:
        table.add_row(
            each.format, _number(each.read_gb_per_s), "" if each.share is None else f"{each.share:.0%}",
            _number(each.gop_per_s),
        )  # fmt: skip
    what = f"{facts['active_experts']} experts of {facts['hidden_size']} x {facts['intermediate_size']} at once"
    note = Text(f"{what}, their weights in no cache; medians. GB/s count the format's own bytes.", style="dim")
    Console(highlight=False).print(Group(head, table, note))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
