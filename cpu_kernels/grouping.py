"""From a router's choice to one list of rows per active expert."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.kernel_cache import compiled


class Groups(NamedTuple):
    """The rows of A active experts, R rows in all. Rows a: offsets[a] to offsets[a + 1]."""

    experts: NDArray[np.int32]  # [A] ascending
    offsets: NDArray[np.int64]  # [A + 1]
    tokens: NDArray[np.int32]  # [R]
    weights: NDArray[np.float32]  # [R]

    def select(self, chosen: NDArray[Any]) -> "Groups":
        """The groups at the positions `chosen` (ascending indices or a mask over A)."""
        index = np.asarray(chosen)
        index = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.int64)
        counts = np.diff(self.offsets)[index]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][index] - offsets[:-1], counts)
        return Groups(self.experts[index], offsets, self.tokens[rows], self.weights[rows])


@compiled(
    "int64(Array(int64,2,'C',readonly=True), Array(float32,2,'C',readonly=True), int64,"
    " int64[::1], int32[::1], int64[::1], int32[::1], float32[::1])"
)
def _count_and_place(
    index: NDArray[np.int64],
    weight: NDArray[np.float32],
    num_experts: int,
    cursor: NDArray[np.int64],
    experts: NDArray[np.int32],
    offsets: NDArray[np.int64],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> int:
    """Counting sort. `cursor` comes as zeros [num_experts]. Returns the number of experts."""
    rows, choices = index.shape
    for t in range(rows):
        for k in range(choices):
            expert = index[t, k]
            if 0 <= expert < num_experts and weight[t, k] != 0:
                cursor[expert] += 1
    active = 0
    total = 0
    for expert in range(num_experts):
        count = cursor[expert]
        if count > 0:
            experts[active] = expert
            offsets[active] = total
            active += 1
            cursor[expert] = total
            total += count
    offsets[active] = total
    for k in range(choices):
        for t in range(rows):
            expert = index[t, k]
            if 0 <= expert < num_experts and weight[t, k] != 0:
                row = cursor[expert]
                cursor[expert] = row + 1
                tokens[row] = t
                weights[row] = weight[t, k]
    return active


COMPILED = (_count_and_place,)


def group_tokens(top_k_index: NDArray[np.int64], top_k_weights: NDArray[np.float32], num_experts: int) -> Groups:
    """Group (token, expert) pairs by expert, rows within one in top-k-major order.

    That is the order of transformers' eager loop: first choice of every token, then the second.
    Indices outside [0, num_experts) are somebody else's (expert parallelism's sentinel is
    num_experts itself); rows of weight exactly 0 add nothing. An expert that a token names twice
    gets two rows. A NaN weight stays: it has to reach the output.
    """
    index = np.ascontiguousarray(top_k_index, np.int64)
    weight = np.ascontiguousarray(top_k_weights, np.float32)
    if index.ndim != 2 or index.shape != weight.shape:
        raise ValueError(f"index and weight must be [T, K] alike: {index.shape}, {weight.shape}")
    most = min(num_experts, index.size)
    experts = np.empty(most, np.int32)
    offsets = np.empty(most + 1, np.int64)
    tokens = np.empty(index.size, np.int32)
    weights = np.empty(index.size, np.float32)
    cursor = np.zeros(num_experts, np.int64)
    active = _count_and_place(index, weight, num_experts, cursor, experts, offsets, tokens, weights)
    rows = offsets[active]
    return Groups(experts[:active], offsets[: active + 1], tokens[:rows], weights[:rows])
