"""Experts by torch against float64, against the CPU kernels, and the bits of unpacked matrices."""

from math import inf
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from moe_offload.cpu_kernels import Activation, ExpertKernel, ExpertLayout, ThreadTeam, group_tokens
from moe_offload.cpu_kernels.layout import GATED_ONLY, ActivationKind, WeightType
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix, PackedType, StoredType
from moe_offload.cpu_kernels.packing import unpack_matrix
from moe_offload.gpu_kernels import unpack
from moe_offload.gpu_kernels.torch_experts import DeviceActivation, DeviceRecord, TorchExperts
from moe_offload.transfer.accelerator import Work, as_tensor
from moe_offload.transfer.server_profile import find_profile
from moe_offload.transfer.virtual import VirtualAccelerator
from tests.cpu_kernels.expert_cases import Floats, activate, decode, encode
from tests.cpu_kernels.packed_cases import PackedExperts, make_packed

FORMATS: list[tuple[StoredType, int]] = [
    ("int8", 32), ("int8", 64), ("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128), ("mxfp4", 32),
    ("bf16", 32), ("f16", 32), ("f32", 32),
]  # fmt: skip
KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)
PACKED: list[tuple[PackedType, int]] = [(name, group) for name, group in FORMATS if name in get_args(PackedType)]  # type: ignore[misc]
# Steps of a rounding, as a share of the number.
STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}


def make(record: ExpertRecord, activation: Activation, count: int = 3, seed: int = 0) -> PackedExperts:
    """Random experts in records; as stored ones too."""
    if record.packed:
        return make_packed(record, activation, count, seed)
    rng = np.random.default_rng(seed)
    inner, hidden = record.intermediate_size, record.hidden_size
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    matrices = [np.zeros((count, *shape)) for shape in shapes]
    biases = [np.zeros((count, rows)) for rows, _ in shapes]
    table = np.zeros((count, 6), np.int64)
    records = []
    for e in range(count):
        memory = np.full(record.nbytes + 64, 255, np.uint8)  # NaN wherever nothing is written
        content = memory[-memory.ctypes.data % 64 :][: record.nbytes]
        records.append(content)
        for n, (rows, cols) in enumerate(shapes):
            if n == 0 and not record.gated:
                continue
            stored = encode((rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32), record.dtype)
            matrices[n][e] = decode(stored)
            content[record.offsets[n] :][: stored.nbytes] = stored.reshape(-1).view(np.uint8)
            table[e, n] = content.ctypes.data + record.offsets[n]
            if record.bias:
                bias = (rng.standard_normal(rows) * 0.5).astype(np.float32)
                biases[n][e] = bias
                content[record.offsets[3 + n] :][: bias.nbytes] = bias.view(np.uint8)
                table[e, 3 + n] = content.ctypes.data + record.offsets[3 + n]
    gate, up, down = matrices
    return PackedExperts(record, activation, table, gate, up, down, (biases[0], biases[1], biases[2]), records)


def by_torch(record: ExpertRecord, activation: Activation, compute: torch.dtype = torch.float32) -> TorchExperts:
    described = DeviceRecord(
        record.hidden_size, record.intermediate_size, record.dtype, record.gated, record.bias, record.group,
        record.offsets, record.nbytes,
    )  # fmt: skip
    return TorchExperts(described, DeviceActivation(activation.kind, activation.alpha, activation.limit), compute)


