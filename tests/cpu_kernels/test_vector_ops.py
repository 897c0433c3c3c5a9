"""Loops over f32 vectors against NumPy, at every length around a vector's, and never beyond it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_offload.cpu_kernels import vector_ops
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.matrix_job import normalise
from moe_offload.cpu_kernels.memory import TYPE_CODES
from moe_offload.cpu_kernels.target import current_target
from tests.cpu_kernels.expert_cases import decode, encode
from tests.cpu_kernels.stage_cases import layer_norm, random, rms_norm, rounded

TYPES = ["f32", "bf16", *(["f16"] if current_target().half else [])]
COUNTS = (0, 1, 7, 15, 16, 17, 33, 64, 130)
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8, 65504.0, 65519.9, 65520.0, 3.3961776e38, 1.00390625, 1.01171875],
    np.float32,
)  # the last but two is bf16's greatest before infinity, the last two lie between bf16 values

add_scaled, add_vector, copy_vector = vector_ops.add_scaled, vector_ops.add_vector, vector_ops.copy_vector
sum_values, sum_squares = vector_ops.sum_values, vector_ops.sum_squares
sum_square_distances, round_all, store_as = (
    vector_ops.sum_square_distances,
    vector_ops.round_all,
    vector_ops.store_as,
)
load_bf16, load_f16 = vector_ops.load_bf16, vector_ops.load_f16


@native
def run_add_scaled(y: int, n: int, x: int) -> None:
    add_scaled(y, n, x, np.float32(-0.5))


@native
def run_add(y: int, n: int, x: int) -> None:
    add_vector(y, n, x)


@native
def run_copy(y: int, n: int, x: int) -> None:
    copy_vector(y, n, x)


@native
def run_sums(x: int, n: int, centre: float) -> tuple[float, float, float]:
    return sum_values(x, n), sum_squares(x, n), sum_square_distances(x, n, np.float32(centre))


@native
def run_round(x: int, n: int, code: int) -> None:
    round_all(x, n, code)


@native
def run_store(to: int, n: int, x: int, code: int) -> None:
    store_as(to, n, x, code)


@native
def run_load_bf16(to: int, n: int, x: int) -> None:
    load_bf16(to, n, x)


@native
def run_load_f16(to: int, n: int, x: int) -> None:
    load_f16(to, n, x)


@native
def run_normalise(to: int, x: int, n: int, weight: int, bias: int, epsilon: float, code: int) -> None:
    normalise(to, x, n, weight, bias, np.float32(epsilon), code)


def at(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def test_sums_of_vectors() -> None:
    for n in COUNTS:
        x, y = random(n + 3), random(n + 3, seed=1)
        for function, wanted in (
            (run_add_scaled, y + np.float32(-0.5) * x),
            (run_add, y + x),
            (run_copy, x),
        ):
            found = y.copy()
            function(at(found), n, at(x))
            assert np.allclose(found[:n], wanted[:n], rtol=1e-6, atol=1e-7)
            assert np.array_equal(found[n:], y[n:])


def test_reductions() -> None:
    for n in COUNTS:
        x = random(n + 3)[:n].copy()
        wide = x.astype(np.float64)
        found = run_sums(at(x), n, 0.25)
        wanted = wide.sum(), (wide**2).sum(), ((wide - 0.25) ** 2).sum()
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_and_storing(dtype: Any) -> None:
    for n in COUNTS:
        x = np.concatenate([random(n) * 10.0 ** np.arange(-9, n - 9).clip(-9, 9), SPECIAL, [7.0]]).astype(np.float32)
        count = len(x) - 1
        found = x.copy()
        run_round(at(found), count, TYPE_CODES[dtype])
        assert np.array_equal(found[:count], rounded(x[:count], dtype), equal_nan=True) and found[-1] == 7
        stored = np.full(count + 1, 7, encode(x[:1], dtype).dtype)
        run_store(at(stored), count, at(found), TYPE_CODES[dtype])
        assert np.array_equal(decode(stored)[:count], found[:count], equal_nan=True)
        assert stored[-1] == 7


def test_loading() -> None:
    for n in COUNTS:
        for dtype, function in (("bf16", run_load_bf16), ("f16", run_load_f16)):
            stored = encode(random(n + 1), dtype)
            found = np.full(n + 1, 7, np.float32)
            function(at(found), n, at(stored))
            assert np.array_equal(found[:n], decode(stored)[:n].astype(np.float32)) and found[n] == 7


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_norms(dtype: Any, shift: float) -> None:
    """Off centre as well: a variance from squares alone would lose its digits."""
    tolerance = {"f32": 4e-6 + 1e-6 * shift, "bf16": 2.0**-7, "f16": 2.0**-9}[dtype]
    for n in COUNTS[1:]:
        x, weight, bias = rounded(random(n) + shift, dtype), 1 + random(n, seed=1) / 4, random(n, seed=2)
        for b, wanted in ((0, rms_norm(x, weight, 1e-3, dtype)), (at(bias), layer_norm(x, weight, bias, 1e-3, dtype))):
            found = np.full(n + 1, 7, np.float32)
            run_normalise(at(found), at(x), n, at(weight), b, 1e-3, TYPE_CODES[dtype])
            assert np.abs(found[:n] - wanted).max() <= tolerance * max(1, np.abs(wanted).max()) and found[n] == 7
            in_place = x.copy()
            run_normalise(at(in_place), at(in_place), n, at(weight), b, 1e-3, TYPE_CODES[dtype])
            assert np.array_equal(in_place, found[:n])


def test_a_norm_of_nothing_and_of_nan() -> None:
    weight = np.ones(20, np.float32)
    for x, wanted in ((np.zeros(20, np.float32), 0.0), (np.full(20, np.nan, np.float32), np.nan)):
        run_normalise(at(x), at(x), 20, at(weight), 0, 1e-6, TYPE_CODES["f32"])
        assert np.array_equal(x, np.full(20, wanted, np.float32), equal_nan=True)
