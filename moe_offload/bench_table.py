"""A benchmark's figures for eyes and for machines: the table of llama-bench and what limits, or flat records."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload import __version__
from moe_offload.bench_model import ModelBench, TestResult
from moe_offload.bench_resources import Resource
from moe_offload.machine import cpu_name
from moe_offload.models.spec import BITS_PER_WEIGHT, MoeSpec

OUTPUTS = ("table", "md", "csv", "json", "jsonl")

_WIDTH = 120  # where stdout is no terminal
_KEYS = {"CPU memory": "cpu_read", "link": "link", "device memory": "device_read", "disk": "disk"}
_SPEEDS = ("model", "size", "params", "weights", "device", "threads", "test", "t/s")
_LEFT = ("model", "weights", "device", "test")
_WHOLE = ("size", "params", "test", "t/s")  # on however narrow a terminal


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured, and how. threads: None on a simulated server, which has others."""

    model: str
    model_type: str
    size_bytes: int
    params: int
    weights: str
    dense: str
    device: str
    simulated: bool
    policy: str | None
    threads: int | None
    cpu: str
    text: str
    random_tokens: bool
    repeats: int
    warm_ups: int
    version: str = __version__

    @classmethod
    def of(
        cls, name: str, spec: MoeSpec, bench: ModelBench, text: str, *, random: bool, repeats: int, warm: int
    ) -> "Facts":
        """Of a bench's model; `name` as the user gave it, `spec` read from its configuration."""
        engine: Any = bench.model.offload
        side, simulated = engine.device, bench.meter.simulated
        return cls(
            model=Path(name).name if Path(name).is_dir() else name,
            model_type=spec.model_type,
            size_bytes=_expert_bytes(spec, engine.weights, engine.pack) + bench.meter.other_bytes,
            params=spec.total_params,
            weights=engine.weights,
            dense=engine.dense,
            device="CPU" if side is None else side.accelerator.name,
            simulated=simulated,
            policy=None if side is None else side.policy.name,
            threads=None if simulated else engine.threads,
            cpu=cpu_name(),
            text=text,
            random_tokens=random,
            repeats=repeats,
            warm_ups=warm,
        )

    def notes(self, results: Sequence[TestResult]) -> list[str]:
        """What a reader has to know of the figures."""
        warm = f"{self.warm_ups} warm-up run{'' if self.warm_ups == 1 else 's'} before"
        counts = [len(each.samples) for each in results] or [self.repeats]
        repeats = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        depths = sorted({each.prompt_tokens for each in results if each.new_tokens})
        found = [
            f"t/s: mean ± standard deviation of {repeats} repeat{'' if repeats == '1' else 's'}, {warm}; "
            f"all else: medians. GB/s: of weights. {self.text[:1].upper()}{self.text[1:]}"
            + "".join(f", generation behind {depth} tokens of it" for depth in depths)
            + "."
        ]
        if self.random_tokens:
            found.append("Random tokens route unrealistically: take real text for figures that are to mean something.")
        if self.simulated:
            found.append("Simulated: times are modelled for that server, not measured; Python's own time is not in.")
        return found


def _expert_bytes(spec: MoeSpec, weights: str, pack: Path | None) -> int:
    if pack is not None:
        return pack.stat().st_size
    formats = weights.split(", ")  # where layers differ, about: as if there were as many of each
    return sum(spec.expert_bytes(each) for each in formats if each in BITS_PER_WEIGHT) // len(formats)


def record(result: TestResult) -> dict[str, Any]:
    """The figures of one test, flat; the samples in lists."""
    said: dict[str, Any] = {
        "test": result.name,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "batch": result.batch,
        "tokens_per_s_mean": result.mean,
        "tokens_per_s_sd": result.deviation,
        "tokens_per_s_median": result.median,
        "first_token_s": result.first_seconds,
        "step_s": result.step_seconds,
        "hit_rate": result.hit_rate,
    }
    found = {each.name: each for each in result.resources}
    for name, key in _KEYS.items():
        each = found.get(name)
        said[f"{key}_gb_per_s"] = each.gb_per_s if each else None
        said[f"{key}_limit_gb_per_s"] = each.limit if each else None
        said[f"{key}_share"] = each.share if each else None
    said["samples_tokens_per_s"] = list(result.tokens_per_second)
    said["samples_s"] = list(result.seconds)
    said["samples_first_token_s"] = [sample.first_seconds for sample in result.samples]
    return said


def written(output: str, facts: Facts, results: Sequence[TestResult], *, complete: bool) -> str:
    """The figures as `output` of OUTPUTS, but for "table"."""
    if output == "md":
        return _markdown(facts, results)
    head = {**asdict(facts), "complete": complete}
    if output == "json":
        return json.dumps({**head, "tests": [record(each) for each in results]}, indent=2, ensure_ascii=False) + "\n"
    lines = [{**head, **record(each)} for each in results]
    if output == "jsonl":
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    rows = [{key: value for key, value in line.items() if not key.startswith("samples_")} for line in lines]
    text = io.StringIO()
    if rows:
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return text.getvalue()


def print_results(facts: Facts, results: Sequence[TestResult]) -> None:
    """For eyes, on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    tables = []
    for columns, rows in (_speeds(facts, results), _limits(results)):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="left" if column in _LEFT else "right", no_wrap=column in _WHOLE)
        for row in rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    console.print(Group(*tables, Text("\n".join(facts.notes(results)), style="dim")))


def _markdown(facts: Facts, results: Sequence[TestResult]) -> str:
    parts = []
    for columns, rows in (_speeds(facts, results), _limits(results)):
        ruler = ["---" if column in _LEFT else "---:" for column in columns]
        lines = [columns, ruler, *rows]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join([*parts, *facts.notes(results)]) + "\n"


def _speeds(facts: Facts, results: Sequence[TestResult]) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and rows, as of llama-bench."""
    weights = facts.weights if facts.dense == "stored" else f"{facts.weights} (other {facts.dense})"
    fixed = [
        facts.model, _size(facts.size_bytes), _params(facts.params), weights,
        f"{facts.device} (simulated)" if facts.simulated else facts.device,
        "-" if facts.threads is None else str(facts.threads),
    ]  # fmt: skip
    return _SPEEDS, [[*fixed, each.name, f"{each.mean:.2f} ± {each.deviation:.2f}"] for each in results]


def _limits(results: Sequence[TestResult]) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and rows of latencies, and of what the machine gave."""
    names = list(dict.fromkeys(resource.name for each in results for resource in each.resources))
    columns = ["test", "median t/s", "first token", "each step", "experts found"]
    rows = []
    for each in results:
        found = {resource.name: resource for resource in each.resources}
        hits, step = each.hit_rate, each.step_seconds
        rows.append(
            [
                each.name, f"{each.median:.2f}", _seconds(each.first_seconds), "-" if step is None else _seconds(step),
                "-" if hits is None else f"{hits:.1%}", *(_rate(found.get(name)) for name in names),
            ]
        )  # fmt: skip
    return [*columns, *names], rows


def _rate(resource: Resource | None) -> str:
    if resource is None:
        return "-"
    if resource.limit is None or resource.share is None:
        return f"{resource.gb_per_s:.2f} GB/s"
    return f"{resource.gb_per_s:.2f} of {resource.limit:.1f} GB/s ({resource.share:.0%})"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _params(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
