"""How fast is every scheduling policy, ours among them, on eight virtual servers? Simulated, all of it.

    python -m benchmarks.servers [--server p100] [--shape qwen3] [--batch 16] [--smoke]

A cell is a server, a model and a batch; every policy decodes the same routing (routing.py) with the same measured
costs, launches and cache (simulation.py). Then prompts of 512 tokens. What the guard costs is measured apart, in a few
long runs: in a short one its first trial would count too much.
"oracle" is ours with knowledge of the next 8 steps' routing, "oracle-next" of every layer's next call.
"""

from dataclasses import asdict
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import progress, write_result
from benchmarks.servers.routing import Choices, demo, generate, repeats
from benchmarks.servers.shapes import DEMO, MEASURED, SHAPES, Shape
from benchmarks.servers.simulation import (
    CONTEXT,
    FORESEEN,
    MOST,
    NEXT_ONLY,
    WORKSPACE,
    Result,
    Steps,
    run_cell,
    run_prompt,
)
from benchmarks.servers.summary import ORACLE, OURS, Cell, summarise
from moe_offload.scheduling.policies import POLICIES
from moe_offload.transfer.server_profile import PROFILES

BATCHES = (1, 4, 16, 64)
# More tokens in a step, fewer steps.
STEPS = {1: Steps(48, 10, 14), 4: Steps(48, 10, 10), 16: Steps(32, 8, 6), 64: Steps(16, 6, 4)}
# What the guard costs shows in the long run: server, part of a model's name, batch. Its first trial is counted.
GUARDED = (("rtx2080ti", "demo", 4), ("p100", "gpt-oss", 4), ("t4", "mixtral", 1), ("a100", "deepseek", 1))
GUARDED_STEPS = Steps(48, 1, 400)
PROMPT_TOKENS, PROMPTS_SEEN = 512, 1
PROMPT_POLICIES = ("static", "static-offload32", "lru", "ours")
SMOKE = Steps(4, 3, 2)
MEASURED_SERVER = "v100-6230r"


def routing(shape: Shape, batch: int, steps: int) -> Choices:
    """What the routers choose."""
    return demo(shape.layers, batch, steps) if shape is DEMO else generate(shape, batch, steps)


def decode(server: str, shape: Shape, choices: Choices, steps: Steps) -> Cell | None:
    """Every policy's decode steps; None where the model does not fit the card."""
    results: dict[str, Result] = {}
    for policy in (*POLICIES, NEXT_ONLY):
        result = run_cell(server, shape, policy, choices, steps, guarded=False)
        if result is None:
            return None
        results[policy] = result
    return Cell(server, shape.name, shape.kind, choices.shape[2], False, results)


def prefill(server: str, shape: Shape, choices: Choices) -> Cell | None:
    """A prompt by the policies that differ there."""
    results = {policy: run_prompt(server, shape, policy, choices, PROMPTS_SEEN) for policy in PROMPT_POLICIES}
    found = {policy: result for policy, result in results.items() if result is not None}
    return Cell(server, shape.name, shape.kind, choices.shape[2], True, found) if found else None


def guard_costs() -> list[dict[str, object]]:
    """Tokens per second with the guard and without it, in long runs."""
    found = []
    for server, name, batch in GUARDED:
        shape = next(each for each in SHAPES if name in each.name.lower())
        progress(f"{shape.name}, batch {batch}, {GUARDED_STEPS.counted} steps")
        choices = routing(shape, batch, GUARDED_STEPS.total)
        row: dict[str, object] = {"server": server, "shape": shape.name, "batch": batch}
        for key, policy, guarded in (("guarded", OURS, True), ("alone", OURS, False), ("static", "static", False)):
            result = run_cell(server, shape, policy, choices, GUARDED_STEPS, guarded=guarded)
            row[key] = None if result is None else round(result.tokens_per_second, 2)
        found.append(row)
    return found


