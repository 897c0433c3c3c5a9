"""Packed matrices: unpacking is the inverse of packing, and the rounding is as good as the module says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix, pack_mxfp4, unpack_matrix

SIZES = st.integers(1, 140)


def packed(weights: np.ndarray, layout: PackedMatrix) -> np.ndarray:
    out = np.full(layout.nbytes + 64, 0xAA, np.uint8)
    pack_matrix(weights, layout, out)
    assert np.all(out[layout.nbytes :] == 0xAA)
    return out[: layout.nbytes]


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.sampled_from(["int8", "int4"]), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_unpacking_inverts_packing(rows: int, cols: int, dtype: str, group: int, seed: int) -> None:
    """Weights that the format can hold come back bit for bit; zeros everywhere else."""
    rng = np.random.default_rng(seed)
    layout = PackedMatrix(rows, cols, dtype, group)  # type: ignore[arg-type]
    most = 127 if dtype == "int8" else 7
    q = rng.integers(-most, most + 1, (rows, layout.padded_cols)).astype(np.float32)
    q[:, ::group] = most if dtype == "int8" else -8  # every group reaches the end of its range: one scale fits exactly
    scales = np.exp2(rng.integers(-12, 6, (rows, layout.groups))).astype(np.float32)
    weights = (q * np.repeat(scales, group, axis=1))[:, :cols]
    np.testing.assert_array_equal(unpack_matrix(packed(weights, layout), layout), weights)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.sampled_from(["int8", "int4"]), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_rounding_errs_by_at_most_half_a_step(rows: int, cols: int, dtype: str, group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = PackedMatrix(rows, cols, dtype, group)  # type: ignore[arg-type]
    weights = (rng.standard_normal((rows, cols)) * rng.choice([1e-3, 1.0, 100.0])).astype(np.float32)
    off = np.abs(unpack_matrix(packed(weights, layout), layout) - weights)
    for c in range(0, cols, group):
        largest = np.abs(weights[:, c : c + group]).max(axis=1)
        # int4 may cut its extreme off by more than half a step where that makes the rest better
        steps = largest / 127 * 0.51 if dtype == "int8" else largest / 4
        assert np.all(off[:, c : c + group].max(axis=1) <= steps + 2.0**-24)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_search_beats_taking_the_largest_for_seven(group: int) -> None:
    """Measured on normal weights: 0.081 of their deviation against 0.097 (groups of 32)."""
    weights = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    layout = PackedMatrix(256, 512, "int4", group)
    ours = np.square(unpack_matrix(packed(weights, layout), layout) - weights).mean()
    grouped = weights.reshape(256, -1, group)
    scale = np.abs(grouped).max(axis=2, keepdims=True) / 7
    plain = np.square(np.rint(grouped / scale) * scale - grouped).mean()
    assert ours < 0.75 * plain


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_mxfp4_is_kept_exactly(rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, 32 * groups)).astype(np.uint8)
    exponents = rng.integers(100, 140, (rows, groups)).astype(np.uint8)
    layout = PackedMatrix(rows, 32 * groups, "mxfp4")
    out = np.zeros(layout.nbytes, np.uint8)
    pack_mxfp4(codes, exponents, layout, out)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] + [-v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    wanted = values[codes] * np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=1)
    np.testing.assert_array_equal(unpack_matrix(out, layout), wanted)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_extreme_weights(dtype: str) -> None:
    layout = PackedMatrix(2, 64, dtype)  # type: ignore[arg-type]
    zeros = np.zeros((2, 64), np.float32)
    assert not unpack_matrix(packed(zeros, layout), layout).any()
    tiny = zeros + np.float32(1e-9)  # below every f16 scale: flushed, not blown up
    assert np.abs(unpack_matrix(packed(tiny, layout), layout)).max() <= 1e-6
    for bad in (np.nan, np.inf, 1e7):
        broken = zeros.copy()
        broken[1, 3] = bad
        with pytest.raises(ValueError, match="cannot be"):
            packed(broken, layout)


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "bf16", "f32"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_parts_of_a_record_follow_one_another_on_cache_lines(dtype: str, gated: bool, bias: bool) -> None:
    record = ExpertRecord(67, 37, dtype, gated, bias)  # type: ignore[arg-type]
    ends = [*record.offsets[1:], record.nbytes]
    assert all(offset % 64 == 0 for offset in (*record.offsets, record.nbytes))
    assert all(start <= end for start, end in zip(record.offsets, ends, strict=True))
    assert record.nbytes - record.weight_bytes == (64 * ((3 if not gated else 6) + 5) if bias else 0)


def test_bits_per_weight_are_those_of_the_formats() -> None:
    sizes = {dtype: PackedMatrix(768, 2048, dtype).nbytes * 8 / (768 * 2048) for dtype in ("int8", "int4", "mxfp4")}
    assert sizes == {"int8": 8.5, "int4": 4.5, "mxfp4": 4.25}
