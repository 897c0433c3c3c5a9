"""Cases for `FusedExperts`, on whatever device: the same on the CPU behind the shim and on a card."""

from typing import NamedTuple

import numpy as np
import torch

from moe_offload.cpu_kernels import Activation
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.gpu_kernels.fused_experts import FusedExperts, HostSide, Workspace
from moe_offload.gpu_kernels.launch import Kernels
from moe_offload.gpu_kernels.torch_experts import DeviceActivation, DeviceRecord
from tests.cpu_kernels.expert_cases import Floats, activate
from tests.cpu_kernels.packed_cases import PackedExperts
from tests.gpu_kernels.test_torch_experts import make

EXPERTS = 5
CPU = torch.device("cpu")


class FusedCase(NamedTuple):
    """A layer with EXPERTS experts, of which all but the last are on the device."""

    record: ExpertRecord
    activation: Activation
    experts: PackedExperts
    hidden: torch.Tensor  # [T, H]
    choices: torch.Tensor  # int64 [T, K]
    weights: torch.Tensor  # f32 [T, K]


def fused_case(
    record: ExpertRecord, activation: Activation, tokens: int, top_k: int, dtype: torch.dtype = torch.float32
) -> FusedCase:
    rng = np.random.default_rng(tokens * 8 + top_k)
    hidden = torch.from_numpy(rng.standard_normal((tokens, record.hidden_size)).astype(np.float32)).to(dtype)
    index = np.stack([rng.permutation(EXPERTS)[:top_k] for _ in range(tokens)]).astype(np.int64)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    experts = make(record, activation, EXPERTS)
    return FusedCase(record, activation, experts, hidden, torch.from_numpy(index), torch.from_numpy(weights))


def fused(case: FusedCase, kernels: Kernels) -> FusedExperts:
    record, activation = case.record, case.activation
    described = DeviceRecord(
        record.hidden_size, record.intermediate_size, record.dtype, record.gated, record.bias, record.group,
        record.offsets, record.nbytes,
    )  # fmt: skip
    return FusedExperts(
        described, DeviceActivation(activation.kind, activation.alpha, activation.limit), kernels, EXPERTS
    )


class FusedRun(NamedTuple):
    """What `run_fused` leaves."""

    out: torch.Tensor
    host: HostSide
    space: Workspace


def slots_of(case: FusedCase, device: torch.device) -> list[torch.Tensor]:
    """All records, aligned to 64 bytes, each an allocation of its own."""
    return [torch.from_numpy(content.copy()).to(device) for content in case.experts.records]


def run_fused(
    case: FusedCase, kernels: Kernels, device: torch.device = CPU, *, by_table: bool = False, launches: int = 2
) -> FusedRun:
    """The layer's output, with the last expert left out and ones for the CPU's share; experts in so many calls."""
    layer = fused(case, kernels)
    tokens, top_k = case.choices.shape
    space = layer.workspace(tokens, top_k)
    memory = torch.full((space.nbytes,), 255, dtype=torch.uint8, device=device)  # NaN wherever nothing is written
    host = HostSide(
        torch.full((tokens, case.record.hidden_size), -1.0),
        torch.full((tokens, top_k), -1),
        torch.full((tokens, top_k), -1.0),
    )
    if device.type == "cuda":
        host = HostSide(*(part.pin_memory() for part in (host.hidden, host.index, host.weights)))
    hidden, index, weights = (part.to(device) for part in (case.hidden, case.choices, case.weights))
    layer.begin(space, memory, hidden, index, weights, host)
    slots = slots_of(case, device)[: EXPERTS - 1]
    if by_table:
        table = torch.tensor([*(slot.data_ptr() for slot in slots), 0], dtype=torch.int64, device=device)
        layer.add_by_table(space, memory, table)
    else:
        for n in range(launches):
            some = list(range(n, EXPERTS - 1, launches))
            layer.add(space, memory, some, [slots[e] for e in some])
    out = torch.full((tokens, case.record.hidden_size), -1.0, dtype=case.hidden.dtype, device=device)
    layer.join(space, memory, out, torch.ones(out.shape, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return FusedRun(out.cpu(), host, space)


def expected(case: FusedCase) -> Floats:
    """[T, H] in float64."""
    experts, x = case.experts, case.hidden.to(torch.float64).numpy()
    out = np.ones(x.shape)
    for t, (chosen, shares) in enumerate(zip(case.choices.tolist(), case.weights.tolist(), strict=True)):
        for e, share in zip(chosen, shares, strict=True):
            if e == EXPERTS - 1:
                continue
            gate = experts.gate[e] @ x[t] + experts.biases[0][e] if case.record.gated else None
            up = experts.up[e] @ x[t] + experts.biases[1][e]
            h = activate(case.activation, gate, up)
            out[t] += share * (experts.down[e] @ h + experts.biases[2][e])
    return out
