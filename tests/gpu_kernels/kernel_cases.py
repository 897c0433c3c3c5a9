"""Every kernel on small odd shapes beside float64, whoever compiles it and wherever it runs.

On the CPU through the shim, on a card, on a newer card in the code of an older one. A case raises AssertionError where
numbers are off by more than roundings explain: by what test_torch_experts.py and packed_cases.py say of experts. Finer
cases are in the tests of each kernel.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.cpu_kernels.layout import ActivationKind
from moe_offload.cpu_kernels.packed_layout import StoredType
from moe_offload.gpu_kernels import unpack
from moe_offload.gpu_kernels.decode_attention import KV_TYPES, DecodeAttention, DecodeShape
from moe_offload.gpu_kernels.decode_attention import SOURCE as ATTENTION_SOURCE
from moe_offload.gpu_kernels.decode_attention import VARIANTS as ATTENTION
from moe_offload.gpu_kernels.dequantise import Dequantiser
from moe_offload.gpu_kernels.fused_experts import FusedExperts, HostSide
from moe_offload.gpu_kernels.launch import Kernel, Kernels, Macros
from moe_offload.gpu_kernels.tiled_experts import TiledExperts
from moe_offload.gpu_kernels.torch_experts import DeviceActivation, DeviceRecord
from tests.cpu_kernels.packed_cases import PackedExperts
from tests.gpu_kernels.test_torch_experts import (
    FORMATS,
    KINDS,
    STEP,
    activation_of,
    draw,
    make,
    reference,
    sized,
    slot_of,
)

Check = Callable[[Kernels, torch.device], None]
KERNEL_NAME = re.compile(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")  # in a source


@dataclass(frozen=True, slots=True)
class Case:
    """A name and what to do; the check raises AssertionError."""

    name: str
    check: Check

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Started:
    """Kernels that write down which of them were started: (source, name, macros)."""

    kernels: Kernels
    names: set[tuple[str, str, Macros]]

    def get(self, source: str, name: str, macros: Macros = ()) -> Kernel:
        kernel = self.kernels.get(source, name, macros)

        def started(*args: Any, **kwargs: Any) -> None:
            self.names.add((source, name, macros))
            kernel(*args, **kwargs)

        return started


def described(experts: PackedExperts) -> tuple[DeviceRecord, DeviceActivation]:
    record, activation = experts.record, experts.activation
    return DeviceRecord(
        record.hidden_size, record.intermediate_size, record.dtype, record.gated, record.bias, record.group,
        record.offsets, record.nbytes,
    ), DeviceActivation(activation.kind, activation.alpha, activation.limit)  # fmt: skip


def close(found: torch.Tensor, expected: NDArray[np.float64], room: NDArray[np.float64], what: str) -> None:
    """AssertionError where an element is off by more than its room, or by nothing at all on the whole."""
    off = np.abs(found.to("cpu", torch.float64).numpy() - expected)
    worst = float((off / np.maximum(room, 1e-30)).max())
    assert worst <= 1, f"{what}: off by {worst:.2f} times what roundings explain"
    assert np.abs(expected).max() > 1e-3, f"{what}: the reference says nothing"


def few_tokens(
    kernels: Kernels, device: torch.device, *, dtype: StoredType, group: int, kind: ActivationKind, tokens: int
) -> None:
    """A layer of three experts: two in slots, one the CPU's; by name and by table, which must give the same bits."""
    turn = KINDS.index(kind) + tokens
    gated = kind in ("swiglu_oai", "silu_clamp", "silu_cap", "silu_softcap") or turn % 3 > 0
    experts = make(sized(dtype, group, gated, bias=turn % 2 == 0), activation_of(kind), seed=turn)
    slots = [slot_of(content).to(device) for content in experts.records]
    rng = np.random.default_rng(turn)
    x, hidden_size = draw(tokens, experts.record.hidden_size, turn), experts.record.hidden_size
    index = np.array([rng.permutation(3)[:2] for _ in range(tokens)])
    weights = rng.random(index.shape, np.float32) + np.float32(0.1)
    packed = experts.record.packed
    expected, room = experts.reference(index, weights, x, "int16" if packed else "f32")
    cpu, _ = experts.reference(np.where(index == 2, 2, -1), weights, x)

    fused = FusedExperts(*described(experts), kernels, 3)
    space = fused.workspace(tokens, 2)
    memory = torch.full((space.nbytes,), 255, dtype=torch.uint8, device=device)
    given = [torch.from_numpy(each).to(device) for each in (x, index, weights)]
    host = HostSide(*(torch.zeros(each.shape, dtype=each.dtype, pin_memory=device.type == "cuda") for each in given))
    shared = torch.from_numpy(cpu.astype(np.float32)).to(device)
    table = torch.tensor([slots[0].data_ptr(), slots[1].data_ptr(), 0], device=device)
    outs = []
    for by_table in (False, True):
        out = torch.full((tokens, hidden_size), float("nan"), device=device)
        fused.begin(space, memory, given[0], given[1], given[2], host)
        if by_table:
            fused.add_by_table(space, memory, table)
        else:
            fused.add(space, memory, [1, 0], [slots[1], slots[0]])
        fused.join(space, memory, out, shared)
        outs.append(out.cpu())
    assert torch.equal(*outs), "by name and by table"
    close(outs[0], expected, room + 1e-6 * np.abs(cpu), "the fused layer")
    for written, wanted in zip((host.hidden, host.index, host.weights), (x, index, weights), strict=True):
        assert np.array_equal(written.numpy(), wanted), "exported"


