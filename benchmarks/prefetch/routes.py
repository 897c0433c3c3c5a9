"""What is run: the demo model's real routing on held-out text, and a synthetic model of full size."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.prefetch.foresight import of_predictor
from benchmarks.prefetch.simulation import Way, of_layers
from benchmarks.servers.routing import Choices
from benchmarks.servers.shapes import DEMO, SHAPES, Shape
from benchmarks.servers.simulation import Steps
from moe_offload.predictor.baselines import LookAhead, Perfect
from moe_offload.predictor.interface import Predictor
from moe_offload.predictor.synthetic import Routing, Size, synthetic_trace
from moe_offload.predictor.trace import TEST, TRAIN, VALIDATION, Trace

Sequences = NDArray[np.int64]
QWEN3 = next(shape for shape in SHAPES if shape.experts == 128)
# Qwen3-30B: skew and repeats as benchmarks/servers has them, the look-ahead's recall as published
PUBLISHED = Routing(popular=0.6, repeats=0.40, recall=(0.886, 0.85, 0.81))
FULL_SIZE = Size(layers=12, experts=64, sequences=80, tokens=64)
CEILING = "ceiling"


class Route(NamedTuple):
    """shape: its bytes and times. held_out: sequences of `trace` that are run. predictors: fitted on other ones."""

    name: str
    shape: Shape
    trace: Trace
    held_out: Sequences
    predictors: tuple[Predictor, ...]

    def tokens(self, batch: int, steps: int, part: float = 0.0) -> NDArray[np.int64]:
        """[steps, T] tokens of the trace: sequences one behind the other, each stream beginning elsewhere, the first
        one at this part of the trace.
        """
        found = self.trace.tokens(self.held_out)
        step, stream = np.ogrid[:steps, :batch]
        return np.asarray(found[(int(part * len(found)) + step + stream * max(len(found) // batch, 1)) % len(found)])

    def choices(self, tokens: NDArray[np.int64]) -> Choices:
        """[steps, L, T, K] of these tokens."""
        return np.asarray(self.trace.experts[:, tokens].transpose(1, 0, 2, 3), np.int64)

    def ways(self, tokens: NDArray[np.int64], seconds: float) -> Mapping[str, Way]:
        """By name, every way to look ahead; seconds: of a predictor, for a layer. None is first, the ceiling last.

        The last predictor is run once more as if it took no time: what its time takes away.
        """
        said = {each.name: of_predictor(each, self.trace, tokens, seconds) for each in self.predictors}
        last = self.predictors[-1].name
        known = of_predictor(Perfect(), self.trace, tokens, 0.0)
        return {
            "none": Way("none"), "popularity": Way("popularity"), **{name: Way(each) for name, each in said.items()},
            f"{last}, free": Way(said[last]._replace(seconds=0.0)), Perfect.name: Way(known),
            CEILING: Way(known, forced=True),
        }  # fmt: skip


def demo_route(trace: Trace, train: Trace | None = None, learned: tuple[Predictor, ...] = ()) -> Route:
    """The demo model's layers and routing, with experts of a size that is worth offloading.

    Look-ahead is calibrated on the training sequences of `train`; without that on one half of the held-out sequences,
    and the other half is run.
    """
    shape = replace(of_layers(DEMO, trace.info.layers), experts=trace.info.experts, top_k=trace.info.top_k)
    held_out = trace.in_split(TEST)
    if train is None:
        look_ahead, held_out = LookAhead.fit(trace, held_out[::2]), held_out[1::2]
    else:
        look_ahead = LookAhead.fit(train, train.in_split(TRAIN))
    return Route("demo", shape, trace, held_out, (look_ahead, *learned))


def synthetic_route(size: Size = FULL_SIZE, routing: Routing = PUBLISHED, shape: Shape = QWEN3) -> Route:
    """A model of Qwen3-30B-A3B's size with made-up routing, as predictable as published."""
    trace = synthetic_trace(size, routing)
    shape = replace(of_layers(shape, size.layers), experts=size.experts, top_k=size.top_k)
    return Route(
        "synthetic", shape, trace, trace.in_split(VALIDATION, TEST), (LookAhead.fit(trace, trace.in_split(TRAIN)),)
    )


StepsOf = Callable[[int], Steps]


def demo_steps(batch: int) -> Steps:
    """Few layers, many steps; the first trials of the guard and the gate are over when counting begins."""
    return Steps(32, 128, 96)


def synthetic_steps(batch: int) -> Steps:
    """Fewer where they take longer."""
    return Steps(16, 96, 64) if batch < 16 else Steps(16, 64, 32)
