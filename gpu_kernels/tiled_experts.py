"""Routed experts with many rows: matrices are converted in tiles, and cuBLAS multiplies them.

Of n rows of one expert, with packed weights (or stored ones that must be converted) whose matrices fit one tile:

    gather      x[tokens] in the type of the products                          rows.cu
    dequantise  gate and up, as one matrix                                     dequantise.cu
    product     rows x matrix, on tensor cores where the card has them         cuBLAS
    activate    bias, activation: h                                            rows.cu
    dequantise  down                                                           dequantise.cu
    product                                                                    cuBLAS
    add         out[tokens] += weights * (product + bias)                      rows.cu

Seven launches, the weights' bytes read once whatever n is. A larger matrix takes two launches more for each further
tile. Stored matrices that lie as computed are multiplied where they are: five launches.

All work goes to torch's current stream, and so does what its allocator gives and takes back in here: no tensor is given
to somebody else before a kernel has read it. Never run on a GPU by us.
"""

from typing import NamedTuple

import numpy as np
import torch

from moe_offload.gpu_kernels import torch_experts, unpack
from moe_offload.gpu_kernels.activation import activation_arguments
from moe_offload.gpu_kernels.dequantise import TYPE_NUMBERS, Dequantiser
from moe_offload.gpu_kernels.launch import Kernels, Macros
from moe_offload.gpu_kernels.torch_experts import GATED_ONLY, DeviceActivation, DeviceRecord

_THREADS = (256,)
VARIANTS: dict[str, list[Macros]] = {"rows.cu": [(("COMPUTE", number),) for number in TYPE_NUMBERS.values()]}


def compute_type(capability: tuple[int, int], model_dtype: torch.dtype) -> torch.dtype:
    """What the products of a model's experts are computed in on a card.

    Before Volta f32: f16 arithmetic has a 64th of its rate on 6.1, and on 6.0 it has the rate but not the range.
    """
    if model_dtype not in TYPE_NUMBERS:
        raise ValueError(f"experts cannot be computed in {model_dtype}; use float32, bfloat16 or float16")
    if capability < (7, 0) or model_dtype == torch.float32:
        return torch.float32
    return torch.float16 if capability < (8, 0) else model_dtype


class _Matrix(NamedTuple):
    """Where a matrix lies in a record, and which column of the product is that of its first row."""

    at: int
    rows: int
    column: int


