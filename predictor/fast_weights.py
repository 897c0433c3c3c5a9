"""A source's weights as run time wants them: int8 in the packed layout, but what adapts, which stays f32.

look, projection   one stage, [D * E + P, H]: they take the same hidden states
gate, up           one stage, [2 M, U]
inner, down        of each block, [M, M]
out                f32 [D * E, M], twice where it adapts
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix
from moe_offload.cpu_kernels.team import aligned_bytes
from moe_offload.predictor.network import SourceNetwork
from moe_offload.predictor.trace import DISTANCES, Select

Floats = NDArray[np.float32]
GROUP = 128  # inputs with a scale in common: 10 to 15 % faster than 32, and recall on real text stays
SLOPE, SHIFT = 1.5, -0.3  # of gate look-ahead that nobody has fitted


class Look(NamedTuple):
    """The next routers, as seen from a source's hidden states: models/routers.py says what scores are.

    select: what the K largest are taken of: logits, or 8 times their sigmoid or softmax plus `selection`.
    """

    rows: Floats  # [D, E, H]
    bias: Floats  # [D, E]
    select: Select = "linear"
    selection: Floats | None = None  # [D, E]


def look_ahead(experts: int) -> SourceNetwork:
    """A network without units: gate look-ahead, that may learn a bias."""
    nothing, none = np.empty((0, 0), np.float32), np.empty(0, np.float32)
    return SourceNetwork(
        nothing, none, nothing, none, nothing, none, (), np.empty((DISTANCES, experts, 0), np.float32),
        np.zeros((DISTANCES, experts), np.float32), np.full((2, DISTANCES), SLOPE, np.float32),
        np.full((2, DISTANCES), SHIFT, np.float32),
    )  # fmt: skip


class Packed(NamedTuple):
    """An int8 matrix and its bias."""

    codes: NDArray[np.uint8]
    bias: Floats

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.bias.nbytes


def pack(weights: Floats, bias: Floats | None = None) -> Packed:
    """Raises ValueError for weights that are no numbers."""
    layout = PackedMatrix(len(weights), weights.shape[1], "int8", GROUP)
    codes = aligned_bytes(layout.nbytes)
    pack_matrix(weights, layout, codes)
    found = np.zeros(len(weights), np.float32) if bias is None else np.array(bias, np.float32).reshape(-1)
    return Packed(codes, found)


class Tail(NamedTuple):
    """What adapts: contiguous f32."""

    out: Floats  # [D, E, M]
    bias: Floats  # [D, E]
    slope: Floats  # [2, D]
    shift: Floats  # [2, D]

    def copy(self) -> "Tail":
        """Memory of its own."""
        return Tail(*(part.copy() for part in self))

    def assign(self, other: "Tail") -> None:
        """Take over the other's values."""
        for part, value in zip(self, other, strict=True):
            part[...] = value

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)


class SourceWeights:
    """One source's weights. `frozen` is as trained; `adapted` what the network runs with while `use_adapted`."""

    def __init__(self, look: Look, network: SourceNetwork) -> None:
        experts = look.rows.shape[1]
        self.hidden_size = look.rows.shape[2]
        self.projected, self.units, self.depth = len(network.projection), len(network.gate), len(network.blocks)
        self.look = pack(look.rows.reshape(DISTANCES * experts, -1), look.bias)
        self.select: Select = look.select
        self.selection = np.zeros((DISTANCES, experts), np.float32)
        if look.selection is not None:
            self.selection[:] = look.selection
        matrices = [pack(network.projection, -network.offset)] if self.projected else []
        if self.units:
            matrices += [pack(network.gate, network.gate_bias), pack(network.up, network.up_bias)]
        for block in network.blocks:
            matrices += [pack(block.inner, block.inner_bias), pack(block.down)]
        self.matrices: Sequence[Packed] = matrices
        parts = (network.out, network.out_bias, network.slope, network.shift)
        self.frozen = Tail(*(np.ascontiguousarray(part, np.float32) for part in parts)).copy()
        self.adapted: Tail | None = None
        self.use_adapted = False

    @property
    def tail(self) -> Tail:
        """What it runs with now."""
        return self.adapted if self.adapted is not None and self.use_adapted else self.frozen

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        tails = self.frozen.nbytes + (0 if self.adapted is None else self.adapted.nbytes)
        return self.look.nbytes + sum(each.nbytes for each in self.matrices) + self.selection.nbytes + tails

    @property
    def read_bytes(self) -> int:
        """What one call reads."""
        return self.look.nbytes + sum(each.nbytes for each in self.matrices) + self.frozen.nbytes

    @property
    def parameters(self) -> int:
        """Weights that a token is multiplied with."""
        packed = self.look.codes.size + sum(each.codes.size for each in self.matrices)
        return packed * GROUP // (GROUP + 2) + self.frozen.out.size  # a group's scale has two bytes

    def addresses(self) -> list[int]:
        """In the order of `fast_plan.Plan`'s places."""

        parts = [part for packed in (self.look, *self.matrices) for part in packed]
        return [int(part.ctypes.data) for part in (*parts, self.selection, *self.tail)]
