"""Decode attention against float64, and the promises about bits, NaN and what is read."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels import attention_block as word
from moe_offload.cpu_kernels.attention import AttentionShape, DecodeAttention, Strides
from moe_offload.cpu_kernels.attention_rows import CacheType
from moe_offload.cpu_kernels.team import aligned_bytes
from tests.cpu_kernels.attention_cases import Case, check, make_case

TYPES: tuple[CacheType, ...] = ("bf16", "f16", "f32", "int8")
# Each is compiled anew, so each has to stand for several: ratios 1, 7, 8, 12, 3; widths even, odd, tiny, uneven.
SHAPES = [
    AttentionShape(8, 1, 128, 128, "bf16", q_is_bf16=True),
    AttentionShape(14, 2, 80, 80, "bf16"),
    AttentionShape(2, 2, 64, 64, "bf16", q_is_bf16=True),
    AttentionShape(12, 1, 37, 5, "bf16", q_is_bf16=True),
    AttentionShape(6, 2, 112, 112, "f16"),
    AttentionShape(1, 1, 3, 33, "f16"),
    AttentionShape(8, 2, 96, 96, "f32"),
    AttentionShape(16, 1, 7, 1, "f32"),
    AttentionShape(2, 1, 256, 192, "int8"),
    AttentionShape(3, 1, 1, 20, "int8"),
    AttentionShape(8, 1, 128, 128, "bf16", q_is_bf16=True, bf16_weights=True),
    AttentionShape(5, 1, 33, 33, "bf16", bf16_weights=True),
    AttentionShape(4, 1, 40, 24, "int8", q_is_bf16=True, bf16_weights=True),
]


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    with ThreadTeam(2) as team:
        yield team


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = replace(draw(st.sampled_from(SHAPES)), window=draw(st.sampled_from([0, 0, 1, 17, 300])))
    lengths = draw(st.lists(st.one_of(st.integers(0, 70), st.integers(0, 700)), min_size=1, max_size=3))
    spare, seed = draw(st.integers(0, 3)), draw(st.integers(0, 99))
    case = make_case(shape, lengths, max(1, *lengths) + spare, seed, draw(st.sampled_from([0.1, 1.0, 8.0])))
    if draw(st.booleans()):
        case = replace(case, starts=np.array([draw(st.integers(0, length + 1)) for length in lengths]))
    if draw(st.booleans()):
        sinks = np.random.default_rng(seed).normal(0, 3, shape.q_heads).astype(np.float32)
        case = replace(case, sinks=sinks)
    return case


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_against_float64(case: Case, team: ThreadTeam) -> None:
    check(case, case.run(DecodeAttention(case.shape), team))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[8], SHAPES[12]], ids=str)
def test_same_bits_for_every_number_of_threads(shape: AttentionShape) -> None:
    case = make_case(replace(shape, window=1500), [1777, 3, 300, 0])
    attention = DecodeAttention(case.shape)
    outs = []
    for threads in (1, 2, 3, 4):
        with ThreadTeam(threads) as team:
            outs += [case.run(attention, team) for _ in range(3)]
    check(case, outs[0])
    for out in outs[1:]:
        np.testing.assert_array_equal(out.view(np.uint32), outs[0].view(np.uint32))


def test_long_contexts_have_longer_chunks(team: ThreadTeam) -> None:
    length = word.MOST_CHUNKS * word.LEAST_CHUNK + 77
    case = make_case(AttentionShape(2, 1, 7, 1, "f32"), [length, 5])
    check(case, case.run(DecodeAttention(case.shape), team))


@pytest.mark.parametrize("dtype", TYPES)
def test_caches_are_read_with_their_strides(dtype: CacheType, team: ThreadTeam) -> None:
    """[B, L, Hkv, D], as a cache looks before its axes are swapped, and rows with a gap between them."""
    shape = next(s for s in SHAPES if s.dtype == dtype)
    case = make_case(shape, [65, 20])
    wide = np.ascontiguousarray(np.pad(case.values, [(0, 0), (0, 0), (0, 0), (0, 3)]))
    swapped = np.ascontiguousarray(case.keys.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    case = replace(case, keys=swapped, values=wide[..., : shape.value_size])
    check(case, case.run(DecodeAttention(shape), team))


def test_rounded_weights_add_up_to_one(team: ThreadTeam) -> None:
    """Positions that agree on a value give that value, to f32's rounding."""
    shape = SHAPES[10]
    case = make_case(shape, [501])
    case.values[:] = case.values[:, :, :1]
    exact = replace(case, shape=replace(shape, bf16_weights=False))
    check(exact, case.run(DecodeAttention(shape), team))


