"""Matrices outside of the experts, against float64: all formats, odd shapes, several at once, norm and residual."""

import ctypes
import json
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels.matrices import MatrixKernel, Norm
from moe_offload.cpu_kernels.team import aligned_bytes
from tests.cpu_kernels.expert_cases import decode, encode
from tests.cpu_kernels.matrix_cases import bound, make_matrix, precision, reference, run

ROOT = Path(__file__).parents[2]
FORMATS = [("int8", 32), ("int8", 128), ("int4", 32), ("mxfp4", 32), ("bf16", 32), ("f16", 32), ("f32", 32)]


def draw(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(FORMATS), st.sampled_from(["auto", "int16", "int8", "f32"]), st.integers(1, 300),
    st.lists(st.integers(1, 140), min_size=1, max_size=3), st.sampled_from([1, 2, 3, 4, 5, 8, 11, 16, 33, 64, 67]),
    st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_against_float64(
    format_: tuple[str, int], activations: str, cols: int, rows: list[int], tokens: int, threads: int, bias: bool,
    seed: int,
) -> None:  # fmt: skip
    dtype, group = format_
    rng = np.random.default_rng(seed)
    if dtype == "mxfp4":  # as int4 in every respect but its scales; one kernel less to compile
        cols, activations = 32 * (1 + cols // 32), "auto" if activations == "f32" else activations
    matrices = [make_matrix(rng, n, cols, dtype, group, bias) for n in rows]
    x = draw(rng, tokens, cols) * rng.choice([1e-4, 1.0, 1e4], (tokens, 1)).astype(np.float32)
    kernel = MatrixKernel(cols, dtype, group, activations)  # type: ignore[arg-type]
    with ThreadTeam(threads) as team:
        outs = run(kernel, matrices, x, team, gap=seed % 3)
    steps = precision(activations, dtype, tokens)
    for matrix, out in zip(matrices, outs, strict=True):
        off = np.abs(out - reference(matrix, x))
        np.testing.assert_array_less(off, bound(matrix, x, steps, group))


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_threads_and_companions_do_not_change_a_bit(dtype: str, group: int) -> None:
    """Nor does it matter which matrices are computed with one, nor which other tokens beyond the number of planes."""
    rng = np.random.default_rng(0)
    matrices = [make_matrix(rng, n, 160, dtype, group, bias=True) for n in (300, 33, 7)]
    kernel = MatrixKernel(160, dtype, group)  # type: ignore[arg-type]
    for tokens in (1, 6, 70):
        x = draw(rng, tokens, 160)
        with ThreadTeam(1) as team:
            wanted = run(kernel, matrices, x, team)
            alone = [run(kernel, [each], x, team)[0] for each in matrices]
            part = run(kernel, matrices, x[-5:], team) if tokens > 5 else None
        for threads in (2, 3, 5):
            with ThreadTeam(threads) as team:
                for found, out in zip(run(kernel, matrices, x, team), wanted, strict=True):
                    np.testing.assert_array_equal(found, out)
        np.testing.assert_array_equal(np.concatenate(alone, axis=1), np.concatenate(wanted, axis=1))
        if part is not None:
            np.testing.assert_array_equal(part[0], wanted[0][-5:])


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "bf16"])
def test_inputs_that_are_no_numbers_stay_with_their_token(dtype: str) -> None:
    rng = np.random.default_rng(1)
    matrix = make_matrix(rng, 40, 96, dtype)
    x = draw(rng, 6, 96)
    x[1, 50], x[3, 2], x[4] = np.nan, np.inf, 0
    with ThreadTeam(2) as team:
        (out,) = run(MatrixKernel(96, dtype), [matrix], x, team)  # type: ignore[arg-type]
    nonzero = matrix.weights[:, 50] != 0
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[3][matrix.weights[:, 2] != 0]).any() and nonzero.any()
    assert not out[4].any()
    assert np.isfinite(out[[0, 2, 5]]).all()


