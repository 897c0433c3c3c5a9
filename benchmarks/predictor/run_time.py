"""Does the int8 network that runs name the same experts as its definition in f32?

    python -m benchmarks.predictor.run_time PREDICTOR

The demo model reads a file that it was not trained on, in one sequence, token by token as in decoding; both networks
see its hidden states. Recall of both against what the routers chose, by distance, and how far apart their
probabilities are. Writes results/predictor_run_time.json.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import moe_offload
from benchmarks.reporting import write_result
from moe_offload.cpu_kernels.team import ThreadTeam
from moe_offload.models.routers import normalised, read_routers
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.predictor.fast_weights import Look
from moe_offload.predictor.network import DECAY, Known, SourceNetwork, corrected, to_probabilities
from moe_offload.predictor.network_file import read_networks
from moe_offload.predictor.trace import DISTANCES
from moe_offload.tracing import watch

_ROOT = Path(__file__).parents[2]
_TEXT = _ROOT / "tests" / "data" / "held_out_sched.txt"
_TOKENS = 1024

Floats = NDArray[np.float32]


class Seen:
    """Hidden states and choices of one sequence."""

    def __init__(self, model: Any, ids: list[int]) -> None:
        self.states: list[Floats] = []  # by source [T, H]
        self.chosen: list[NDArray[np.int64]] = []  # by layer [T, K]
        with watch(model, lambda x: self.states.append(normalised(x)), self._on_experts), torch.inference_mode():
            model.base_model(input_ids=torch.tensor([ids]), use_cache=False)

    def _on_experts(self, layer: int, hidden: Floats, index: NDArray[np.int64], weights: Floats) -> None:
        self.states.append(hidden.copy())
        self.chosen.append(index)

    def multi_hot(self, layer: int, experts: int) -> Floats:
        """[T, E]"""
        found = np.zeros((len(self.chosen[layer]), experts), np.float32)
        np.put_along_axis(found, self.chosen[layer], 1.0, axis=1)
        return found


def by_definition(network: SourceNetwork, look: Floats, seen: Seen, source: int, top_k: int) -> Floats:
    """[T, D, E] probabilities of tokens that come one at a time."""
    tokens, _, experts = look.shape
    layers = len(seen.chosen)
    state = seen.states[source] @ network.projection.T - network.offset
    recent = np.zeros_like(state)
    for token in range(1, tokens):
        recent[token] = DECAY * recent[token - 1] + (1 - DECAY) * state[token - 1]
    before = np.zeros((tokens, DISTANCES, experts), np.float32)
    for each in range(min(DISTANCES, layers - source)):
        before[1:, each] = seen.multi_hot(source + each, experts)[:-1]
    chosen = seen.multi_hot(source - 1, experts) if source else np.zeros((tokens, experts), np.float32)
    known = (np.arange(tokens) > 0).astype(np.float32)
    scores = corrected(network, Known(look, chosen, before, known, state, recent))
    alone, with_before = (to_probabilities(network, scores, top_k, known=flag) for flag in (False, True))
    return np.where(known[:, None, None] > 0, with_before, alone)


def at_run_time(fast: FastNetwork, seen: Seen, source: int) -> Floats:
    """The same from the network that runs."""
    found = []
    for token in range(len(seen.states[0])):
        fast.begin_step(1, 1, anew=token == 0)
        here = slice(token, token + 1)
        hidden = np.ascontiguousarray(seen.states[source][here], np.float32)
        batch = fast.predict(source, hidden, seen.chosen[source - 1][here] if source else None)
        found.append(batch.presence.astype(np.float32))
        for layer, chosen in enumerate(seen.chosen):
            fast.observe(layer, chosen[here])
    return np.stack(found)


def recall(probabilities: Floats, chosen: NDArray[np.int64]) -> float:
    """Slot recall@K of [T, E]."""
    top_k = chosen.shape[1]
    best = np.argpartition(-probabilities, top_k - 1, axis=1)[:, :top_k]
    return float((chosen[:, :, None] == best[:, None, :]).any(2).mean())


def main(
    predictor: Annotated[Path, typer.Argument(help="A predictor of the demo model.")],
) -> None:
    """Compare the network at run time with its definition."""
    folder = _ROOT / "models" / "demo"
    model: Any = moe_offload.load(folder, device="cpu")
    ids = AutoTokenizer.from_pretrained(folder)(_TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"][:_TOKENS]
    seen = Seen(model, ids)
    sources = read_routers(model).sources
    networks = read_networks(predictor).networks
    looks = [Look(each.rows, each.bias, each.select, each.selection_bias) for each in sources]
    top_k, layers = seen.chosen[0].shape[1], len(seen.chosen)
    rows = []
    with ThreadTeam(1) as team:
        fast = FastNetwork(looks, networks, top_k, team)
        for source in range(layers):
            look = sources[source].look(seen.states[source])
            exact = by_definition(networks[source], look, seen, source, top_k)
            runs = at_run_time(fast, seen, source)
            for each in range(min(DISTANCES, layers - source)):
                pair = [recall(p[:, each], seen.chosen[source + each]) for p in (exact, runs)]
                rows.append(
                    {
                        "layer": source + each, "distance": each + 1, "recall_f32": pair[0], "recall_int8": pair[1],
                        "mean_difference": float(np.abs(exact[:, each] - runs[:, each]).mean()),
                    }
                )  # fmt: skip
    table = Table("distance", "recall, f32", "recall, int8", "mean difference of probabilities")
    for distance in range(1, DISTANCES + 1):
        mine = [row for row in rows if row["distance"] == distance]
        columns = ("recall_f32", "recall_int8", "mean_difference")
        means = [float(np.mean([row[name] for row in mine])) for name in columns]
        table.add_row(str(distance), f"{means[0]:.2%}", f"{means[1]:.2%}", f"{means[2]:.4f}")
    Console().print(table)
    model.offload.close()
    write_result(
        "predictor_run_time",
        {
            "question": "whether the int8 network names the experts that its definition names",
            "tokens": len(ids),
            "cells": rows,
        },
    )


if __name__ == "__main__":
    typer.run(main)
