"""Packed experts with random weights, between pages that nobody may touch, and what they compute in float64."""

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import Activation, Groups, Team
from moe_offload.cpu_kernels.packed_experts import Activations, PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix, pack_mxfp4, unpack_matrix
from tests.cpu_kernels.expert_cases import Floats, activate

# Half a step of the largest activation of a group, by mode: 16 bits, 8 bits, none.
_ROUNDING = {"int16": 0.5 / 32512, "int8": 0.5 / 127, "auto": 0.5 / 127, "f32": 0.0}
_F32 = 1e-6  # accumulation in f32 and the 2e-7 of exp and erf: see expert_cases.tolerance


class Guarded:
    """`size` bytes that end right before a page that faults (`at_end`), or begin right behind one."""

    def __init__(self, size: int, at_end: bool = True) -> None:
        page = mmap.PAGESIZE
        pages = (size + page - 1) // page + 2
        self._memory = mmap.mmap(-1, pages * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(self._memory, np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for fence in (0, pages - 1):
            if protect(whole.ctypes.data + fence * page, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = (pages - 1) * page - size if at_end else page
        self.bytes: NDArray[np.uint8] = whole[start : start + size]

    def rows(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of values in this memory."""
        copy: NDArray[np.float32] = self.bytes.view(np.float32).reshape(values.shape)
        copy[:] = values
        return copy


@dataclass
class PackedExperts:
    """E experts, each in a record of its own; gate, up and down as the packed numbers stand for."""

    record: ExpertRecord
    activation: Activation
    table: NDArray[np.int64]  # [E, 6]
    gate: Floats  # [E, I, H], zeros without a gate
    up: Floats  # [E, I, H]
    down: Floats  # [E, H, I]
    biases: tuple[Floats, Floats, Floats]  # [E, I], [E, I], [E, H], zeros without biases
    records: list[NDArray[np.uint8]]  # each expert's bytes

    def reference(
        self,
        index: NDArray[np.int64],
        weight: NDArray[np.float32],
        hidden: NDArray[np.float32],
        mode: Activations = "f32",
    ) -> tuple[Floats, Floats]:
        """The outputs [T, H] in float64, and by how much the kernel may differ from each.

        Roundings of many inputs are independent, so they add up as the root of their squares. Each is at most half a
        step of its group's largest, 1.7 of its deviations; 3 steps for the sum are 10 deviations, and with one input
        alone they leave room for the f32 roundings beside it.
        """
        out, room = np.zeros(hidden.shape), np.zeros(hidden.shape)
        for e in range(len(self.table)):
            tokens, choices = np.nonzero(index == e)
            if not tokens.size:
                continue
            share = weight[tokens, choices].astype(np.float64)[:, None]
            y, error = self._expert(e, hidden[tokens].astype(np.float64), _ROUNDING[mode])
            np.add.at(out, tokens, share * y)
            np.add.at(room, tokens, np.abs(share) * error)
        return out, room + _F32 * np.abs(out)

    def _expert(self, e: int, x: Floats, rounding: float) -> tuple[Floats, Floats]:
        def product(matrix: Floats, bias: Floats, x: Floats, error: Floats) -> tuple[Floats, Floats]:
            off = np.sqrt(error**2 @ (matrix**2).T) + _F32 * np.sqrt(x**2 @ (matrix**2).T)
            return x @ matrix.T + bias, off

        def rounded(x: Floats) -> Floats:
            return 6 * rounding * _largest_of_group(x, self.record.group) if rounding else np.zeros_like(x)

        up, up_error = product(self.up[e], self.biases[1][e], x, rounded(x))
        gate, gate_error = product(self.gate[e], self.biases[0][e], x, rounded(x))
        gated = self.record.gated
        h = activate(self.activation, gate if gated else None, up)
        corners = [
            activate(self.activation, gate + a * gate_error if gated else None, up + b * up_error)
            for a in (-1, 1)
            for b in (-1, 1)
        ]
        error = np.max([np.abs(corner - h) for corner in corners], axis=0)
        error += _F32 * (np.abs(h) + (np.abs(gate if gated else up) + 1) * (np.abs(up) + 1))
        y, y_error = product(self.down[e], self.biases[2][e], h, np.hypot(error, rounded(h)))
        return y, y_error


def _largest_of_group(x: Floats, group: int) -> Floats:
    """Of each element, the largest magnitude among the inputs that are rounded with it."""
    cols = x.shape[1]
    padded = np.zeros((len(x), -(-cols // group) * group))
    padded[:, :cols] = np.abs(x)
    largest = padded.reshape(len(x), -1, group).max(axis=2)
    return np.repeat(largest, group, axis=1)[:, :cols]


def make_packed(
    record: ExpertRecord,
    activation: Activation,
    count: int = 6,
    seed: int = 0,
    at_end: bool = True,
    scale: float = 1.0,
) -> PackedExperts:
    """Weights of deviation scale / sqrt(inputs). at_end: records end at a page that faults, else they begin there."""
    rng = np.random.default_rng(seed)
    hidden, inner = record.hidden_size, record.intermediate_size
    shapes = [(record.up_matrix, inner, hidden), (record.up_matrix, inner, hidden), (record.down_matrix, hidden, inner)]
    table = np.zeros((count, 6), np.int64)
    matrices = [np.zeros((count, rows, cols)) for _, rows, cols in shapes]
    biases = [np.zeros((count, rows)) for _, rows, _ in shapes]
    records = []
    for e in range(count):
        place = Guarded(record.nbytes, at_end).bytes
        records.append(place)
        for n, (layout, rows, cols) in enumerate(shapes):
            if n == 0 and not record.gated:
                continue
            part = place[record.offsets[n] :][: layout.nbytes]
            _pack(rng, layout, scale / cols**0.5, part)
            matrices[n][e] = unpack_matrix(part, layout)
            table[e, n] = part.ctypes.data
            if record.bias:
                stored = place[record.offsets[3 + n] :][: 4 * rows].view(np.float32)
                stored[:] = rng.standard_normal(rows) * 0.5
                biases[n][e] = stored
                table[e, 3 + n] = stored.ctypes.data
    gate, up, down = matrices
    return PackedExperts(record, activation, table, gate, up, down, (biases[0], biases[1], biases[2]), records)


def _pack(rng: np.random.Generator, layout: PackedMatrix, scale: float, out: NDArray[np.uint8]) -> None:
    rows, cols = layout.rows, layout.cols
    if layout.dtype != "mxfp4":
        pack_matrix((rng.standard_normal((rows, cols)) * scale).astype(np.float32), layout, out)
        return
    # the codes' deviation is about 3
    exponents = np.clip(rng.integers(-2, 1, (rows, cols // 32)) + round(np.log2(scale / 3)) + 127, 0, 254)
    pack_mxfp4(rng.integers(0, 16, (rows, cols)).astype(np.uint8), exponents.astype(np.uint8), layout, out)


def run(
    kernel: PackedExpertKernel, experts: PackedExperts, groups: Groups, hidden: NDArray[np.float32], team: Team
) -> NDArray[np.float32]:
    out = np.zeros_like(hidden)
    kernel(experts.table, groups, hidden, out, team)
    return out


def counted(counts: list[int], seed: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A routing [T, E] in which expert e gets counts[e] rows, of tokens from anywhere; -1 is nobody."""
    rng = np.random.default_rng(seed)
    tokens = max(counts)
    index = np.full((tokens, len(counts)), -1, np.int64)
    for e, count in enumerate(counts):
        index[rng.permutation(tokens)[:count], e] = e
    return index, rng.random(index.shape, np.float32) + np.float32(0.1)
