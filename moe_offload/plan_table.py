"""A plan for human eyes, and for machines."""

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload.memory import format_bytes
from moe_offload.plan_model import Plan
from moe_offload.plan_predict import Prediction

_COLOURS = {"fits": "green", "runs from disk": "yellow", "does not fit": "red"}
_WIDTH = 100  # where stdout is no terminal


def print_plan(plan: Plan) -> None:
    """Three tables and a line on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(Group(_head(plan), Text(), _places(plan), *_speeds(plan), _note(plan)))


def _head(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    server = plan.server
    table.add_row("model", Text(plan.model, style="bold"))
    table.add_row("server", server.name + (" (simulated)" if server.simulated else ""))
    table.add_row("experts", f"{plan.sizes.weights}, other linears on the CPU {plan.sizes.dense}")
    table.add_row("for", f"{plan.wish.sequences} x {plan.wish.context} positions (sequences x context)")
    table.add_row("verdict", Text(plan.verdict, style=_COLOURS[plan.verdict]))
    if plan.reason:
        table.add_row("because", plan.reason)
        table.add_row("it fits with", " | or ".join(plan.changes) or "no single change")
    return table


def _places(plan: Plan) -> Table:
    place, budgets = plan.placement, plan.wish.budgets
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("where")
    for title in ("non-expert", "KV cache", "experts", "other", "in all", "of"):
        table.add_column(title, justify="right", no_wrap=True)
    if budgets.gpu:
        rows = (place.gpu_dense, place.gpu_kv, place.gpu_experts, place.gpu_spare, place.gpu)
        name = f"card ({place.slots} of {plan.sizes.expert_count} experts)"
        table.add_row(name, *map(format_bytes, rows), format_bytes(budgets.gpu))
    rows = (place.ram_dense, place.ram_kv, place.ram_experts, place.ram_program, place.ram)
    table.add_row("memory", *map(format_bytes, rows), format_bytes(budgets.ram))
    if place.disk:
        table.add_row("disk", "", "", format_bytes(place.disk), "", format_bytes(place.disk), "")
    return table


def _speeds(plan: Plan) -> list[Table]:
    if plan.decode is None or plan.prompt is None:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("predicted")
    table.add_column("tokens/s", justify="right")
    table.add_column("limited by")
    sequences = plan.wish.sequences
    name = "decode" if sequences == 1 else f"decode, {sequences} sequences together"
    for title, found in ((name, plan.decode), (f"prompt of {plan.prompt.tokens}", plan.prompt)):
        share = found.parts[found.limit] / found.seconds
        table.add_row(title, _rate(found), f"{found.limit} ({share:.0%} of the time)")
    return [table]


def _rate(found: Prediction) -> str:
    rate = found.tokens_per_second
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _note(plan: Plan) -> Text:
    return Text("Assumed: " + "; ".join(plan.assumptions) + ".", style="dim")


def to_dict(plan: Plan) -> dict[str, Any]:
    """For --json: bytes, seconds, tokens per second."""
    place, wish = plan.placement, plan.wish
    return {
        "model": plan.model,
        "server": plan.server.name,
        "simulated": plan.server.simulated,
        "device": plan.server.card.device if plan.server.card else None,
        "weights": plan.sizes.weights,
        "dense": plan.sizes.dense,
        "context": wish.context,
        "batch": wish.sequences,
        "verdict": plan.verdict,
        "reason": plan.reason,
        "changes": list(plan.changes),
        "gpu": {
            "budget": wish.budgets.gpu, "non_expert": place.gpu_dense, "kv": place.gpu_kv,
            "experts": place.gpu_experts, "spare": place.gpu_spare, "slots": place.slots,
            "kv_layers": place.kv_layers, "lacking": place.lacking_gpu,
        } if wish.budgets.gpu else None,
        "ram": {
            "budget": wish.budgets.ram, "non_expert": place.ram_dense, "kv": place.ram_kv,
            "experts": place.ram_experts, "program": place.ram_program, "lacking": place.lacking_ram,
        },
        "disk": {"experts": place.disk},
        "expert_count": plan.sizes.expert_count,
        "expert_bytes": plan.sizes.expert_bytes,
        "host_read_gb_per_s": plan.read_gbs,
        "decode": _speed(plan.decode),
        "prefill": _speed(plan.prompt),
        "assumptions": list(plan.assumptions),
    }  # fmt: skip


def _speed(found: Prediction | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "tokens": found.tokens, "seconds": found.seconds, "tokens_per_second": found.tokens_per_second,
        "limit": found.limit, "seconds_by_resource": found.parts,
    }  # fmt: skip
