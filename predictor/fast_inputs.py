"""Host code around a network's chain: what goes in, and what a batch's probabilities come to."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.memory import store_i64
from moe_offload.predictor.compiling import predicting
from moe_offload.predictor.trace import DISTANCES


@predicting("void(int64[::1], int64[::1])")
def point(places: NDArray[np.int64], values: NDArray[np.int64]) -> None:
    """Write each value at its place in memory."""
    for i in range(places.size):
        store_i64(values[i], places[i])


@predicting("void(float32[:,::1], int64[::1], int64, Array(int64,2,'A',readonly=True), int32[:,:,::1], int64)")
def prepare(
    inputs: NDArray[np.float32],
    known: NDArray[np.int64],
    experts: int,
    chosen: NDArray[Any],
    before: NDArray[np.int32],
    is_known: int,
) -> None:
    """The inputs [T, U] that are no scores and no states: chosen [T, K], and before [up to D, T, K] where it is known.

    chosen is empty before layer 0. Numbers of no expert are somebody else's.
    """
    first, size = DISTANCES * experts, (DISTANCES + 1) * experts
    for t in range(known.size):
        known[t] = is_known
        inputs[t, first : first + size] = 0.0
        inputs[t, first + size] = is_known
        if chosen.shape[0]:
            for k in range(chosen.shape[1]):
                expert = chosen[t, k]
                if 0 <= expert < experts:
                    inputs[t, first + expert] = 1.0
        if is_known:
            for d in range(before.shape[0]):
                for k in range(before.shape[2]):
                    expert = before[d, t, k]
                    if 0 <= expert < experts:
                        inputs[t, first + experts * (1 + d) + expert] = 1.0


@predicting("void(float32[:,::1], float64, float64[::1], float64[::1])")
def unite(
    probabilities: NDArray[np.float32], scale: float, presence: NDArray[np.float64], rows: NDArray[np.float64]
) -> None:
    """Of tokens [T, D * E] that stand for `scale` times as many: who gets at least one, and how many are expected."""
    presence[:] = 1.0
    rows[:] = 0.0
    for t in range(probabilities.shape[0]):
        for i in range(presence.size):
            p = probabilities[t, i]
            presence[i] *= 1.0 - p
            rows[i] += p
    for i in range(presence.size):
        absent = presence[i] if scale == 1.0 else presence[i] ** scale
        presence[i] = 1.0 - absent
        rows[i] *= scale


COMPILED = (point, prepare, unite)
