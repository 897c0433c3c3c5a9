"""A network that follows the user's traffic: its last stage, biases and calibration learn from what routers choose.

What a source predicted is seen to be right or wrong one to three layers later. At every few of a layer's calls, a few
tokens are learned from: one step against the gradient of the logistic loss, with the middle of a token's scores held
fixed. In logits the step is -RATE * (p - came) for the token itself, whatever the size of its units; experts whose
probability was right to within `IGNORED` are left alone.

The guard. Of every source and distance the Brier score of two networks is averaged over the same tokens, before they
are learned from: of the one that learns, and of the one as it was trained. A source runs with the first only while that
is the better one beyond noise. Where it gets worse by as much, it is set half way back to what was trained, with half
the rate; the rate recovers slowly.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.emit import F32, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.vector_ops import add_scaled
from moe_offload.predictor.compiling import predicting
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.predictor.fast_weights import Tail
from moe_offload.predictor.trace import DISTANCES

ROWS = 4  # tokens learned from at once
EVERY = 4  # calls of a layer, of which one is learned from, at one distance
RATE = 0.3
LEAST_RATE = 0.01
RECOVERY = 1.01  # of the rate, at each time
SLOW = 0.02  # of the rate: the calibration's
IGNORED = 0.01
NEWEST = 0.08  # how much the newest tokens count in the averages
BEYOND = 2.0  # standard errors that count as noise
TRUST = 16  # times learned before anything is said
RECALLED = 0.02  # how much the newest tokens count for the recall
SEEN = 0.25  # of an average that has seen everything: before, nothing is said (after 15 times)


def _dot(em: Emitter, a: Value, count: Value, b: Value) -> Value:
    lanes = em.target.lanes
    kind = vector(F32, lanes)
    several = em.b.and_(count, em.i64(-4 * lanes))

    def products(i: Value, sums: list[Value]) -> list[Value]:
        at = [em.add(em.mul(i, 4), 4 * lanes * n) for n in range(len(sums))]
        return [
            em.fma(em.load(kind, em.add(a, each)), em.load(kind, em.add(b, each)), total)
            for each, total in zip(at, sums, strict=True)
        ]

    def rest(i: Value, sums: list[Value]) -> list[Value]:
        x, y = (em.load(F32, em.add(each, em.mul(i, 4))) for each in (a, b))
        return [em.b.fadd(sums[0], em.b.fmul(x, y))]

    sums = em.loop(0, several, 4 * lanes, [em.const(kind, 0.0)] * 4, products)
    total = em.b.fadd(em.b.fadd(sums[0], sums[1]), em.b.fadd(sums[2], sums[3]))
    return em.loop(several, count, 1, [em.sum_lanes(total)], rest)[0]


dot = micro_kernel("dot", "iii:f", _dot)


@predicting(
    "void(Array(float32,2,'C',readonly=True), Array(float32,2,'A',readonly=True), Array(int64,2,'A',readonly=True),"
    " int64[::1], float32[:,::1], float32[::1], float32[:,::1], float32[:,::1], int64, int64, float32, float32[::1],"
    " float64[::1], int64)"
)
def _learn(
    units: NDArray[np.float32],
    look: NDArray[np.float32],
    chosen: NDArray[Any],
    known: NDArray[np.int64],
    out: NDArray[np.float32],
    bias: NDArray[np.float32],
    slope: NDArray[np.float32],
    shift: NDArray[np.float32],
    distance: int,
    top_k: int,
    rate: float,
    work: NDArray[np.float32],
    result: NDArray[np.float64],
    learn: int,
) -> None:
    """Of rows with units [R, M], look [R, E] and what was chosen [R, K]: result = Brier score, and the share of the
    chosen that was among the K most probable. With `learn`, out [E, M], bias [E], slope and shift [2, D] take a step.
    work: 3 E + K + 1.
    """
    rows, experts = look.shape
    width, weights = units.shape[1], out.ctypes.data
    row = 4 * width
    scores, came, top = work[:experts], work[experts : 2 * experts], work[3 * experts :]
    slack = work[2 * experts : 3 * experts]
    brier = 0.0
    found = 0
    wanted = 0
    for r in range(rows):
        came[:] = 0.0
        for k in range(chosen.shape[1]):
            expert = chosen[r, k]
            if 0 <= expert < experts:
                came[expert] = 1.0
        inputs = units.ctypes.data + row * r
        size = np.float32(1.0) + dot(inputs, width, inputs)
        kept = 0
        for e in range(experts):
            total = dot(weights + row * e, width, inputs)
            value = total + look[r, e] + bias[e]
            scores[e] = value
            if kept > top_k and not value > top[top_k]:
                continue
            if kept <= top_k:
                kept += 1
            at = kept - 1
            while at > 0 and value > top[at - 1]:
                top[at] = top[at - 1]
                at -= 1
            top[at] = value
        middle = (top[top_k - 1] + top[top_k]) / np.float32(2) if top_k < experts else np.float32(-np.inf)
        a, b = slope[known[r], distance], shift[known[r], distance]
        step_slope = 0.0
        step_shift = 0.0
        for e in range(experts):
            margin = scores[e] - middle
            p = 1.0 / (1.0 + np.exp(-(a * margin + b))) if top_k < experts else 1.0
            off = p - came[e]
            slack[e] = off
            brier += off * off
            if came[e] > 0:
                wanted += 1
                found += margin > 0
            step_shift += off
            step_slope += off * min(max(margin, np.float32(-4.0)), np.float32(4.0))
        if learn and top_k < experts:
            for e in range(experts):
                off = slack[e]
                if abs(off) > IGNORED:
                    step = np.float32(rate * off / (a * size))
                    bias[e] -= step
                    add_scaled(weights + row * e, width, inputs, -step)
            shift[known[r], distance] -= np.float32(SLOW * rate * step_shift / top_k)
            changed = a - np.float32(SLOW * rate * step_slope / top_k)
            slope[known[r], distance] = min(max(changed, np.float32(0.1)), np.float32(20.0))
    result[0] = brier / (rows * experts)
    result[1] = found / max(wanted, 1)


COMPILED = (_learn,)


class _Record:
    """What a source saw when it predicted: up to ROWS tokens."""

    __slots__ = ("tokens", "step", "units", "look", "known")

    def __init__(self, units: int, outputs: int) -> None:
        self.tokens: NDArray[np.int64] = np.empty(0, np.int64)  # of the batch
        self.step = -1  # of the network, that they belong to
        self.units = np.zeros((ROWS, units), np.float32)
        self.look = np.zeros((ROWS, outputs), np.float32)
        self.known = np.zeros(ROWS, np.int64)


class Adaptation:
    """Lets a network's sources learn. learn=False: they are only watched, for `recall`."""

    def __init__(self, network: FastNetwork, *, learn: bool) -> None:
        self._network, self.learns = network, learn
        layers, experts = network.layers, network.experts
        self._records = [_Record(each.units, DISTANCES * experts) for each in network.sources]
        self._calls = np.zeros(layers, np.int64)
        self._work = np.zeros(3 * experts + network.top_k + 1, np.float32)
        self._result = np.zeros(2)
        self._rate = np.full(layers, RATE)
        self._times = np.zeros((layers, DISTANCES), np.int64)
        self._frozen = np.zeros((layers, DISTANCES))  # average Brier score
        self._gain = np.zeros((layers, DISTANCES))  # average of frozen - adapted ...
        self._spread = np.zeros((layers, DISTANCES))  # ... and of its square
        self._recall = np.zeros(DISTANCES)
        self._recalled = np.zeros(DISTANCES)
        if learn:
            for each in network.sources:
                each.adapted = each.frozen.copy()

    @property
    def state(self) -> str:
        """ "off", "frozen" or "adapted"."""
        if not self.learns:
            return "off"
        return "adapted" if any(each.use_adapted for each in self._network.sources) else "frozen"

    def recall(self, distance: int) -> float | None:
        """The share of the chosen experts, so many layers ahead, that was among the K most probable; None until there
        is something to tell from.
        """
        weight = self._recalled[distance - 1]
        return float(self._recall[distance - 1] / weight) if weight > SEEN else None

    def record(self, source: int) -> None:
        """The source has just predicted."""
        record, seen = self._records[source], self._network.seen
        if seen is None:
            return
        plan, count, first = seen.plan, len(seen.plan.known), self._network.step
        if count <= ROWS:
            rows = np.arange(count)
        else:
            # not the same sequences each time
            rows = np.sort((np.arange(ROWS) * count // ROWS + first) % count)
        record.tokens, record.step = rows * seen.stride, first
        size = len(rows)
        record.look[:size] = plan.inputs[rows, : record.look.shape[1]]
        record.units[:size] = plan.activated[rows, : record.units.shape[1]]
        record.known[:size] = plan.known[rows]

    def observe(self, layer: int, chosen: NDArray[Any]) -> None:
        """What the layer's router chose [T, K] for the tokens that were predicted."""
        self._calls[layer] += 1
        turn = int(self._calls[layer]) + layer
        if turn % EVERY:
            return
        distance = turn // EVERY % DISTANCES
        source = layer - distance
        if source < 0:
            return
        record = self._records[source]
        if record.step == self._network.step and record.tokens[-1] < len(chosen):
            self._learn_from(record, source, distance, chosen[record.tokens])

    def _learn_from(self, record: _Record, source: int, distance: int, chosen: NDArray[Any]) -> None:
        weights = self._network.sources[source]
        running = weights.adapted is not None and weights.use_adapted
        frozen, recall = self._try(record, weights.frozen, distance, chosen, 0.0)
        if weights.adapted is not None:
            adapted, recall_adapted = self._try(record, weights.adapted, distance, chosen, self._rate[source])
            self._guard(source, distance, frozen, adapted)
            recall = recall_adapted if running else recall
        self._recall[distance] += RECALLED * (recall - self._recall[distance])
        self._recalled[distance] += RECALLED * (1 - self._recalled[distance])

    def _try(
        self, record: _Record, tail: Tail, distance: int, chosen: NDArray[Any], rate: float
    ) -> tuple[float, float]:
        """Brier score and recall of a tail, which learns where there is a rate."""
        size, experts = len(chosen), self._network.experts
        look = record.look[:size, distance * experts : (distance + 1) * experts]
        _learn(
            record.units[:size], look, chosen, record.known, tail.out[distance], tail.bias[distance], tail.slope,
            tail.shift, distance, self._network.top_k, np.float32(rate), self._work, self._result, int(rate > 0),
        )  # fmt: skip
        return float(self._result[0]), float(self._result[1])

    def _guard(self, source: int, distance: int, frozen: float, adapted: float) -> None:
        at = source, distance
        self._times[at] += 1
        newest = max(NEWEST, 1.0 / self._times[at])
        self._frozen[at] += newest * (frozen - self._frozen[at])
        self._gain[at] += newest * (frozen - adapted - self._gain[at])
        self._spread[at] += newest * ((frozen - adapted) ** 2 - self._spread[at])
        if self._times[source].min() < TRUST:
            return
        weights = self._network.sources[source]
        gain = self._gain[source].mean()
        variance = np.maximum(self._spread[source] - self._gain[source] ** 2, 0.0).mean()
        noise = BEYOND * np.sqrt(variance * NEWEST / (2 - NEWEST) / DISTANCES)
        self._rate[source] = min(self._rate[source] * RECOVERY, RATE)
        if gain > noise and not weights.use_adapted:
            self._use(source, adapted=True)
        elif gain < 0 and weights.use_adapted:
            self._use(source, adapted=False)
        if gain < -noise:
            assert weights.adapted is not None
            for part, trained in zip(weights.adapted, weights.frozen, strict=True):
                part += 0.5 * (trained - part)
            self._rate[source] = max(self._rate[source] / 2, LEAST_RATE)
            self._gain[source] /= 2  # about what half the way is worth
            self._spread[source] /= 4

    def _use(self, source: int, *, adapted: bool) -> None:
        self._network.sources[source].use_adapted = adapted
        self._network.refresh(source)
