"""What the stages of a decode step compute, in NumPy, with the rounding of the model's type where modules round."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cpu_kernels.expert_cases import decode, encode

Floats = NDArray[np.float32]


def rounded(values: NDArray[Any], dtype: str) -> Floats:
    """f32 values as the type holds them."""
    with np.errstate(over="ignore"):
        return decode(encode(np.asarray(values, np.float32), dtype)).astype(np.float32)


def rms_norm(x: Floats, weight: NDArray[Any], epsilon: float, dtype: str) -> Floats:
    factor = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon)
    return rounded(rounded(x * factor, dtype) * weight, dtype)


def layer_norm(x: Floats, weight: NDArray[Any], bias: NDArray[Any], epsilon: float, dtype: str) -> Floats:
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    factor = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return rounded(centred * factor * weight + bias, dtype)


def rotate(x: Floats, cos: Floats, sin: Floats, dtype: str) -> Floats:
    """The first 2 * half elements of the last axis turned, as transformers' rotary embedding does."""
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    first = rounded(rounded(low * cos, dtype) - rounded(high * sin, dtype), dtype)
    second = rounded(rounded(high * cos, dtype) + rounded(low * sin, dtype), dtype)
    return np.concatenate([first, second, rest], axis=-1)


def choose(logits: Floats, choices: int, routing: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The experts of each token, best first (of equals the lower), and their weights, in float64."""
    x = logits.astype(np.float64)
    index = np.argsort(-x, axis=-1, kind="stable")[:, :choices]
    with np.errstate(all="ignore"):
        kept = np.take_along_axis(x, index, axis=-1)
        powers = np.exp(kept - x.max(-1, keepdims=True))
        if routing == "softmax":
            return index, powers / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
        return index, powers / powers.sum(-1, keepdims=True)


def random(*shape: int, seed: int = 0) -> Floats:
    values: Floats = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values