def sized(dtype: StoredType, group: int, gated: bool, bias: bool, hidden: int = 67, inner: int = 37) -> ExpertRecord:
    if dtype == "mxfp4":  # comes in whole groups
        hidden, inner = (-(-size // 32) * 32 for size in (hidden, inner))
    return ExpertRecord(hidden, inner, dtype, gated, bias, group)


def draw(rows: int, width: int, seed: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def slot_of(content: NDArray[np.uint8]) -> torch.Tensor:
    """The record in a slot that is larger, somewhere in an arena, with NaN around it."""
    arena = torch.full((4096 + content.size + 64,), 255, dtype=torch.uint8)
    slot = arena[4096:]
    slot[: content.size] = torch.from_numpy(content)
    return slot


def activation_of(kind: ActivationKind) -> Activation:
    return Activation(kind, alpha=1.3, limit=0.7)  # limits that bite: the inputs' deviation is 1


class Parts(NamedTuple):
    """y [n, H] of one expert in float64, and what computing in a type may be off."""

    y: Floats
    room: Floats


def reference(experts: PackedExperts, e: int, x: NDArray[np.float32], compute: torch.dtype) -> Parts:
    """Roundings of a product's terms (inputs, weights, sums) are independent: they add up as the root of squares, and 8
    are many deviations. What is rounded after the product adds a step. Activations are tried at their inputs' corners.
    """
    step = STEP[compute]

    def product(matrix: Floats, bias: Floats, x: Floats, error: Floats) -> tuple[Floats, Floats]:
        plain = x @ matrix.T
        spread = np.sqrt(x**2 @ (matrix**2).T)
        return plain + bias, np.sqrt(error**2 @ (matrix**2).T) + step * (8 * spread + np.abs(plain)) + 1e-6 * spread

    gated = experts.record.gated
    wide = x.astype(np.float64)
    up, up_error = product(experts.up[e], experts.biases[1][e], wide, np.zeros_like(wide))
    gate, gate_error = product(experts.gate[e], experts.biases[0][e], wide, np.zeros_like(wide))
    h = activate(experts.activation, gate if gated else None, up)
    corners = [
        activate(experts.activation, gate + a * gate_error if gated else None, up + b * up_error)
        for a in (-1, 1)
        for b in (-1, 1)
    ]
    error = np.max([np.abs(corner - h) for corner in corners], axis=0) + (step + 1e-6) * (np.abs(h) + 1e-2)
    return Parts(*product(experts.down[e], experts.biases[2][e], h, error))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_f32_agrees_with_float64(dtype: StoredType, group: int, kind: ActivationKind) -> None:
    turn = KINDS.index(kind) + FORMATS.index((dtype, group))
    gated = kind in GATED_ONLY or turn % 3 > 0
    experts = make(sized(dtype, group, gated, bias=turn % 2 == 0), activation_of(kind), seed=turn)
    x, weights = draw(5, experts.record.hidden_size), np.array([1, -0.5, 0.25, 0, 2], np.float32)
    expected = reference(experts, 1, x, torch.float32)
    found = by_torch(experts.record, experts.activation).run(
        slot_of(experts.records[1]), torch.from_numpy(x), torch.from_numpy(weights)
    )
    assert found.dtype == torch.float32
    room = np.abs(weights)[:, None] * (expected.room + 1e-7 * np.abs(expected.y))
    assert (np.abs(found.numpy() - weights[:, None] * expected.y) <= room).all()


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_half_types_are_off_by_their_roundings(dtype: StoredType, group: int, compute: torch.dtype) -> None:
    experts = make(sized(dtype, group, True, bias=True), Activation("silu"))
    x = torch.from_numpy(draw(7, experts.record.hidden_size)).to(compute)
    expected = reference(experts, 0, x.to(torch.float32).numpy(), compute)
    found = by_torch(experts.record, experts.activation, compute).run(slot_of(experts.records[0]), x, torch.ones(7))
    assert found.dtype == torch.float32
    off = np.abs(found.numpy() - expected.y)
    assert (off <= expected.room).all()
    assert off.max() > STEP[compute] / 100  # it was computed in that type


STORED: list[tuple[WeightType, Activation, bool]] = [
    ("bf16", Activation("silu"), False),
    ("f16", Activation("gelu"), True),
    ("f32", Activation("relu"), False),
]


@pytest.mark.parametrize(("dtype", "activation", "bias"), STORED, ids=[name for name, *_ in STORED])
def test_stored_experts_agree_with_the_cpu(dtype: WeightType, activation: Activation, bias: bool) -> None:
    record = sized(dtype, 32, True, bias)
    experts = make(record, activation)
    sizes = record.hidden_size, record.intermediate_size
    layout = ExpertLayout(*sizes, dtype, bias=bias, bias_dtype="f32" if bias else None)
    compare_with_cpu(ExpertKernel(layout, activation), experts)


EXACT = [
    ("int4", 32, Activation("silu"), True, False),
    ("int8", 64, Activation("relu2"), False, False),
    ("int8", 128, Activation("gelu_quick"), True, True),
    ("mxfp4", 32, Activation("silu_cap", limit=1.0), True, False),
]


@pytest.mark.parametrize(
    ("dtype", "group", "activation", "gated", "bias"), EXACT, ids=[f"{c[0]}-{c[1]}" for c in EXACT]
)
def test_packed_experts_agree_with_the_cpu(
    dtype: StoredType, group: int, activation: Activation, gated: bool, bias: bool
) -> None:
    experts = make(sized(dtype, group, gated, bias), activation)
    compare_with_cpu(PackedExpertKernel(experts.record, activation, "f32"), experts)


def compare_with_cpu(kernel: ExpertKernel | PackedExpertKernel, experts: PackedExperts) -> None:
    """A whole layer of 3 experts, 9 tokens, 2 choices each. Both sum in f32, in another order."""
    hidden = draw(9, experts.record.hidden_size)
    rng = np.random.default_rng(3)
    index = np.array([rng.permutation(3)[:2] for _ in range(9)])
    groups = group_tokens(index, rng.random((9, 2), np.float32), 3)
    expected = np.zeros_like(hidden)
    with ThreadTeam(2) as team:
        kernel(experts.table, groups, hidden, expected, team)
    out = torch.zeros(hidden.shape)
    torch_experts = by_torch(experts.record, experts.activation)
    for place, e in enumerate(groups.experts.tolist()):
        rows = slice(groups.offsets[place], groups.offsets[place + 1])
        torch_experts.add_rows(
            out,
            torch.from_numpy(hidden),
            torch.from_numpy(groups.tokens[rows].astype(np.int64)),
            torch.from_numpy(groups.weights[rows]),
            slot_of(experts.records[e]),
        )
    assert np.abs(expected).max() > 0.1
    assert np.abs(out.numpy() - expected).max() <= 4e-6 * np.abs(expected).max()


def test_add_rows_adds_to_those_tokens_alone() -> None:
    experts = make(sized("f32", 32, True, False), Activation("silu"))
    torch_experts, slot = by_torch(experts.record, experts.activation), slot_of(experts.records[2])
    x = torch.from_numpy(draw(6, experts.record.hidden_size))
    out = torch.full(x.shape, 7.0)
    tokens, weights = torch.tensor([4, 1, 4]), torch.tensor([0.5, 2.0, 0.25])
    torch_experts.add_rows(out, x, tokens, weights, slot)
    y = torch_experts.run(slot, x, torch.ones(6))
    expected = torch.full(x.shape, 7.0)
    expected[4] += 0.75 * y[4]
    expected[1] += 2 * y[1]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert (out[[0, 2, 3, 5]] == 7).all()
    before = out.clone()
    torch_experts.add_rows(out, x, tokens[:0], weights[:0], slot)
    assert torch.equal(out, before)


@pytest.mark.parametrize(("dtype", "group"), PACKED)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(0, 31), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=15)
def test_unpacked_bits_are_those_of_the_packer(
    dtype: PackedType, group: int, rows: int, groups: int, short: int, seed: int
) -> None:
    """Any bytes at all are a matrix: every code meets scales of every kind, NaN and infinity too."""
    layout = PackedMatrix(rows, 32 * groups - (0 if dtype == "mxfp4" else short), dtype, group)
    packed = np.random.default_rng(seed).integers(0, 256, layout.nbytes, np.uint8)
    shape = unpack.PackedShape(layout.rows, layout.cols, dtype, group)
    assert shape.nbytes == layout.nbytes
    with np.errstate(all="ignore"):
        expected = unpack_matrix(packed, layout)
    data = torch.from_numpy(packed)
    found = unpack.matrix(data, dtype, layout.rows, layout.cols, group, torch.float32).numpy()
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    same = found.view(np.uint32) == expected.view(np.uint32) if found.flags.c_contiguous else found == expected
    assert (same | np.isnan(expected)).all()
    half = unpack.matrix(data, dtype, layout.rows, layout.cols, group, torch.bfloat16)
    torch.testing.assert_close(half, torch.from_numpy(expected).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("exponent", [0, 1, 2, 126, 127, 128, 253, 254])
def test_every_fp4_number_at_the_ends_of_its_scales(exponent: int) -> None:
    layout = PackedMatrix(1, 32, "mxfp4")
    packed = np.zeros(layout.nbytes, np.uint8)
    packed[: layout.scales_at].reshape(16, 16, 4)[:, 0, :] = np.arange(64).reshape(16, 4) % 16  # output 0
    packed[layout.scales_at :] = exponent
    found = unpack.matrix(torch.from_numpy(packed), "mxfp4", 1, 32, 32, torch.float32)[0].to(torch.float64)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = np.array([*numbers, *(-number for number in numbers)] * 2) * 2.0 ** (exponent - 127)
    with np.errstate(over="ignore"):
        assert found.tolist() == expected.astype(np.float32).tolist()


def test_stored_matrices_are_seen_in_place() -> None:
    content = torch.arange(0, 128, dtype=torch.uint8)
    for name, dtype in unpack.ELEMENT_TYPES.items():
        seen = unpack.matrix(content[64:], name, 3, 4, 32, dtype)
        assert seen.data_ptr() == content.data_ptr() + 64 and seen.shape == (3, 4)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many bytes the tensors that operations make have at once, at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(value).cdata for value in args if isinstance(value, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        if isinstance(result, torch.Tensor):
            storage = _storage(result)
            if storage.cdata not in given and "out" not in (kwargs or {}):
                self._live[storage.cdata] = storage, result.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return result


def _storage(tensor: torch.Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@pytest.mark.parametrize("compute", list(STEP))
@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (1, 1 << 24), (200, 1)])
def test_scratch_memory_is_bounded(
    dtype: StoredType, group: int, compute: torch.dtype, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_offload.gpu_kernels.torch_experts.AT_ONCE", at_once)
    kind: ActivationKind = "swiglu_oai" if rows == 200 else KINDS[FORMATS.index((dtype, group)) % len(KINDS)]
    record = sized(dtype, group, True, True, 128, 256)
    experts = by_torch(record, activation_of(kind), compute)
    slot = torch.zeros(record.nbytes, dtype=torch.uint8)
    x, out = torch.zeros((rows, 128), dtype=compute), torch.zeros((rows, 128))
    tokens, weights = torch.arange(rows), torch.ones(rows)
    with Peak() as peak:
        experts.add_rows(out, x, tokens, weights, slot)
    assert 0.4 * experts.scratch_bytes(rows) < peak.peak <= experts.scratch_bytes(rows)


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_matrices_in_runs_give_the_same(dtype: StoredType, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make(sized(dtype, group, True, True, 101, 70), Activation("silu"))
    compute = torch.float16 if dtype == "f32" else torch.float32  # so that all are converted
    torch_experts, slot = by_torch(experts.record, experts.activation, compute), slot_of(experts.records[0])
    x = torch.from_numpy(draw(4, experts.record.hidden_size))
    whole = torch_experts.run(slot, x, torch.ones(4))
    monkeypatch.setattr("moe_offload.gpu_kernels.torch_experts.AT_ONCE", 1)
    torch.testing.assert_close(torch_experts.run(slot, x, torch.ones(4)), whole, rtol=1e-3, atol=4 * STEP[compute])


def test_a_launch_on_the_virtual_accelerator() -> None:
    """From the host's arena into a slot, and the expert from there."""
    experts = make(sized("int4", 32, True, False), Activation("silu"))
    record, torch_experts = experts.record, by_torch(experts.record, experts.activation)
    x = torch.from_numpy(draw(3, record.hidden_size))
    with VirtualAccelerator(find_profile("gtx1080ti"), 1 << 20) as device:
        slot, out = device.allocate(record.nbytes, "slot"), device.allocate(x.numel() * 4, "out")
        host = device.host_arena(record.nbytes).take(record.nbytes, "record")
        host.host(write=True)[:] = experts.records[0]
        copies = device.stream("copies")
        device.copy_in(slot, host, copies)
        device.compute.wait(copies.record())
        found = torch.zeros(x.shape)

        def add(data: torch.Tensor, result: torch.Tensor) -> None:
            y = as_tensor(result, torch.float32, *x.shape)
            y.zero_()
            torch_experts.add_rows(y, x, torch.tensor([2, 0]), torch.tensor([1.0, 0.5]), data)
            found.copy_(y)

        device.launch(device.compute, add, [slot], [out], Work(record.nbytes))
    y = torch_experts.run(slot_of(experts.records[0]), x, torch.tensor([0.5, 0, 1]))
    torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("compute", list(STEP))
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_cuda_agrees_with_float64(dtype: StoredType, group: int, compute: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    experts = make(sized(dtype, group, True, True, 256, 512), Activation("silu"))
    torch_experts = by_torch(experts.record, experts.activation, compute)
    slot = slot_of(experts.records[0]).cuda()
    x = torch.from_numpy(draw(33, 256)).to(compute)
    expected = reference(experts, 0, x.to(torch.float32).numpy(), compute)
    out, tokens, weights = torch.zeros(x.shape).cuda(), torch.arange(33).cuda(), torch.ones(33).cuda()
    on_device = x.cuda()
    torch_experts.add_rows(out, on_device, tokens, weights, slot)  # cuBLAS takes its workspace
    out.zero_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch_experts.add_rows(out, on_device, tokens, weights, slot)
    taken = torch.cuda.max_memory_allocated() - before
    assert (np.abs(out.cpu().numpy() - expected.y) <= expected.room).all()
    assert taken <= torch_experts.scratch_bytes(33) + 40 * 512  # the allocator rounds up to 512


def test_what_cannot_be_computed_is_said() -> None:
    gated, plain = sized("f32", 32, True, False), sized("f32", 32, False, False)
    with pytest.raises(ValueError, match="needs a gate"):
        by_torch(plain, Activation("silu_cap", limit=1.0))
    with pytest.raises(ValueError, match="int8"):
        by_torch(gated, Activation("silu"), torch.int8)
    with pytest.raises(ValueError, match="'swish'"):
        DeviceActivation("swish", 1.0, inf)
    with pytest.raises(ValueError, match="'int3'"):
        unpack.matrix(torch.zeros(64, dtype=torch.uint8), "int3", 1, 1, 32, torch.float32)
    experts = by_torch(gated, Activation("silu"))
    with pytest.raises(ValueError, match=str(gated.nbytes)):
        experts.run(torch.zeros(gated.nbytes - 1, dtype=torch.uint8), torch.zeros(1, 67), torch.ones(1))
