"""What the host's own time adds to a plan: putting work on the device, and going on to the next layer.

A planner weighs the CPU's experts against the device's. But the thread that runs the CPU's also enqueues the device's,
before, and whatever comes between this layer and the next (attention's launches, the interpreter), after: only then the
device goes on. Where nothing runs on the CPU all of that hides behind the device's work. Both are learned while the
program works:

- enqueueing: seconds = of a job + of each expert on the device + of each fetch, by least squares
- the turn to the next layer: it begins no sooner than `a` after the host is through and `b` after the device is. The
  least seconds ever seen after each say what they are; the CPU's share is behind by a - b.

`adjust` gives the planner costs in which the CPU's side has all of that.
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.layer_plan import LayerCosts

_FORGET = 0.99  # of what was learned, at each layer
_EVERY = 8  # layers between two solutions
_PRIOR = 1e-3  # layers: what is not seen costs nothing
_DOWN, _UP = 0.3, 0.001  # how fast the least seconds follow lower and higher ones
_EXPLORED = 32  # layers: of so many some are planned to learn from
_AT_FIRST, _AGAIN = 8, 2
_BOLD = 8  # every so many times what is learned may cost more
_DEARER = 1.1, 2.0  # how much longer such a layer may take, and a bold one
_MOST = 0.9  # of an expert's time on the CPU
_STEP = 1e-6  # seconds: finer differences make no new tables


class HostTime:
    """Learns from the layers of one batch size after another."""

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self._seen = 0
        self._enqueue = np.zeros(3)
        self._after_host = self._after_device = math.nan
        self._tokens = self._turns = 0
        self._adjusted: tuple[NDArray[np.float64], float, NDArray[np.float64]] | None = None  # table, less, made

    @property
    def fetch(self) -> float:
        """Seconds of the host for each fetched expert."""
        return float(self._enqueue[2])

    @property
    def lag(self) -> float:
        """Seconds by which the next layer begins later after the host is through than after the device is."""
        lag = self._after_host - self._after_device
        return max(lag, 0.0) if math.isfinite(lag) else 0.0

    @property
    def explores(self) -> bool:
        """Whether this layer should leave the device's experts there: it shows `b`, as plans that balance do not."""
        return self._tries and self._turns % 2 == 0

    @property
    def _tries(self) -> bool:
        return self._turns % _EXPLORED < (_AGAIN if self._turns >= _EXPLORED else _AT_FIRST)

    @property
    def bearable(self) -> float:
        """How many times as long as the best plan a layer that explores may take.

        `b` shows only where the device is what is waited for. Where it seems much slower than a balance with the CPU
        no cheap trial is left, and what is believed of `b` would stay as it is: now and then a dear one has to be made.
        """
        return _DEARER[self._turns // _EXPLORED % _BOLD == 0]

    def begin(self, tokens: int) -> None:
        """A step of so many tokens: what lies between layers depends on it."""
        if tokens != self._tokens:
            self._tokens, self._turns = tokens, 0
            self._after_host = self._after_device = math.nan

    def observe_enqueue(self, on_device: int, fetched: int, seconds: float) -> None:
        """A layer's work of so many experts was put on the device."""
        facts = np.array([1.0, on_device, fetched]) if on_device else np.zeros(3)
        self._products = _FORGET * self._products + np.outer(facts, facts)
        self._sums = _FORGET * self._sums + facts * seconds
        self._seen += 1
        if self._seen % _EVERY == 0:
            self._enqueue = np.maximum(np.linalg.solve(self._products + _PRIOR * np.eye(3), self._sums), 0.0)

    def observe_turn(self, after_host: float, after_device: float) -> None:
        """The next layer began so long after the host, and the device, were through with the one before."""
        self._turns += 1
        self._after_host = _towards(self._after_host, after_host)
        self._after_device = _towards(self._after_device, after_device)

    def adjust(self, costs: LayerCosts, active: int) -> LayerCosts:
        """Costs of a layer of `active` experts for a planner."""
        job, each, _ = self._enqueue.tolist()
        # An expert that the CPU takes is one that need not be enqueued. Planners want positive times, so where
        # enqueueing takes longer than the CPU does, only so much of it is told.
        each = min(round(each / _STEP) * _STEP, _MOST * float(costs.cpu[1]))
        cpu = costs.cpu
        if each > 0:
            if self._adjusted is None or self._adjusted[0] is not cpu or self._adjusted[1] != each:
                adjusted = cpu - each
                adjusted[0] = 0.0
                adjusted.setflags(write=False)
                self._adjusted = cpu, each, adjusted
            cpu = self._adjusted[2]
        # every other layer that explores gives the CPU as much as if there were no lag: this shows `a`
        lag = 0.0 if self._tries and not self.explores else self.lag
        return replace(costs, cpu=cpu, cpu_start=costs.cpu_start + job + active * each + lag, join=0.0)


def _towards(least: float, seconds: float) -> float:
    if not math.isfinite(least):
        return seconds
    return least + (_DOWN if seconds < least else _UP) * (min(seconds, 4 * least) - least)