def many_tokens(
    kernels: Kernels, device: torch.device, *, dtype: StoredType, group: int, kind: ActivationKind, compute: torch.dtype
) -> None:
    """One expert with many rows, some of them of the tokens, added to what is there."""
    experts = make(sized(dtype, group, True, bias=True), activation_of(kind), seed=KINDS.index(kind))
    x = torch.from_numpy(draw(21, experts.record.hidden_size)).to(compute)
    weights = np.linspace(-1, 2, 17).astype(np.float32)
    tokens = np.random.default_rng(0).permutation(21)[:17]
    expected = reference(experts, 1, x.to(torch.float32).numpy()[tokens], compute)
    tiled = TiledExperts(*described(experts), compute, kernels)
    out = torch.full(x.shape, 3.0, device=device)
    slot = slot_of(experts.records[1]).to(device)
    tiled.add_rows(out, x.to(device), torch.from_numpy(tokens).to(device), torch.from_numpy(weights).to(device), slot)
    wanted, room = np.full(x.shape, 3.0), np.full(x.shape, 1e-6)
    wanted[tokens] += weights[:, None] * expected.y
    room[tokens] += np.abs(weights[:, None]) * expected.room + 1e-6 * np.abs(wanted[tokens])
    close(out, wanted, room, "the tiled expert")