@pytest.mark.parametrize("rounding", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_norm_bias_rounding_and_residual_of_a_stage(dtype: str, layer_norm: bool, rounding: Any) -> None:
    """y = round(residual + round(norm(x) @ W.T + bias)), norm as transformers' RMSNorm or torch's LayerNorm."""
    rng = np.random.default_rng(2)
    cols, tokens = 100, 5
    x, weight, shift = 3 * draw(rng, tokens, cols), 1 + draw(rng, cols) / 4, draw(rng, cols)
    matrices = [make_matrix(rng, n, cols, dtype, bias=n == 45) for n in (70, 45)]
    adds = [decode(encode(draw(rng, tokens, len(m.weights)), rounding)).astype(np.float32) for m in matrices]
    outs = [np.full_like(add, -7) for add in adds]
    kernel = MatrixKernel(cols, dtype, activations="f32")  # type: ignore[arg-type]
    norm = Norm(int(weight.ctypes.data), 1e-5, int(shift.ctypes.data) if layer_norm else 0)
    entries = [
        m.entry(add=int(add.ctypes.data), add_step=int(add.strides[0])) for m, add in zip(matrices, adds, strict=True)
    ]
    with ThreadTeam(2) as team:
        memory = aligned_bytes(kernel.block_bytes(2, tokens, team.threads, norm=True))
        places = [(int(out.ctypes.data), int(out.strides[0])) for out in outs]
        kept = kernel.fill(
            memory.ctypes.data, entries, tokens, int(x.ctypes.data), int(x.strides[0]), places, team.threads, norm,
            rounding,
        )  # fmt: skip
        team.launch(kernel.job, memory.ctypes.data)
        del kept

    def rounded(values: NDArray[Any]) -> NDArray[np.float64]:
        return decode(encode(values.astype(np.float32), rounding))

    wide = x.astype(np.float64)
    if layer_norm:
        wide -= wide.mean(1, keepdims=True)
    normal = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + 1e-5)
    normal = rounded(normal * weight + shift) if layer_norm else rounded(rounded(normal) * weight)
    # each rounding may fall the other way than float64's, by one unit of its operand; f32 counts as 2^-22
    unit = {"f32": 2.0**-22, "bf16": 2.0**-8, "f16": 2.0**-11}[rounding]
    for matrix, add, out in zip(matrices, adds, outs, strict=True):
        product = rounded(reference(matrix, normal))
        wanted = rounded(product + add)
        sums = np.abs(normal) @ np.abs(matrix.weights).T
        np.testing.assert_array_less(
            np.abs(out - wanted), unit * (np.abs(product) + np.abs(wanted)) + unit * sums / 4 + 1e-5
        )
        assert np.array_equal(out, rounded(out).astype(np.float32))
        assert np.mean(out == wanted.astype(np.float32)) > (0.9 if rounding != "f32" else 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "bf16", "f16", "f32"])
def test_reads_stay_within_weights_and_inputs(dtype: str) -> None:
    """Both end at a page that must not be touched; a read behind them kills the process."""
    rng = np.random.default_rng(3)
    for cols, rows in ((32, 33), (96, 7), (224, 64)):
        matrix = make_matrix(rng, rows, cols, dtype, place=before_a_guard)
        for tokens in (1, 3, 9, 65):
            x = draw(rng, tokens, cols)
            guarded = before_a_guard(x.reshape(-1).view(np.uint8)).view(np.float32).reshape(tokens, cols)
            with ThreadTeam(1) as team:
                (out,) = run(MatrixKernel(cols, dtype), [matrix], guarded, team)  # type: ignore[arg-type]
            steps = precision("auto", dtype, tokens)
            np.testing.assert_array_less(np.abs(out - reference(matrix, x)), bound(matrix, x, steps, 32))


def before_a_guard(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy whose last byte is the last of a page, the next being out of bounds."""
    size = -(-content.size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    address = ctypes.c_void_p(int(memory.ctypes.data) + size)
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    place = memory[size - content.size : size]
    place[:] = content
    return place


def test_shapes_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(4)
    matrix = make_matrix(rng, 40, 64, "int8")
    kernel = MatrixKernel(64, "int8")
    x = draw(rng, 3, 64)
    with ThreadTeam(1) as team:
        with pytest.raises(ValueError, match="must be a dense f32"):
            run(kernel, [matrix], draw(rng, 3, 63), team)
        with pytest.raises(ValueError, match="must be a dense f32"):
            run(kernel, [matrix], x.astype(np.float64), team)
        with pytest.raises(ValueError, match="must be a dense f32"):
            run(kernel, [matrix], draw(rng, 3, 128)[:, ::2], team)
        with pytest.raises(ValueError, match="must be f32"):
            kernel([matrix.entry()], x, [np.zeros((3, 41), np.float32)], team)
        kernel([], x, [], team)
    with pytest.raises(ValueError, match="unknown weight type"):
        MatrixKernel(64, "int5")  # type: ignore[arg-type]


SCRIPT = """
import json
import sys
import numpy as np
from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels.matrices import MatrixKernel
from moe_offload.cpu_kernels.target import current_target
from tests.cpu_kernels.matrix_cases import bound, make_matrix, precision, reference, run

rng = np.random.default_rng(0)
with ThreadTeam(2) as team:
    for dtype in sys.argv[1:]:
        matrices = [make_matrix(rng, n, 160, dtype, bias=True) for n in (70, 33)]
        kernel = MatrixKernel(160, dtype)
        for tokens in (1, 3, 17):
            x = rng.standard_normal((tokens, 160)).astype(np.float32)
            for matrix, out in zip(matrices, run(kernel, matrices, x, team), strict=True):
                steps = precision("auto", dtype, tokens)
                np.testing.assert_array_less(np.abs(out - reference(matrix, x)), bound(matrix, x, steps, 32))
target = current_target()
print(json.dumps([target.lanes, target.fma, target.half]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
@pytest.mark.parametrize(
    ("cpu", "expected", "dtypes"),
    [("haswell", [8, True, True], ["int8", "int4", "mxfp4"]), ("x86-64", [4, False, False], ["int8", "int4"])],
)
def test_matrices_held_to_another_cpu(cpu: str, expected: list[object], dtypes: list[str]) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *dtypes], cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
