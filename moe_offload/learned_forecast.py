"""A learned predictor behind the prefetcher's forecast: what the next layers' calls will want, made when it is asked.

At each MoE layer the engine notes what went into the layer's experts. From that the network can tell the three layers
that follow; it is promised to the forecast, and computed only if the prefetcher asks, which it does when all of the
layer's work is enqueued on the device. A promise dies with the next layer's note. What a prediction costs grows with
the tokens: from `SPARSE` of them on every other layer makes one, and the layer between goes by that, from one more
layer away.

The time that a prediction takes is the host's. On a simulated accelerator it is charged like the experts' work: a job
that reads the source's weights.
"""

import time
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from moe_offload.predictor.adaptation import Adaptation
from moe_offload.predictor.fast_network import MOST_ROWS, Batch, FastNetwork
from moe_offload.predictor.trace import DISTANCES
from moe_offload.predictor_stats import PredictorStats
from moe_offload.scheduling.predicted import Foreseen, PredictedUse
from moe_offload.transfer.accelerator import Accelerator, Work

SPARSE = 8  # tokens
_TIMED = 1024  # calls whose time is remembered


class Step(NamedTuple):
    """A forward pass: the next `length` tokens of each sequence; anew: the first ones."""

    sequences: int
    length: int
    anew: bool


def step_of(kwargs: dict[str, Any]) -> Step:
    """What a model's forward with these arguments is about to go through."""
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None or inputs.dim() < 2:
        return Step(0, 1, True)
    cache = kwargs.get("past_key_values")
    anew = not isinstance(cache, Cache) or int(cache.get_seq_length()) == 0
    return Step(int(inputs.shape[0]), int(inputs.shape[1]), anew)


class LearnedForecast:
    """Ties a network to a forecast. One forward pass at a time, layers in order.

    name: for people. adapt: whether the network follows the traffic.
    """

    def __init__(
        self, network: FastNetwork, forecast: PredictedUse, accelerator: Accelerator, name: str, *, adapt: bool
    ) -> None:
        self.network, self.name = network, name
        self.adaptation = Adaptation(network, learn=adapt)
        self._forecast, self._accelerator = forecast, accelerator
        self._source, self._layer = 0, -1
        self._hidden: NDArray[np.float32] | None = None
        self._chosen: NDArray[np.int64] | None = None
        self._made: Batch | None = None
        self._calls = 0
        self._seconds: deque[float] = deque(maxlen=_TIMED)

    def begin_step(self, step: Step) -> None:
        """A forward pass begins."""
        self._forget()
        self._layer = -1
        self.network.begin_step(step.sequences, step.length, anew=step.anew)

    def note(self, layer: int, hidden: NDArray[np.float32], chosen: NDArray[np.int64]) -> None:
        """What the layer's experts get [T, H], and which they are [T, K]. `hidden` is read until the next note."""
        if layer <= self._layer:  # a forward pass that nobody announced, of unknown sequences
            self.begin_step(Step(0, max(len(chosen), 1), True))
        self._forget()
        self._layer = layer
        self.adaptation.observe(layer, chosen)
        self.network.observe(layer, chosen)
        sparse = len(hidden) >= SPARSE and layer % 2
        if layer + 1 < self.network.layers and len(hidden) and not sparse:
            self._source, self._hidden, self._chosen = layer + 1, hidden, chosen
            until = min(layer + 1 + DISTANCES, self.network.layers)
            self._forecast.expect(range(layer + 1, until), self._foresee)

    def _forget(self) -> None:
        self._hidden = self._chosen = self._made = None

    def _foresee(self, layer: int) -> Foreseen | None:
        hidden, distance = self._hidden, layer - self._source
        if hidden is None or not 0 <= distance < DISTANCES:
            return None  # promised before another layer ran
        if self._made is None:
            rows = min(len(hidden), MOST_ROWS)
            weights = self.network.sources[self._source]
            work = Work(weights.read_bytes, 2 * weights.parameters, (rows,))
            self._accelerator.run_host(self._predict, work, "predictor")
            made = self._made
            self._tell(len(hidden))
        made = self._made
        return None if made is None else Foreseen(made.presence[distance], made.rows[distance], len(hidden))

    def _tell(self, tokens: int) -> None:
        """All layers that the prediction is of, since the next one may make none."""
        made = self._made
        if made is not None:
            for each in range(min(DISTANCES, self.network.layers - self._source)):
                self._forecast.foresee(self._source + each, made.presence[each], made.rows[each], tokens)

    def _predict(self) -> None:
        assert self._hidden is not None
        started = time.perf_counter()
        self._made = self.network.predict(self._source, self._hidden, self._chosen)
        self.adaptation.record(self._source)
        self._seconds.append(time.perf_counter() - started)
        self._calls += 1

    def stats(self) -> PredictorStats:
        """What it came to so far."""
        adaptation = self.adaptation
        return PredictorStats(
            self.name, self._calls, median(self._seconds) * 1e6 if self._seconds else None,
            tuple(adaptation.recall(distance) for distance in range(1, DISTANCES + 1)),
            adaptation.state, self.network.nbytes,
        )  # fmt: skip