class TiledExperts:
    """Computes experts whose records have one layout, as `TorchExperts` does. Products in `compute`, all else in f32.

    In float16 rows are scaled, so that their size does not matter. Weights must be within its range, and the sum over
    one's magnitudes below half of that: a row's largest number is up to 2, and products are rounded to float16 too.
    """

    def __init__(
        self, record: DeviceRecord, activation: DeviceActivation, compute: torch.dtype, kernels: Kernels
    ) -> None:
        if activation.kind in GATED_ONLY and not record.gated:
            raise ValueError(f"{activation.kind} needs a gate, and these experts have none")
        if compute not in TYPE_NUMBERS:
            raise ValueError(f"experts cannot be computed in {compute}; use float32, bfloat16 or float16")
        self.record, self.activation, self.compute = record, activation, compute
        self._dequantise = Dequantiser(kernels, record.dtype, record.group, compute)
        macros: Macros = (("COMPUTE", TYPE_NUMBERS[compute]),)
        self._gather, self._activate, self._add = (
            kernels.get("rows.cu", name, macros) for name in ("gather_rows", "activate_rows", "add_rows")
        )
        self._scaled = compute == torch.float16
        self._up_first, self._first, self._second = _matrices(record)

    def run(self, slot: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """weights * expert(x): f32 [n, H] for slot uint8 [nbytes], x [n, H], weights f32 [n]."""
        out = torch.zeros((len(x), self.record.hidden_size), dtype=torch.float32, device=x.device)
        self._add_rows(out, x, None, weights, slot)
        return out

    def add_rows(
        self, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, slot: torch.Tensor
    ) -> None:
        """out[tokens] += weights * expert(x[tokens]): out f32 [T, H], x [T, H], tokens int64 [n], weights f32 [n].

        The tokens are different ones. x f32, bf16 or f16. tokens and weights may lie in memory that the device
        reaches, like the host's arena.
        """
        self._add_rows(out, x, tokens, weights, slot)

    @property
    def launches(self) -> int:
        """Of one expert, whatever its rows."""
        record, each = self.record, 1 if self._dequantise.in_place else 2
        products = [(matrix, record.hidden_size) for matrix in self._first]
        products.append((self._second, record.intermediate_size))
        return 3 + each * sum(len(self._tiles(matrix, cols)) for matrix, cols in products)

    def scratch_bytes(self, rows: int) -> int:
        """Device memory that `add_rows` asks for and gives back, for so many rows of one expert; an upper bound."""
        record, size = self.record, self.compute.itemsize
        hidden, inner = record.hidden_size, record.intermediate_size
        up_tile = max(self._tile_bytes(matrix, hidden) for matrix in self._first)
        y = size * rows * _width(self._first)
        x, h = size * rows * hidden, size * rows * inner
        return 8 * rows + max(x + y + up_tile, y + h, h + x + self._tile_bytes(self._second, inner))

    def _add_rows(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        weights: torch.Tensor,
        slot: torch.Tensor,
    ) -> None:
        record = self.record
        self._check(out, x, tokens, weights, slot)
        hidden, inner = record.hidden_size, record.intermediate_size
        rows, grid = len(weights), (len(weights),)
        if rows == 0:
            return
        bias = [slot[at:] if record.bias else None for at in record.offsets[3:]]

        gathered, scales = self._empty(rows, hidden, x.device), self._scales(rows, x.device)
        kind_of_x, stride = np.int32(TYPE_NUMBERS[x.dtype]), np.int64(x.stride(0))
        self._gather(grid, _THREADS, (x, kind_of_x, stride, tokens, gathered, scales, np.int32(hidden)))
        y = self._product(gathered, slot, self._first)
        del gathered

        h, h_scales = self._empty(rows, inner, x.device), self._scales(rows, x.device)
        up_first, activation = np.int32(self._up_first), activation_arguments(self.activation)
        of_y = (y, np.int32(y.shape[1]), up_first, scales, bias[0] if record.gated else None, bias[1])
        self._activate(grid, _THREADS, (*of_y, *activation, h, h_scales, np.int32(inner)))
        del y, of_y

        y = self._product(h, slot, (self._second,))
        self._add(grid, _THREADS, (out, tokens, y, h_scales, bias[2], weights, np.int32(hidden)))

    def _product(self, x: torch.Tensor, slot: torch.Tensor, matrices: tuple[_Matrix, ...]) -> torch.Tensor:
        """x @ matrix.T, [n, columns], for all of them side by side."""
        cols, record = x.shape[1], self.record
        y = self._empty(len(x), _width(matrices), x.device)
        for matrix in matrices:
            for first, rows in self._tiles(matrix, cols):
                at = matrix.at + unpack.matrix_bytes(record.dtype, first, cols, record.group)
                columns = y[:, matrix.column + first : matrix.column + first + rows]
                torch.mm(x, self._dequantise(slot[at:], rows, cols).T, out=columns)
        return y

    def _tiles(self, matrix: _Matrix, cols: int) -> list[tuple[int, int]]:
        """First row and rows of each tile of a matrix: as few as fit, of one size but for whole blocks."""
        if self._dequantise.in_place:
            return [(0, matrix.rows)]
        blocks = -(-matrix.rows // unpack.WIDTH)
        at_once = max(1, torch_experts.AT_ONCE // (cols * unpack.WIDTH))
        step = -(-blocks // -(-blocks // at_once)) * unpack.WIDTH
        return [(first, min(step, matrix.rows - first)) for first in range(0, matrix.rows, step)]

    def _tile_bytes(self, matrix: _Matrix, cols: int) -> int:
        return 0 if self._dequantise.in_place else self._tiles(matrix, cols)[0][1] * cols * self.compute.itemsize

    def _empty(self, rows: int, cols: int, device: torch.device) -> torch.Tensor:
        return torch.empty((rows, cols), dtype=self.compute, device=device)

    def _scales(self, rows: int, device: torch.device) -> torch.Tensor | None:
        return torch.empty(rows, dtype=torch.float32, device=device) if self._scaled else None

    def _check(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        weights: torch.Tensor,
        slot: torch.Tensor,
    ) -> None:
        """Kernels see addresses alone: what they are given is looked at here."""
        record, hidden = self.record, self.record.hidden_size
        if slot.dtype != torch.uint8 or slot.numel() < record.nbytes:
            raise ValueError(f"a slot of {slot.numel()} {slot.dtype} holds no record of {record.nbytes} bytes")
        if slot.data_ptr() % 64:
            raise ValueError(f"a slot begins at a multiple of 64 bytes, not at {slot.data_ptr():#x}")
        if x.dtype not in TYPE_NUMBERS or x.ndim != 2 or x.shape[1] != hidden or x.stride(1) != 1:
            raise ValueError(f"x must be floats [T, {hidden}] with rows in one piece, got {_described(x)}")
        if out.dtype != torch.float32 or out.shape[1:] != (hidden,) or not out.is_contiguous():
            raise ValueError(f"out must be contiguous float32 [T, {hidden}], got {_described(out)}")
        if weights.dtype != torch.float32 or weights.ndim != 1 or not weights.is_contiguous():
            raise ValueError(f"weights must be contiguous float32 [n], got {_described(weights)}")
        if tokens is None:
            if len(x) != len(weights):
                raise ValueError(f"{len(x)} rows and {len(weights)} weights: one for each")
        elif tokens.dtype != torch.int64 or tokens.shape != weights.shape or not tokens.is_contiguous():
            raise ValueError(f"tokens must be contiguous int64 [{len(weights)}], got {_described(tokens)}")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"


def _width(matrices: tuple[_Matrix, ...]) -> int:
    return max(matrix.column + matrix.rows for matrix in matrices)


def _matrices(record: DeviceRecord) -> tuple[int, tuple[_Matrix, ...], _Matrix]:
    """up's first column in the first product, the first product's matrices, and down.

    Where up's bytes follow gate's as one matrix's would (always, but for stored ones of odd sizes), both are one; its
    rows then begin with those that gate is filled up with.
    """
    hidden, inner = record.hidden_size, record.intermediate_size
    gate_at, up_at, down_at, *_ = record.offsets
    down = _Matrix(down_at, hidden, 0)
    if not record.gated:
        return 0, (_Matrix(up_at, inner, 0),), down
    if up_at - gate_at != unpack.matrix_bytes(record.dtype, inner, hidden, record.group):
        return inner, (_Matrix(gate_at, inner, 0), _Matrix(up_at, inner, inner)), down
    up_first = -(-inner // unpack.WIDTH) * unpack.WIDTH if record.dtype in unpack.PACKED_TYPES else inner
    return up_first, (_Matrix(gate_at, up_first + inner, 0),), down