def show(console: Console, cells: list[Cell]) -> None:
    """A table for each server and model."""
    for key in dict.fromkeys((cell.server, cell.shape, cell.kind, cell.prompt) for cell in cells):
        group = [cell for cell in cells if (cell.server, cell.shape, cell.kind, cell.prompt) == key]
        server, shape, kind, prompt = key
        slots = " / ".join(dict.fromkeys(str(cell.results[OURS].slots) for cell in group))
        what = "prompt t/s" if prompt else "decode t/s"
        table = Table("", *(f"{cell.batch}" for cell in group), title=f"{server}, {shape} {kind}: simulated {what}")
        for policy in group[0].results:
            row = []
            for cell in group:
                share = "" if ORACLE not in cell.results else f" {cell.speed(policy) / cell.speed(ORACLE):4.0%}"
                row.append(f"{'*' if policy == OURS and cell.lead < 0.99 else ''}{cell.speed(policy):.1f}{share}")
            table.add_row(policy, *row)
        table.caption = f"{slots} slots; beside: share of the oracle"
        console.print(table)


def main(
    server: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PROFILES)}; all if not given.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Part of a model's name; all if not given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; 1, 4, 16 and 64 if not given.")] = None,
    smoke: Annotated[bool, typer.Option(help="Two servers, one model, few steps; writes nothing.")] = False,
) -> None:
    """Compare scheduling policies on virtual servers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    servers, batches = list(server or PROFILES), list(batch or BATCHES)
    wrong = [name for name in servers if name not in PROFILES] + [str(b) for b in batches if b not in BATCHES]
    if wrong:
        raise typer.BadParameter(f"{', '.join(wrong)}: servers are {', '.join(PROFILES)}, batches 1, 4, 16 and 64")
    if smoke:
        servers, batches = ["gtx1080ti", "a100"], [1, 16]
    shapes = [each for each in SHAPES if not shape or any(part.lower() in each.name.lower() for part in shape)]
    pairs = [(each, servers) for each in (shapes[:1] if smoke else shapes)]
    if MEASURED_SERVER in servers and not smoke:
        kept = [each for each in MEASURED if not shape or any(part.lower() in each.name.lower() for part in shape)]
        pairs += [(each, [MEASURED_SERVER]) for each in kept]
    cells, left_out, found_repeats = [], [], {}
    for each, on in pairs:
        for count in batches:
            steps = SMOKE if smoke else STEPS[count]
            progress(f"{each.name} {each.kind}, batch {count}")
            choices = routing(each, count, steps.total)
            if count == 1:
                found_repeats[each.name] = round(repeats(choices), 3)
            for name in on:
                cell = decode(name, each, choices, steps)
                if cell is None:
                    left_out.append({"server": name, "shape": each.name, "kind": each.kind, "batch": count})
                else:
                    cells.append(cell)
    prompts = []
    for each, on in pairs if not smoke else []:
        progress(f"{each.name} {each.kind}, prompts")
        choices = routing(each, PROMPT_TOKENS, 1 + PROMPTS_SEEN)
        prompts += [cell for name in on if (cell := prefill(name, each, choices)) is not None]
    console = Console()
    show(console, cells + prompts)
    if left_out:
        console.print(f"not on the card: {left_out}")
    summary = summarise(cells)
    console.print(f"{'smoke: ' if smoke else ''}decode, {summary}")
    if smoke:
        return
    console.print(f"prompts of {PROMPT_TOKENS} tokens, {summarise(prompts)}")
    if not (server or shape or batch):
        guard = guard_costs()
        for row in guard:
            console.print(f"simulated, with the guard's trials and without: {row}")
        write_result(
            "servers",
            {
                "question": "simulated tokens per second of every policy on virtual servers, as shares of an oracle's",
                "simulated": "all figures are of a virtual accelerator's clock, with estimated servers",
                "context": CONTEXT, "most_experts_on_device": MOST, "workspace_bytes": WORKSPACE,
                "oracle_foresees_steps": FORESEEN,
                "steps": {count: asdict(steps) for count, steps in STEPS.items()},
                "repeats": found_repeats,
                "summary": asdict(summary), "prompts_summary": asdict(summarise(prompts)),
                "guard": guard, "not_on_the_card": left_out,
                "decode": [cell.to_dict() for cell in cells], "prompts": [cell.to_dict() for cell in prompts],
            },
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
