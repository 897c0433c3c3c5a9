"""What the learned predictor costs at run time: microseconds a layer and batch, learning included, and memory.

    python -m benchmarks.predictor_cost [--smoke] [--threads N]

Qwen3-30B-A3B's shape: hidden 2048, 128 experts, 8 of them per token, 128 projections, and as many units and blocks as
train-predictor gives such a model, three layers ahead. 48 sources are used in turn, each with weights of its own, so
that none is in a cache when its turn comes. Beside it what reading a source's bytes takes at this machine's limit, and
what the experts of one such layer take (int4, routing drawn at random). Results: results/predictor_cost.json. --smoke:
small and few, nothing is written.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.reporting import progress, spread, write_result
from moe_offload.cpu_kernels.bandwidth import measure_read_bandwidth
from moe_offload.cpu_kernels.grouping import group_tokens
from moe_offload.cpu_kernels.layout import Activation
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.team import Team, ThreadTeam, aligned_bytes
from moe_offload.predictor.adaptation import Adaptation
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.predictor.fast_weights import Look, look_ahead
from moe_offload.predictor.network import Block, SourceNetwork, input_size
from moe_offload.predictor.trace import DISTANCES
from moe_offload.predictor.training import choose_units, has_block

Floats = NDArray[np.float32]
TOKENS = (1, 4, 16, 64)


class Shape(NamedTuple):
    """A model's, and its predictor's."""

    layers: int = 48
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    projected: int = 128


SMALL = Shape(4, 128, 64, 16, 2, 16)


def network(shape: Shape, deep: bool, rng: np.random.Generator) -> SourceNetwork:
    """Weights of no meaning."""

    def r(*size: int) -> Floats:
        return np.asarray(rng.standard_normal(size, np.float32) / np.sqrt(size[-1]), np.float32)

    inputs = input_size(shape.experts, shape.projected)
    m = choose_units(shape.experts, shape.projected, shape.hidden, deep)
    blocks = (Block(r(m, m), r(m), r(m, m)),) if deep else ()
    return SourceNetwork(
        r(shape.projected, shape.hidden), r(shape.projected), r(m, inputs), r(m), r(m, inputs), r(m), blocks,
        r(DISTANCES, shape.experts, m), r(DISTANCES, shape.experts), np.full((2, DISTANCES), 1.5, np.float32),
        np.full((2, DISTANCES), -0.3, np.float32),
    )  # fmt: skip


def make(shape: Shape, team: Team, *, units: bool) -> FastNetwork:
    """One for each layer, as training shapes them."""
    rng = np.random.default_rng(0)
    looks = [
        Look(rng.standard_normal((DISTANCES, shape.experts, shape.hidden), np.float32),
             np.zeros((DISTANCES, shape.experts), np.float32))
        for _ in range(2)
    ]  # fmt: skip
    networks = [network(shape, deep, rng) if units else look_ahead(shape.experts) for deep in (False, True)]
    depth = [has_block(at, shape.layers) for at in range(shape.layers)]
    return FastNetwork([looks[at % 2] for at in range(shape.layers)], [networks[d] for d in depth], shape.top_k, team)


def choices(tokens: int, shape: Shape, rng: np.random.Generator) -> NDArray[np.int64]:
    """[T, K]"""
    return np.argsort(rng.random((tokens, shape.experts)), axis=1)[:, : shape.top_k].copy()


class Times(NamedTuple):
    """Seconds of single calls."""

    predict: list[float]
    learn: list[float]  # recording and learning, mean over a step's layers


def measure(fast: FastNetwork, shape: Shape, tokens: int, steps: int) -> Times:
    """Whole decode steps, one source after the other."""
    rng = np.random.default_rng(tokens)
    adaptation = Adaptation(fast, learn=True)
    hidden = [rng.standard_normal((tokens, shape.hidden), np.float32) for _ in range(4)]
    chosen = [choices(tokens, shape, rng) for _ in range(4)]
    times = Times([], [])
    for step in range(steps + 2):
        fast.begin_step(tokens, 1, anew=step == 0)
        learning = 0.0
        for layer in range(shape.layers):
            x, routed = hidden[layer % 4], chosen[(layer + step) % 4]
            began = time.perf_counter()
            fast.predict(layer, x, routed if layer else None)
            predicted = time.perf_counter()
            adaptation.record(layer)
            adaptation.observe(layer, routed)
            learning += time.perf_counter() - predicted
            fast.observe(layer, routed)
            if step >= 2:
                times.predict.append(predicted - began)
        if step >= 2:
            times.learn.append(learning / shape.layers)
    return times


def experts_seconds(shape: Shape, tokens: int, team: Team, rounds: int) -> float:
    """The median of one layer's experts, int4, out of memory that no cache holds."""
    record = ExpertRecord(shape.hidden, shape.intermediate, "int4")
    kernel = PackedExpertKernel(record, Activation("silu"))
    memory = aligned_bytes(record.nbytes * shape.experts)
    memory[:] = np.resize(np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8), memory.size)
    scales = record.up_matrix
    for matrix, at in zip((scales, scales, record.down_matrix), record.offsets[:3], strict=True):
        for expert in range(shape.experts):
            part = memory[expert * record.nbytes + at :][: matrix.nbytes].reshape(-1, matrix.record_bytes)
            part[:, matrix.scales_at :].view(np.float16)[...] = 0.01
    first = int(memory.ctypes.data)
    offsets = record.offsets
    table = np.array([[first + each * record.nbytes + at for at in offsets] for each in range(shape.experts)], np.int64)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, shape.hidden), np.float32)
    found = []
    for _ in range(rounds):
        index = choices(tokens, shape, rng)
        groups = group_tokens(index, np.full(index.shape, 1 / shape.top_k, np.float32), shape.experts)
        out = np.zeros_like(x)
        began = time.perf_counter()
        kernel(table, groups, x, out, team)
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--threads", type=int, default=default_threads())
    asked = parser.parse_args()
    shape, steps = (SMALL, 2) if asked.smoke else (Shape(), 30)
    with ThreadTeam(asked.threads) as team:
        limit = measure_read_bandwidth(team, 64 if asked.smoke else 1024, 0.05 if asked.smoke else 1.0)
        cells = []
        memory = {}
        for kind in ("learned", "look-ahead"):
            fast = make(shape, team, units=kind == "learned")
            for tokens in TOKENS:
                times = measure(fast, shape, tokens, steps)
                experts = experts_seconds(shape, tokens, team, 2 if asked.smoke else 12)
                us = {name: spread([value * 1e6 for value in each]) for name, each in times._asdict().items()}
                read = float(np.mean([each.read_bytes for each in fast.sources]))
                cells.append(
                    {
                        "predictor": kind,
                        "tokens": tokens,
                        "predict_us": us["predict"],
                        "learn_us_per_layer": us["learn"],
                        "at_read_limit_us": read / limit / 1e3,
                        "experts_us": experts * 1e6,
                        "share_of_experts": us["predict"]["median"] / (experts * 1e6),
                    }
                )
                progress(
                    f"{kind}, {tokens} tokens: {us['predict']['median']:.0f} us (best {us['predict']['min']:.0f}, read "
                    f"limit {read / limit / 1e3:.0f}), learning {us['learn']['median']:.1f} us, "
                    f"{us['predict']['median'] / (experts * 1e4):.1f} % of a layer's experts"
                )
            memory[kind] = max(each.nbytes for each in fast.sources)
    if asked.smoke:
        print(f"smoke: predictor_cost, {len(cells)} cells")  # noqa: T201
        return
    result = {"threads": asked.threads, "read_limit_gb_per_s": limit, "memory_per_source": memory, "cells": cells}
    progress(str(write_result("predictor_cost", result)))


if __name__ == "__main__":
    main()
