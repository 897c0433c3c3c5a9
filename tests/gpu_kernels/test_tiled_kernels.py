"""Experts with many rows: against float64 in all formats, activations and types, and what is special about f16."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_offload.cpu_kernels import Activation
from moe_offload.cpu_kernels.layout import GATED_ONLY, ActivationKind
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, StoredType
from moe_offload.gpu_kernels.activation import KINDS as KERNEL_KINDS
from moe_offload.gpu_kernels.launch import Argument, KernelError, Kernels, Macros
from moe_offload.gpu_kernels.sources import read_source
from moe_offload.gpu_kernels.tiled_experts import VARIANTS, TiledExperts, compute_type
from moe_offload.gpu_kernels.torch_experts import DeviceActivation
from tests.cpu_kernels.packed_cases import PackedExperts
from tests.gpu_kernels.host_kernels import ORDERS, HostKernel, HostKernels, needs_compiler, numbers_only
from tests.gpu_kernels.test_torch_experts import (
    FORMATS,
    KINDS,
    STEP,
    Peak,
    activation_of,
    by_torch,
    draw,
    make,
    reference,
    sized,
    slot_of,
)

pytestmark = needs_compiler
SIZES = [(72, 40), (104, 64), (67, 37), (128, 97)]
TYPES = list(STEP)


def by_tiles(
    record: ExpertRecord, activation: Activation, compute: torch.dtype, kernels: Kernels | None = None
) -> TiledExperts:
    plain = by_torch(record, activation)
    return TiledExperts(plain.record, plain.activation, compute, kernels or HostKernels())


def check(
    experts: PackedExperts,
    rows: int,
    compute: torch.dtype,
    order: int,
    kernels: Kernels | None = None,
    spike: float = 1,
) -> None:
    """Some tokens of a batch, in no order, added to what is there. spike: factor of each row's last number."""
    x = torch.from_numpy(draw(rows + 3, experts.record.hidden_size))
    x[:, -1] *= spike
    rng = np.random.default_rng(rows)
    tokens = torch.from_numpy(rng.permutation(rows + 3)[:rows])
    weights = torch.from_numpy(rng.standard_normal(rows).astype(np.float32))
    expected = reference(experts, 1, x[tokens].numpy(), compute)
    out = torch.full(x.shape, 7.0)
    tiled = by_tiles(experts.record, experts.activation, compute, kernels or HostKernels(order))
    tiled.add_rows(out, x, tokens, weights, slot_of(experts.records[1]))
    share = weights.numpy()[:, None]
    off = np.abs(out[tokens].numpy() - 7 - share * expected.y)
    assert (off <= np.abs(share) * expected.room + 1e-6 * (7 + np.abs(share * expected.y))).all()
    others = np.setdiff1d(np.arange(rows + 3), tokens.numpy())
    assert (out[others] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_agrees_with_float64(dtype: StoredType, group: int, kind: ActivationKind) -> None:
    place = FORMATS.index((dtype, group))
    turn = KINDS.index(kind) + place
    gated = kind in GATED_ONLY or turn % 3 > 0
    record = sized(dtype, group, gated, turn % 2 == 0, *SIZES[(turn + place) % 4])
    compute = TYPES[(turn + place // 2) % 3]
    check(make(record, activation_of(kind), seed=turn), (1, 5, 12)[turn % 3], compute, ORDERS[turn % 4])


@pytest.mark.parametrize("compute", TYPES, ids=str)
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_many_rows_in_every_type(dtype: StoredType, group: int, compute: torch.dtype) -> None:
    place = FORMATS.index((dtype, group))
    check(make(sized(dtype, group, place % 4 > 0, True, *SIZES[place % 4]), Activation("silu")), 33, compute, place % 4)


def test_rows_longer_than_a_block_takes_at_once() -> None:
    """More than 1024 numbers in each direction, and largest ones that all threads must hear of."""
    for order in (0, 1, 2):
        experts = make(sized("int8", 64, True, True, 1100, 1030), Activation("gelu"))
        check(experts, 2, torch.float16, order, spike=1e6 if order else 1)


@pytest.mark.parametrize("compute", TYPES, ids=str)
@pytest.mark.parametrize("given_type", TYPES, ids=str)
def test_rows_of_every_type_and_stride(given_type: torch.dtype, compute: torch.dtype) -> None:
    """Also rows that do not begin where four elements are read at once."""
    experts = make(sized("int4", 32, True, False, 64, 32), Activation("silu"))
    tiled, slot = by_tiles(experts.record, experts.activation, compute), slot_of(experts.records[0])
    rows = torch.from_numpy(draw(6, 64)).to(given_type)
    tokens, weights = torch.tensor([4, 0, 5]), torch.ones(3)
    for columns, first in ((64, 0), (80, 4), (81, 1)):
        x = torch.full((6, columns), 7.0, dtype=given_type)[:, first : first + 64]
        x.copy_(rows)
        out = torch.zeros(6, 64)
        tiled.add_rows(out, x, tokens, weights, slot)
        if first == 0:
            expected = reference(experts, 0, rows[tokens].to(torch.float32).numpy(), compute)
            assert (np.abs(out[tokens].numpy() - expected.y) <= expected.room).all()
            whole = out
        assert torch.equal(out, whole)


def test_run_is_add_rows_of_all() -> None:
    experts = make(sized("mxfp4", 32, True, True, 64, 96), Activation("gelu_tanh"))
    tiled, slot = by_tiles(experts.record, experts.activation, torch.float32), slot_of(experts.records[2])
    x, weights = torch.from_numpy(draw(5, 64)), torch.tensor([1, -0.5, 0.25, 0, 2])
    out = torch.zeros(5, 64)
    tiled.add_rows(out, x, torch.arange(5), weights, slot)
    assert torch.equal(tiled.run(slot, x, weights), out)
    room = 1e-5 * out.abs().max().item()
    torch.testing.assert_close(
        out, by_torch(experts.record, experts.activation).run(slot, x, weights), rtol=0, atol=room
    )
    before = out.clone()
    tiled.add_rows(out, x, torch.arange(0), weights[:0], slot)
    assert torch.equal(out, before)


@pytest.mark.parametrize("gated", [True, False])
@given(st.lists(st.integers(-100, 122), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=8)
def test_f16_takes_rows_of_any_size(gated: bool, exponents: list[int], seed: int) -> None:
    """relu: an expert of a row times c is c times that of the row (c^2 with a gate), to the last bit if c is 2^e."""
    experts = make(sized("int8", 32, gated, False, 72, 40), Activation("relu"))
    tiled, slot = by_tiles(experts.record, experts.activation, torch.float16), slot_of(experts.records[0])
    if gated:
        exponents = [exponent // 2 for exponent in exponents]
    x = torch.from_numpy(draw(len(exponents), 72, seed))
    factors = torch.tensor([2.0**exponent for exponent in exponents])
    weights = torch.ones(len(exponents))
    found = tiled.run(slot, x * factors[:, None], weights)
    plain = tiled.run(slot, x, weights)
    assert torch.equal(found, plain * (factors**2 if gated else factors)[:, None])


ROWS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5)


@given(st.lists(ROWS, min_size=1, max_size=3))
@example([[3.4e38, 1, -3.4e38], [1e-45], [0.0], [1.2e-38, -1e-45], [65520.0, 65504.0, 1e-3]])
@settings(deadline=None, max_examples=20)
def test_scaled_rows_are_the_rows(rows: list[list[float]]) -> None:
    """What is gathered, times its scale, is off by a rounding to f16 of the largest's neighbourhood."""
    x = torch.zeros(len(rows), 5)
    for row, numbers in zip(x, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    out, scales = torch.full((len(rows), 5), torch.nan, dtype=torch.float16), torch.zeros(len(rows))
    kernel = HostKernels().get("rows.cu", "gather_rows", (("COMPUTE", 1),))
    kernel((len(rows),), (256,), (x, np.int32(0), np.int64(5), None, out, scales, np.int32(5)))
    x, found, scale = x.to(torch.float64), out.to(torch.float64), scales.to(torch.float64)[:, None]
    assert (found.abs() <= 4).all() and torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert ((found * scale - x).abs() <= 2.0**-11 * x.abs() + 2.0**-25 * scale).all()
    normal = (x.abs().amax(1, keepdim=True) >= 2.0**-126).squeeze(1)
    assert (found.abs().amax(1)[normal] >= 1).all()


def test_f16_is_right_beyond_its_range() -> None:
    """Rows of magnitude 1e6 next to small ones, whose h is beyond 1e11, with biases."""
    experts = make(sized("int4", 64, True, True, 128, 64), Activation("silu"))
    tiled, slot = by_tiles(experts.record, experts.activation, torch.float16), slot_of(experts.records[1])
    x = draw(4, 128) * np.array([1e6, 1, 3e6, 1e-6], np.float32)[:, None]
    found = tiled.run(slot, torch.from_numpy(x), torch.ones(4)).numpy()
    expected = reference(experts, 1, x, torch.float16)
    assert np.abs(found[0]).max() > 1e9
    assert (np.abs(found - expected.y) <= expected.room).all()


@pytest.mark.parametrize("compute", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_stay_where_they_are(compute: torch.dtype, bad: float) -> None:
    experts = make(sized("int8", 128, True, True, 128, 64), Activation("silu"))
    tiled, slot = by_tiles(experts.record, experts.activation, compute), slot_of(experts.records[0])
    x = torch.from_numpy(draw(4, 128))
    x[2] = 0
    whole = tiled.run(slot, x, torch.ones(4))
    expected = reference(experts, 0, x.numpy(), compute)
    assert (np.abs(whole.numpy() - expected.y) <= expected.room).all()  # a row of zeros too: its biases are left
    x[1, 77] = bad
    found = tiled.run(slot, x, torch.ones(4))
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], whole[[0, 2, 3]])


class Counting:
    """Kernels that know how often they were started."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def get(self, source: str, name: str, macros: Macros = ()) -> "CountingKernel":
        assert macros in VARIANTS.get(source, [macros])
        return CountingKernel(HostKernels().get(source, name, macros), self.started)


class CountingKernel:
    def __init__(self, kernel: HostKernel, started: list[str]) -> None:
        self._kernel, self._started = kernel, started

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], *, shared_bytes: int = 0
    ) -> None:
        self._started.append(self._kernel.name)
        self._kernel(grid, block, arguments, shared_bytes=shared_bytes)


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@pytest.mark.parametrize("gated", [True, False])
def test_launches_and_tiles(dtype: StoredType, group: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven with one tile, five where nothing is converted; the same numbers in smaller tiles."""
    experts = make(sized(dtype, group, gated, True, 96, 70), Activation("gelu"))
    counting, products = Counting(), 0
    tiled = by_tiles(experts.record, experts.activation, torch.float32, counting)
    slot, x = slot_of(experts.records[0]), torch.from_numpy(draw(4, experts.record.hidden_size))
    multiply = torch.mm

    def mm(*given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return multiply(*given, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    whole = tiled.run(slot, x, torch.ones(4))
    converted = ["dequantise" if experts.record.packed else "convert"] * (dtype != "f32")
    assert counting.started == ["gather_rows", *converted, "activate_rows", *converted, "add_rows"]
    assert products == 2 and tiled.launches == len(counting.started) + products == (5 if dtype == "f32" else 7)
    counting.started.clear()
    products = 0
    monkeypatch.setattr("moe_offload.gpu_kernels.torch_experts.AT_ONCE", 1)
    torch.testing.assert_close(tiled.run(slot, x, torch.ones(4)), whole, rtol=1e-5, atol=1e-5)
    assert tiled.launches == len(counting.started) + products
    tiles = -(-96 // 32) + (
        -(-(2 * 96 if gated else 96) // 32) if experts.record.packed else -(-70 * (1 + gated) // 32)
    )
    assert products == (2 if dtype == "f32" else tiles)


@pytest.mark.parametrize("compute", TYPES, ids=str)
@pytest.mark.parametrize(("dtype", "rows", "cols"), [("bf16", 5, 7), ("f32", 37, 67), ("f16", 1, 1)])
def test_stored_gate_and_up_that_are_not_one_matrix(
    dtype: StoredType, rows: int, cols: int, compute: torch.dtype
) -> None:
    record = ExpertRecord(cols, rows, dtype, True, True)
    assert record.offsets[1] != rows * cols * {"bf16": 2, "f16": 2, "f32": 4}[dtype]
    check(make(record, Activation("silu")), 3, compute, 2)


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@pytest.mark.parametrize("compute", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (1, 1 << 24), (40, 1)])
def test_scratch_memory_is_bounded(
    dtype: StoredType, group: int, compute: torch.dtype, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_offload.gpu_kernels.torch_experts.AT_ONCE", at_once)
    record = sized(dtype, group, True, True, 64, 96)
    tiled = by_tiles(record, Activation("silu"), compute)
    slot = torch.zeros(record.nbytes, dtype=torch.uint8)
    x, out = torch.zeros((rows, 64), dtype=compute), torch.zeros((rows, 64))
    tokens, weights = torch.arange(rows), torch.ones(rows)
    with Peak() as peak:
        tiled.add_rows(out, x, tokens, weights, slot)
    assert 0.9 * tiled.scratch_bytes(rows) < peak.peak <= tiled.scratch_bytes(rows)


BUGS = {
    "no barrier": ("    __syncthreads();\n    largest = of_warp", "    largest = of_warp"),
    "one warp alone": ("largest = fmaxf(largest, of_warp[warp])", "largest = fmaxf(largest, of_warp[0])"),
    "gather's scale": ("scales[row] = bits_to_float(exponent << 23)", "scales[row] = 1.0f"),
    "h's scale": ("h_scales[row] = bits_to_float(exponent << 23)", "h_scales[row] = 1.0f"),
    "another's bias": ("value.x + bias.x", "value.x + bias.y"),
    "gate is up": ("f.gated ? four_of(gate, at, cols) : b", "b"),
    "set, not added": ("before.x + value.x", "value.x"),
    "in place": ("out + token * cols", "out + row * cols"),
    "row of the batch": ("token * row_stride", "row * row_stride"),
    "tail": ("at + 2 < count) store", "false) store"),
}


@numbers_only
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str) -> None:
    right, wrong = BUGS[name]
    text = read_source("rows.cu")
    assert right in text
    planted = text.replace(right, wrong)
    experts = make(sized("f16", 32, True, True, 281, 259), Activation("silu"))  # f16 as stored: only rows.cu runs
    found = 0
    for order, spike in product(ORDERS, (1, 1e6)):
        try:
            check(experts, 3, torch.float16, order, HostKernels.of_text(planted, order), spike)
        except (AssertionError, KernelError):
            found += 1
    assert found


def test_types_by_card() -> None:
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    expected = {
        (6, 0): {f32: f32, f16: f32, bf16: f32},
        (6, 1): {f32: f32, f16: f32, bf16: f32},
        (7, 0): {f32: f32, f16: f16, bf16: f16},
        (7, 5): {f32: f32, f16: f16, bf16: f16},
        (8, 0): {f32: f32, f16: f16, bf16: bf16},
        (8, 9): {f32: f32, f16: f16, bf16: bf16},
        (12, 0): {f32: f32, f16: f16, bf16: bf16},
    }
    for capability, types in expected.items():
        assert {given: compute_type(capability, given) for given in types} == types
    with pytest.raises(ValueError, match="float64"):
        compute_type((8, 0), torch.float64)


def test_what_cannot_be_computed_is_said() -> None:
    record = sized("f32", 32, True, False, 64, 32)
    with pytest.raises(ValueError, match="needs a gate"):
        by_tiles(replace(record, gated=False), Activation("silu_cap", limit=1.0), torch.float32)
    with pytest.raises(ValueError, match="int8"):
        by_tiles(record, Activation("silu"), torch.int8)
    assert set(KERNEL_KINDS) == set(KINDS) and DeviceActivation("silu").kind in KERNEL_KINDS
    tiled = by_tiles(record, Activation("silu"), torch.float32)
    slot, x, out = torch.zeros(record.nbytes, dtype=torch.uint8), torch.zeros(4, 64), torch.zeros(4, 64)
    tokens, weights = torch.arange(2), torch.ones(2)
    with pytest.raises(ValueError, match=str(record.nbytes)):
        tiled.add_rows(out, x, tokens, weights, slot[1:])
    with pytest.raises(ValueError, match="multiple of 64"):
        tiled.add_rows(out, x, tokens, weights, torch.zeros(record.nbytes + 64, dtype=torch.uint8)[8:])
    with pytest.raises(ValueError, match="x must be"):
        tiled.add_rows(out, x[:, :63], tokens, weights, slot)
    with pytest.raises(ValueError, match="x must be"):
        tiled.add_rows(out, torch.zeros(64, 4).T, tokens, weights, slot)
    with pytest.raises(ValueError, match="x must be.*float64"):
        tiled.add_rows(out, x.to(torch.float64), tokens, weights, slot)
    with pytest.raises(ValueError, match="out must be"):
        tiled.add_rows(out.to(torch.float16), x, tokens, weights, slot)
    with pytest.raises(ValueError, match="weights must be"):
        tiled.add_rows(out, x, tokens, weights.to(torch.float64), slot)
    with pytest.raises(ValueError, match=r"tokens must be contiguous int64 \[2\]"):
        tiled.add_rows(out, x, tokens.to(torch.int32), weights, slot)
    with pytest.raises(ValueError, match="4 rows and 2 weights"):
        tiled.run(slot, x, weights)
