"""Routed experts by torch operations, from the bytes of one expert's record in a device slot.

Shapes: n rows of an expert, T tokens, H hidden, I intermediate. Nothing here waits for the device: on CUDA every call
puts work on the current stream and returns.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch.nn import functional

from moe_offload.gpu_kernels import unpack

GATED_ONLY = ("swiglu_oai", "silu_clamp", "silu_cap", "silu_softcap")
AT_ONCE = 1 << 24  # numbers, 32 MiB in 16 bits: even the fastest device reads them for longer than a launch takes
SINGLE = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """Where the parts of one expert lie in its record: the fields of `cpu_kernels.packed_layout.ExpertRecord`.

    gate and up are [I, H], down is [H, I]. offsets: bytes to gate, up, down, gate bias, up bias, down bias.
    """

    hidden_size: int
    intermediate_size: int
    dtype: str
    gated: bool
    bias: bool
    group: int
    offsets: tuple[int, int, int, int, int, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class DeviceActivation:
    """f(gate) * up, or f(up) without a gate; kinds and formulas are those of `cpu_kernels.layout.Activation`."""

    kind: str
    alpha: float = 1.702
    limit: float = inf

    def __post_init__(self) -> None:
        if self.kind not in (*SINGLE, *GATED_ONLY):
            raise ValueError(f"unknown activation {self.kind!r}; known are {', '.join((*SINGLE, *GATED_ONLY))}")


class TorchExperts:
    """Computes experts whose records have one layout. Products in `compute`, all else in f32.

    Matrices that must be converted first are so in runs of rows, of `AT_ONCE` numbers at most: the memory that takes
    does not depend on the model.
    """

    def __init__(self, record: DeviceRecord, activation: DeviceActivation, compute: torch.dtype) -> None:
        if activation.kind in GATED_ONLY and not record.gated:
            raise ValueError(f"{activation.kind} needs a gate, and these experts have none")
        if compute not in unpack.ELEMENT_TYPES.values():
            raise ValueError(f"experts cannot be computed in {compute}; use float32, bfloat16 or float16")
        self.record, self.activation, self.compute = record, activation, compute

    def run(self, slot: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """weights * expert(x): f32 [n, H] for slot uint8 [nbytes], x [n, H], weights f32 [n]."""
        record = self.record
        if slot.dtype != torch.uint8 or slot.numel() < record.nbytes:
            raise ValueError(f"a slot of {slot.numel()} {slot.dtype} holds no record of {record.nbytes} bytes")
        x = x.to(self.compute)
        gate = self._product(x, slot, 0) if record.gated else None
        h = activate(self.activation, gate, self._product(x, slot, 1))
        return self._product(h.to(self.compute), slot, 2) * weights[:, None]

    def add_rows(
        self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, slot: torch.Tensor
    ) -> None:
        """out[tokens] += weights * expert(x[tokens]): out f32 [T, H], x [T, H], tokens int64 [n], weights f32 [n]."""
        out.index_add_(0, tokens, self.run(slot, x.index_select(0, tokens), weights))

    def scratch_bytes(self, rows: int) -> int:
        """Device memory that `add_rows` asks for and gives back, for so many rows of one expert; an upper bound."""
        record = self.record
        hidden, inner = record.hidden_size, record.intermediate_size
        converted = max(
            unpack.scratch_bytes(record.dtype, min(rows, self._at_once(cols)), cols, record.group, self.compute)
            for rows, cols in ((hidden, inner), (inner, hidden))
        )
        # of [n, H]: the rows as given and in `compute`, and y twice; of [n, I]: what the worst activation has at once
        return converted + rows * 4 * (4 * hidden + 6 * inner)

    def _at_once(self, cols: int) -> int:
        """Rows of `cols` numbers that are converted at once, a multiple of 32."""
        return max(1, AT_ONCE // (cols * unpack.WIDTH)) * unpack.WIDTH

    def _product(self, x: torch.Tensor, slot: torch.Tensor, part: int) -> torch.Tensor:
        """x @ matrix.T + bias in f32; part 0 is gate, 1 up, 2 down."""
        record, compute = self.record, self.compute
        rows, cols = record.intermediate_size, record.hidden_size
        if part == 2:
            rows, cols = cols, rows
        data, step = slot[record.offsets[part] :], self._at_once(cols)
        if rows <= step or unpack.lies_as(record.dtype, compute):
            matrix = unpack.matrix(data, record.dtype, rows, cols, record.group, compute)
            y = functional.linear(x, matrix).to(torch.float32)
        else:
            y = torch.empty((len(x), rows), dtype=torch.float32, device=x.device)
            for first in range(0, rows, step):
                at = unpack.matrix_bytes(record.dtype, first, cols, record.group)
                some = min(step, rows - first)
                matrix = unpack.matrix(data[at:], record.dtype, some, cols, record.group, compute)
                y[:, first : first + some] = functional.linear(x, matrix)
                del matrix  # before the next is made
        if record.bias:
            at = record.offsets[3 + part]
            y += slot[at : at + 4 * rows].view(torch.float32)
        return y


def activate(activation: DeviceActivation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """f(gate) * up in the type of up; f(up) without a gate."""
    alpha, limit = activation.alpha, activation.limit
    match activation.kind:
        case kind if kind in SINGLE:
            return _single(kind, up, alpha) if gate is None else _single(kind, gate, alpha) * up
        case _ if gate is None:
            raise ValueError(f"{activation.kind} needs a gate")
        case "swiglu_oai":
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * gate * torch.sigmoid(alpha * gate)
        case "silu_clamp":
            return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        case "silu_cap":
            return functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
        case _:  # silu_softcap
            return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * (limit * torch.tanh(up / limit))


def _single(kind: str, x: torch.Tensor, alpha: float) -> torch.Tensor:
    match kind:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "gelu_quick":
            return x * torch.sigmoid(alpha * x)
        case "relu":
            return functional.relu(x)
        case _:  # relu2
            return functional.relu(x).square()
