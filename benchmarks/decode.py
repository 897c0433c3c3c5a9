"""How fast does a whole model decode on this CPU, against transformers' fastest experts implementation, on the same
checkpoint?

Both models are in one process and take turns, round by round, generating from the same prompt with the same greedy
settings; prefill is timed apart (the first token). transformers runs with each of its experts implementations
first, and the fastest goes on to the rounds.
"""

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

import moe_offload
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.reporting import WORK, progress, spread, write_result
from moe_offload.cpu_kernels import ThreadTeam, measure_read_bandwidth
from moe_offload.statistics import Counts, Statistics

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each generated token comes, and what the engine had counted by then."""

    def __init__(self, statistics: Statistics | None) -> None:
        self.statistics = statistics
        self.times: list[float] = []
        self.counts: list[Counts] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.statistics is not None:
            self.counts.append(self.statistics.snapshot())

    def end(self) -> None:
        pass


class Run(NamedTuple):
    """One generation: seconds to the first token, median seconds of a later one, experts' GB/s in the later ones."""

    first: float
    each: float
    expert_gb_per_s: float


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> Run:
    """Generate `new_tokens` tokens greedily; the first is timed apart."""
    engine = getattr(model, "offload", None)
    clock = Clock(engine.statistics if engine is not None else None)
    started = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, streamer=clock,
    )  # fmt: skip
    times = clock.times[1:]  # the first put is the prompt
    decode = clock.counts[-1] - clock.counts[1] if clock.counts else Counts()
    each = median(b - a for a, b in zip(times, times[1:], strict=False))
    return Run(times[0] - started, each, decode.gigabytes_per_second)


def main(
    work_dir: Annotated[Path, typer.Option(help="Where the random checkpoint is made (and found again).")] = WORK,
    layers: Annotated[int, typer.Option(min=1, help="Layers of Qwen3 shape, 1.2 GB of experts each.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=3)] = 24,
    smoke: Annotated[bool, typer.Option(help="A quick run on a small shape; writes nothing.")] = False,
) -> None:
    """Compare end-to-end decoding by moe_offload and by transformers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if smoke:
        rounds, prompt_tokens, new_tokens = 2, 16, 4
    folder = make_checkpoint(work_dir, "small" if smoke else "qwen3", 2 if smoke else layers, progress)
    ids = torch.randint(3, 8000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    progress("loading both models")
    ours = moe_offload.load(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    tried = {}
    for name in IMPLEMENTATIONS:
        progress(f"warming up transformers with {name}")
        reference.set_experts_implementation(name)
        generate(reference, ids, 3)
        tried[name] = generate(reference, ids, max(4, new_tokens // 3)).each
    fastest = min(tried, key=tried.__getitem__)
    reference.set_experts_implementation(fastest)
    generate(ours, ids, new_tokens)

    team = ThreadTeam(ours.offload.threads)
    series: dict[str, list[Run]] = {"moe_offload": [], f"transformers {fastest}": []}
    limits = []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        limits.append(measure_read_bandwidth(team, seconds=0.5))
        series["moe_offload"].append(generate(ours, ids, new_tokens))
        series[f"transformers {fastest}"].append(generate(reference, ids, new_tokens))

    achieved = [run.expert_gb_per_s for run in series["moe_offload"]]
    limit, experts = median(limits), median(achieved)
    table = Table(
        "", "prefill t/s", "decode t/s", title=f"{prompt_tokens} prompt tokens, {new_tokens} new, batch 1, bf16"
    )
    rows: dict[str, Any] = {}
    for name, found in series.items():
        rows[name] = {
            "prefill_tokens_per_s": spread([prompt_tokens / run.first for run in found]),
            "decode_tokens_per_s": spread([1 / run.each for run in found]),
        }
        table.add_row(name, *(f"{rows[name][key]['median']:.1f}" for key in rows[name]))
    console = Console()
    console.print(table)
    ours_row, other = (rows[name] for name in series)
    ratios = {key: ours_row[key]["median"] / other[key]["median"] for key in ours_row}
    console.print(
        f"decode {ratios['decode_tokens_per_s']:.2f}x, prefill {ratios['prefill_tokens_per_s']:.2f}x transformers"
    )
    console.print(
        f"experts while decoding: {experts:.1f} GB/s, {experts / limit:.0%} of the read limit {limit:.1f} GB/s"
    )
    if not smoke:
        write_result(
            "decode",
            {
                "question": "end-to-end decode on CPU against transformers' fastest experts, same checkpoint, one run",
                "layers": layers, "rounds": rounds, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
                "threads": ours.offload.threads, "torch_threads": torch.get_num_threads(),
                "transformers_seconds_per_token": tried, "read_limit_gb_per_s": spread(limits),
                "expert_gb_per_s": spread(achieved), "share_of_limit": experts / limit, "ratios": ratios, **rows,
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
