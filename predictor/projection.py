"""Hidden states made small: their principal directions, and rows of 8-bit numbers with a scale each."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.errors import TraceError


class Projection(NamedTuple):
    """One source's directions: `directions @ x - offset` is what a trace keeps of x."""

    directions: NDArray[np.float32]  # [P, H] orthonormal, most important first
    offset: NDArray[np.float32]  # [P] what the mean comes to
    variance: NDArray[np.float32]  # [P]

    def __call__(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, H] to [T, P]."""
        return np.asarray(hidden @ self.directions.T - self.offset)


def fit(rows: NDArray[np.floating], projected: int) -> Projection:
    """The P principal directions of rows [n, H]. Raises TraceError when there are too few rows to tell them."""
    count, size = rows.shape
    if not 1 <= projected <= size:
        raise TraceError(f"{projected} projected dimensions of hidden states that have {size}: at least 1, at most all")
    if count <= projected:
        raise TraceError(
            f"{count} tokens of training sequences do not tell {projected} directions: give more text, or project to "
            "fewer dimensions"
        )
    wide = rows.astype(np.float64)
    mean = wide.mean(axis=0)
    wide -= mean
    values, vectors = np.linalg.eigh(wide.T @ wide / (count - 1)) if count >= size else _thin(wide)
    directions = vectors[:, ::-1][:, :projected].T
    variance = np.maximum(values[::-1][:projected], 0.0)
    # a sign that does not depend on the solver
    directions = directions * np.where(directions.sum(axis=1) < 0, -1.0, 1.0)[:, None]
    small = np.float32
    return Projection(directions.astype(small), (directions @ mean).astype(small), variance.astype(small))


def _thin(centred: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ascending eigenvalues and vectors of the covariance of fewer rows than dimensions."""
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    return np.asarray(singular[::-1] ** 2 / (len(centred) - 1)), np.asarray(vectors[::-1].T)


def quantise(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Rows [T, P] as integers of at most 127 and one scale each."""
    limit = np.minimum(np.abs(rows).max(axis=1) / 127, 65504)
    scale = limit.astype(np.float16)
    # a scale that was rounded down would push the largest beyond 127
    scale = np.where(scale < limit, np.nextafter(scale, np.float16(65504)), scale)
    inverse = 1.0 / np.maximum(scale.astype(np.float32), np.finfo(np.float16).smallest_subnormal)
    return np.clip(np.rint(rows * inverse[:, None]), -127, 127).astype(np.int8), scale