@pytest.mark.parametrize("shape", [*SHAPES[:3], *SHAPES[10:12]], ids=str)
def test_nan_reaches_the_queries_that_see_it(shape: AttentionShape, team: ThreadTeam) -> None:
    nan = 0x7FC0
    attention = DecodeAttention(shape)
    for position in (0, 63, 64, 299):
        for name in ("keys", "values"):
            case = make_case(shape, [300, 300])
            getattr(case, name)[1, 0, position, shape.head_size - 1] = nan
            out = case.run(attention, team)
            seen = out[1, : shape.q_heads // shape.kv_heads]
            assert np.isnan(seen[:, -1]).all() and (name == "values" or np.isnan(seen).all())
            assert np.isfinite(out[0]).all() and np.isfinite(out[1, seen.shape[0] :]).all()
    case = make_case(replace(shape, window=200), [299, 250])
    case.keys[:, :, :40] = nan  # before the window or the start ...
    case.keys[1, :, 250:] = nan  # ... and behind the length
    case = replace(case, starts=np.array([0, 60]))
    out = case.run(DecodeAttention(case.shape), team)
    assert np.isfinite(out).all()


def test_infinite_scores(team: ThreadTeam) -> None:
    """-inf takes no part, in whole blocks too; +inf is NaN, as in torch."""
    shape = AttentionShape(1, 1, 3, 33, "f16")
    case = make_case(shape, [400])
    case.keys[:] = 0
    case.q[:] = 1
    case.keys[0, 0, :300, 0] = -np.inf
    attention = DecodeAttention(shape)
    out = case.run(attention, team)
    np.testing.assert_allclose(out[0, 0], case.values[0, 0, 300:].astype(np.float64).mean(0), atol=1e-6)
    case.keys[0, 0, 7, 0] = np.inf
    assert np.isnan(case.run(attention, team)).all()


class Guarded:
    """Memory between two pages that must not be touched."""

    def __init__(self, data: np.ndarray[Any, Any], at_end: bool) -> None:
        page = mmap.PAGESIZE
        size = -(-data.nbytes // page) * page
        self.map = mmap.mmap(-1, size + 2 * page)
        whole = np.frombuffer(self.map, np.uint8)
        start = page + (size - data.nbytes if at_end else 0)
        self.array = whole[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
        self.array[:] = data
        for fence in (0, page + size):
            self.protect(whole.ctypes.data + fence, 0)

    @staticmethod
    def protect(address: int, rights: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(rights)
        assert libc.mprotect(*arguments) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_read_beyond_what_is_seen(shape: AttentionShape, team: ThreadTeam) -> None:
    """One sequence and KV head; what is seen ends at a forbidden page, or begins behind one."""
    one = replace(shape, q_heads=shape.q_heads // shape.kv_heads, kv_heads=1)
    for length in (1, 5, 64, 131):
        for at_end in (True, False):
            case = make_case(one, [length])
            arrays = {}
            for name in ("q", "keys", "values", "key_scales", "value_scales"):
                data = getattr(case, name)
                arrays[name] = None if data is None else Guarded(data, at_end)
            guarded: dict[str, Any] = {name: guard and guard.array for name, guard in arrays.items()}
            check(case, replace(case, **guarded).run(DecodeAttention(one), team))
            # a longer cache whose positions before the window lie on the forbidden page
            if not at_end:
                rows = replace(case, **guarded)
                names = ("keys", "values", "key_scales", "value_scales")
                moved: dict[str, Any] = {name: _before(rows, name, 9) for name in names}
                windowed = replace(rows, shape=replace(one, window=length), lengths=rows.lengths + 9, **moved)
                np.testing.assert_array_equal(
                    windowed.run(DecodeAttention(windowed.shape), team), case.run(DecodeAttention(one), team)
                )


def _before(case: Case, name: str, positions: int) -> Any:
    """The same array, beginning `positions` earlier."""
    array = getattr(case, name)
    if array is None:
        return None
    step = array.strides[2]
    shape = (*array.shape[:2], array.shape[2] + positions, *array.shape[3:])
    memory = (ctypes.c_char * (step * shape[2])).from_address(array.ctypes.data - positions * step)
    return np.frombuffer(memory, array.dtype).reshape(shape)


OTHER_CPU = """
import numpy as np
from moe_offload.cpu_kernels import ThreadTeam
from moe_offload.cpu_kernels.attention import AttentionShape, DecodeAttention
from tests.cpu_kernels.attention_cases import check, make_case

shapes = [
    AttentionShape(7, 1, 40, 20, "bf16", window=400, q_is_bf16=True),
    AttentionShape(2, 1, 13, 13, "f16"),
    AttentionShape(12, 1, 9, 17, "int8"),
]
with ThreadTeam(2) as team:
    for shape in shapes:
        case = make_case(shape, [700, 1, 65])
        check(case, case.run(DecodeAttention(shape), team))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
@pytest.mark.parametrize("cpu", ["haswell", "x86-64"])
def test_other_cpus(cpu: str) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", OTHER_CPU]
    done = subprocess.run(command, cwd=root, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_prepared_block_serves_token_after_token(team: ThreadTeam) -> None:
    """Only lengths and counters change between launches; the block's memory was not zero before."""
    shape = SHAPES[0]
    case = make_case(shape, [600, 40], 600)
    attention = DecodeAttention(shape)
    attention.load()
    block = aligned_bytes(attention.block_bytes(2, 600, team.threads))
    block[:] = 255
    lengths, out = case.lengths.copy(), np.zeros_like(case.q)
    attention.fill(
        block.ctypes.data, queries=case.q.ctypes.data, keys=case.keys.ctypes.data, values=case.values.ctypes.data,
        out=out.ctypes.data, lengths=lengths.ctypes.data, batch=2, threads=team.threads,
        key_strides=Strides(*case.keys.strides[:3]), value_strides=Strides(*case.values.strides[:3]),
    )  # fmt: skip
    for wanted in ([600, 40], [3, 590], [256, 257], [0, 1]):
        lengths[:] = wanted
        block.view(np.int64)[[word.NEXT // 8, word.DONE // 8]] = 0
        with team.lock:
            team.launch(attention.job_address, block.ctypes.data)
        check(replace(case, lengths=lengths.copy()), out)


def test_mistakes_are_named(team: ThreadTeam) -> None:
    shape = SHAPES[2]
    case = make_case(shape, [5])
    attention = DecodeAttention(shape)
    with pytest.raises(RuntimeError, match="load"):
        _ = attention.job_address
    wrong: list[tuple[str, Any, str]] = [
        ("q", case.q[:, :1].copy(), r"q must be float32 \[1, 2, 64\]"),
        ("q", case.q.astype(np.float64), "q must be float32"),
        ("keys", case.keys.view(np.float16), "keys must be uint16"),
        ("keys", np.repeat(case.keys, 2, 3)[..., ::2], "contiguous along the last axis"),
        ("values", case.values[:, :, :4].copy(), r"values must be uint16 \[1, 2, 5, 64\]"),
        ("lengths", np.array([6]), r"lengths must lie in 0\.\.5"),
        ("starts", np.array([-1]), "starts must not be negative"),
        ("sinks", np.zeros(3, np.float32), "sinks must be"),
        ("key_scales", np.ones((1, 2, 5), np.float32), "scales belong to int8"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(case, **{name: value}).run(attention, team)
    for change, message in (
        ({"kv_heads": 3}, "evenly"),
        ({"head_size": 0}, "at least one"),
        ({"dtype": "bf8"}, "known are bf16"),
        ({"window": -1}, "window"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(shape, **change)