def dequantised(kernels: Kernels, device: torch.device, *, dtype: str, group: int, to: torch.dtype) -> None:
    """Any bytes at all, bit for bit: NaN and infinite scales too."""
    rows, cols = (70, 224) if dtype == "mxfp4" else (70, 231)
    nbytes = unpack.matrix_bytes(dtype, rows, cols, group)
    data = torch.from_numpy(np.random.default_rng(group).integers(0, 256, nbytes, np.uint8))
    expected = unpack.matrix(data, dtype, rows, cols, group, torch.float32).to(to)
    found = Dequantiser(kernels, dtype, group, to)(data.to(device), rows, cols)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def attention(kernels: Kernels, device: torch.device, *, macros: Macros, turn: int) -> None:
    """Two sequences; what is not seen is NaN. A turn decides what else there is, and into how many parts it goes."""
    of = dict(macros)
    shape = DecodeShape(
        2 * of["HEADS"] * of["TILES"], 2, of["D"], of["DV"],
        next(dtype for dtype, number in KV_TYPES.items() if number == of["KV_TYPE"]),
        window=40 if turn % 4 == 1 else 0, softcap=2.0 if turn % 4 == 2 else 0.0,
    )  # fmt: skip
    assert shape.macros == macros
    length, rng = 75, np.random.default_rng(turn)
    query_type = torch.float32 if turn % 2 else torch.float16
    query = torch.from_numpy(rng.standard_normal((2, shape.q_heads, shape.head_size))).to(query_type)
    starts = torch.tensor([0, 9], dtype=torch.int32)
    keys, values = (_kept(rng, (2, 2, length, size), shape.kv_type) for size in (shape.head_size, shape.value_size))
    scales: list[torch.Tensor | None] = [None, None]
    if shape.kv_type == torch.int8:
        scales = [torch.from_numpy(rng.random((2, 2, length)) / 60).to(torch.float16) for _ in range(2)]
    sinks = torch.from_numpy(rng.standard_normal(shape.q_heads).astype(np.float32)) if turn % 3 == 0 else None
    expected = _attended(shape, query, keys, values, scales, starts, sinks)
    if shape.kv_type != torch.int8:
        keys[1, :, :9], values[1, :, :9] = float("nan"), float("nan")

    def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    outs = [
        DecodeAttention(kernels, shape, 4)(
            query.to(device), keys.to(device), values.to(device), key_scales=there(scales[0]),
            value_scales=there(scales[1]), starts=there(starts), sinks=there(sinks), splits=splits,
        )
        for splits in (1, 3)
    ]  # fmt: skip
    room = np.full(expected.shape, 2e-5 * np.abs(expected).max()) + STEP[query_type] * np.abs(expected)
    for found in outs:
        close(found, expected, room, "attention")


def _kept(rng: np.random.Generator, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Keys or values as the cache has them."""
    if dtype == torch.int8:
        return torch.from_numpy(rng.integers(-127, 128, size, np.int8))
    return torch.from_numpy(rng.standard_normal(size)).to(dtype)


def _attended(
    shape: DecodeShape, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    scales: list[torch.Tensor | None], starts: torch.Tensor, sinks: torch.Tensor | None,
) -> NDArray[np.float64]:  # fmt: skip
    """In float64, [B, Hq, Dv]."""
    wide = [
        each.double() if scale is None else each.double() * scale.double()[..., None]
        for each, scale in zip((keys, values), scales, strict=True)
    ]
    all_keys, all_values = (each.repeat_interleave(shape.group, dim=1) for each in wide)
    logits = torch.einsum("bhd,bhtd->bht", query.double(), all_keys) * shape.head_size**-0.5
    if shape.softcap:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    at = torch.arange(keys.shape[2])
    seen = (at >= starts[:, None]) & (at >= (keys.shape[2] - shape.window if shape.window else 0))
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.double()[None, :, None].expand(2, -1, 1)), dim=2)
    weights = torch.softmax(logits, dim=2)[:, :, : keys.shape[2]]
    result: NDArray[np.float64] = torch.einsum("bht,bhtd->bhd", weights, all_values).numpy()
    return result


def _cases() -> list[Case]:
    cases = []
    for turn, macros in enumerate(ATTENTION[ATTENTION_SOURCE]):
        name = "-".join(str(value) for _, value in macros)
        cases.append(Case(f"attention-{name}", partial(attention, macros=macros, turn=turn)))
    for turn, (dtype, group) in enumerate(FORMATS):
        name, kind = f"{dtype}-{group}", KINDS[turn % len(KINDS)]
        for tokens in (1, 5):
            check = partial(few_tokens, dtype=dtype, group=group, kind=kind, tokens=tokens)
            cases.append(Case(f"few-{name}-{tokens}", check))
        for compute in STEP:
            short = str(compute).removeprefix("torch.")
            tiled = partial(many_tokens, dtype=dtype, group=group, kind=kind, compute=compute)
            cases.append(Case(f"many-{name}-{short}", tiled))
            if not unpack.lies_as(dtype, compute):
                bits = partial(dequantised, dtype=dtype, group=group, to=compute)
                cases.append(Case(f"dequantise-{name}-{short}", bits))
    return cases


CASES = _cases()
