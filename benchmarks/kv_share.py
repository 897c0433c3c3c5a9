"""Who should have the card's memory as the context grows: KV cache, or expert slots? Simulated.

The product's division (`scheduling/memory_share.py`) with calibrated costs of a virtual server, against both rules of
thumb: all KV caches on the card, or all in host memory. What a division saves is counted in seconds of a decode step,
against no KV cache and no expert on the card. Routing is taken as even, kernels of experts as grouped.
"""

from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import write_result
from benchmarks.servers.shapes import SHAPES, Shape
from benchmarks.servers.simulation import WORKSPACE, measured_costs
from moe_offload.attention_layers import AttentionLayer
from moe_offload.device_kv import AttentionWork
from moe_offload.scheduling.memory_share import LayerKv, MemoryShare, ShareDemand, benefit, divide
from moe_offload.scheduling.prefetch import savings
from moe_offload.transfer.server_profile import PROFILES, find_profile
from moe_offload.transfer.virtual import VirtualAccelerator

BATCHES = (1, 8)
CONTEXTS = (1024, 8192, 32768)
MODELS = ("Mixtral-8x7B", "Qwen3-30B-A3B")


class Rule(NamedTuple):
    """A division: layers whose KV cache is on the card, slots, and seconds that it saves; None: it does not fit."""

    layers: int
    slots: int
    saved: float | None


def demand_of(server: str, shape: Shape, batch: int, length: int) -> ShareDemand:
    """What the engine would ask `divide`."""
    profile = find_profile(server)
    costs = measured_costs(profile, shape)
    width = shape.kv_bytes // shape.layers
    layers = tuple(AttentionLayer(index, None, "sdpa", "", width, 0) for index in range(shape.layers))
    with VirtualAccelerator(profile, ghost=True) as accelerator:
        attention = AttentionWork(accelerator, layers, 1)
    presence = 1 - (1 - shape.top_k / shape.experts) ** batch
    even = np.full(shape.layers * shape.experts, presence)
    rows = np.full(len(even), batch * shape.top_k / shape.experts)
    return ShareDemand(
        tuple(LayerKv(width * batch) for _ in layers), length, length,
        lambda layer, n: attention.host(layer, batch, n), lambda layer, n: attention.device(layer, batch, n),
        savings(even, rows, costs.layer_costs(shape.kind)), shape.expert_bytes,
        profile.memory_bytes - shape.dense_bytes - WORKSPACE,
    )  # fmt: skip


def rule(demand: ShareDemand, on_device: bool) -> Rule:
    """All KV caches on one side, slots beside them."""
    here = (on_device,) * len(demand.layers)
    nbytes = demand.kv_bytes(here)
    if nbytes > demand.budget:
        return Rule(0, 0, None)
    share = MemoryShare(here, demand.slots_beside(nbytes))
    return Rule(sum(here), share.slots, benefit(share, demand))


def main(
    server: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "",
    smoke: Annotated[bool, typer.Option(help="One server; writes nothing.")] = False,
) -> None:
    """Compare the division with both rules of thumb."""
    servers = [server] if server else ["gtx1080ti"] if smoke else ["gtx1080ti", "p40", "v100-6230r"]
    console, cells = Console(), []
    for name in servers:
        table = Table(
            "model", "sequences", "context", "KV layers on the card", "slots", "saved, ms/step", "all on the card",
            "all in host memory", title=f"virtual {name}, simulated",
        )  # fmt: skip
        for shape in (each for each in SHAPES if each.name in MODELS):
            for batch in BATCHES:
                for length in CONTEXTS:
                    demand = demand_of(name, shape, batch, length)
                    if demand.budget <= 0:
                        continue
                    share = divide(demand)
                    ours = Rule(sum(share.kv_on_device), share.slots, benefit(share, demand))
                    others = {"card": rule(demand, True), "host": rule(demand, False)}
                    cell: dict[str, Any] = {
                        "server": name, "model": shape.name, "batch": batch, "context": length,
                        "ours": ours._asdict(), **{key: each._asdict() for key, each in others.items()},
                    }  # fmt: skip
                    cells.append(cell)
                    table.add_row(
                        shape.name, str(batch), str(length), f"{ours.layers} of {shape.layers}", str(ours.slots),
                        _ms(ours.saved), *(_ms(each.saved) for each in others.values()),
                    )  # fmt: skip
        console.print(table)
    if not smoke:
        write_result(
            "kv_share",
            {"question": "device memory between KV cache and expert slots; simulated, seconds saved", "cells": cells},
        )


def _ms(seconds: float | None) -> str:
    return "does not fit" if seconds is None else f"{seconds * 1e3:.2f}"


if __name__ == "__main__":
    typer.run(main)
