"""How quantised weights lie in memory: one layout for every instruction set, every token count, and for the GPU.

A matrix W [N, K] of y = x @ W.T is cut into blocks of 32 outputs (rows of W). A block is one sequential stream of
records, each with some consecutive inputs k of all 32 outputs and, behind them, their scales:

    block 0                                  block 1
    +----------+----------+-- ... --+------+ +----------+--
    | record 0 | record 1 |         | last | | record 0 |
    +----------+----------+-- ... --+------+ +----------+--

    int8     a record is one group of G inputs: G/4 rows of 128 bytes, then 32 scales (f16)

             row r:  | output 0       | output 1       | ... | output 31      |
                     | k=4r ... 4r+3  | k=4r ... 4r+3  |     | k=4r ... 4r+3  |   a byte each: q + 128

    int4     likewise, in rows of 64 bytes; two outputs share a byte

             row r:  | outputs 0, 16  | outputs 1, 17  | ... | outputs 15, 31 |   low nibble: the first, high: the
                     | k=4r ... 4r+3  | k=4r ... 4r+3  |     | k=4r ... 4r+3  |   second; q + 8

    mxfp4    a record is two groups of 32 inputs: 8 + 8 rows as of int4, with codes of the FP4 (E2M1) format in the
             nibbles, then 2 x 32 scales, a byte each: exponents biased by 127

Four inputs of an output side by side are what the byte dot products of AVX-512 VNNI, AVX2 and AMX take; 32 outputs
side by side need no sum over a vector's lanes. N is filled up to a multiple of 32 and K to a multiple of the record's
span, with weights that are zero. Every record is a multiple of 64 bytes.

An expert is one record of its own: gate, up and down one behind the other, then f32 biases where it has any; every
part begins on a cache line. It is the unit that is mapped, read ahead and copied to a GPU. Experts in bf16, f16 and f32
are kept that way too, with their matrices row by row as in a checkpoint.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_offload.cpu_kernels.layout import ELEMENT_BYTES

PackedType = Literal["int8", "int4", "mxfp4"]
StoredType = Literal["int8", "int4", "mxfp4", "bf16", "f16", "f32"]

WIDTH = 32  # outputs of a block
LINE = 64
GROUPS = (32, 64, 128)  # sizes an integer format may have
_GROUPS_PER_RECORD: dict[str, int] = {"int8": 1, "int4": 1, "mxfp4": 2}
_ROW_BYTES: dict[str, int] = {"int8": 128, "int4": 64, "mxfp4": 64}
_SCALE_BYTES: dict[str, int] = {"int8": 2, "int4": 2, "mxfp4": 1}
ZERO_POINT: dict[str, int] = {"int8": 128, "int4": 8, "mxfp4": 12}


def _to_line(count: int) -> int:
    return (count + LINE - 1) // LINE * LINE


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A quantised matrix [rows, cols] = [N outputs, K inputs]."""

    rows: int
    cols: int
    dtype: PackedType
    group: int = 32

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a matrix needs at least one row and one column, got {self.rows} x {self.cols}")
        if self.dtype not in get_args(PackedType):
            raise ValueError(f"unknown packed type {self.dtype!r}; use one of {', '.join(get_args(PackedType))}")
        if self.group not in GROUPS or (self.dtype == "mxfp4" and self.group != 32):
            raise ValueError(f"groups of {self.group} are not supported: {GROUPS}, and 32 alone for mxfp4")

    @property
    def groups_per_record(self) -> int:
        return _GROUPS_PER_RECORD[self.dtype]

    @property
    def span(self) -> int:
        """Inputs of one record."""
        return self.group * self.groups_per_record

    @property
    def row_bytes(self) -> int:
        """Bytes of four inputs of all outputs of a block."""
        return _ROW_BYTES[self.dtype]

    @property
    def scales_at(self) -> int:
        """Bytes from a record's begin to its scales, which lie group by group."""
        return self.span // 4 * self.row_bytes

    @property
    def record_bytes(self) -> int:
        return self.scales_at + self.groups_per_record * WIDTH * _SCALE_BYTES[self.dtype]

    @property
    def records(self) -> int:
        """Records of one block."""
        return (self.cols + self.span - 1) // self.span

    @property
    def padded_cols(self) -> int:
        return self.records * self.span

    @property
    def groups(self) -> int:
        """Groups of one block, filled up."""
        return self.records * self.groups_per_record

    @property
    def block_bytes(self) -> int:
        return self.records * self.record_bytes

    @property
    def blocks(self) -> int:
        return (self.rows + WIDTH - 1) // WIDTH

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """Where the parts of one expert lie in its record; offsets and sizes in bytes.

    hidden_size H and intermediate_size I: gate and up are [I, H], down is [H, I].
    """

    hidden_size: int
    intermediate_size: int
    dtype: StoredType
    gated: bool = True
    bias: bool = False
    group: int = 32

    def __post_init__(self) -> None:
        if self.dtype not in get_args(StoredType):
            raise ValueError(f"unknown weight type {self.dtype!r}; use one of {', '.join(get_args(StoredType))}")
        if self.hidden_size < 1 or self.intermediate_size < 1:
            raise ValueError(f"an expert needs H >= 1 and I >= 1, got {self}")

    @property
    def packed(self) -> bool:
        """Whether the matrices are `PackedMatrix`; otherwise they lie row by row."""
        return self.dtype not in ELEMENT_BYTES

    @property
    def up_matrix(self) -> PackedMatrix:
        """gate's and up's layout. ValueError for an expert that is not packed."""
        return PackedMatrix(self.intermediate_size, self.hidden_size, self._packed_type(), self.group)

    @property
    def down_matrix(self) -> PackedMatrix:
        """ValueError for an expert that is not packed."""
        return PackedMatrix(self.hidden_size, self.intermediate_size, self._packed_type(), self.group)

    def _packed_type(self) -> PackedType:
        for name in get_args(PackedType):
            if name == self.dtype:
                found: PackedType = name
                return found
        raise ValueError(f"{self.dtype} experts lie row by row and have no packed matrices")

    @property
    def matrix_bytes(self) -> tuple[int, int, int]:
        """Bytes of gate (0 without one), up and down, each filled up to whole cache lines."""
        if self.packed:
            up, down = self.up_matrix.nbytes, self.down_matrix.nbytes
        else:
            up = down = _to_line(self.hidden_size * self.intermediate_size * ELEMENT_BYTES[self.dtype])
        return (up if self.gated else 0), up, down

    @property
    def offsets(self) -> tuple[int, int, int, int, int, int]:
        """gate, up, down, gate bias, up bias, down bias; a part that is missing has no bytes."""
        gate, up, down = self.matrix_bytes
        inner = _to_line(4 * self.intermediate_size) if self.bias else 0
        gate_bias = gate + up + down
        up_bias = gate_bias + (inner if self.gated else 0)
        return 0, gate, gate + up, gate_bias, up_bias, up_bias + inner

    @property
    def weight_bytes(self) -> int:
        """Bytes that one pass over the expert reads, biases aside."""
        return sum(self.matrix_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the record, a multiple of 64."""
        return self.offsets[5] + (_to_line(4 * self.hidden_size) if self.bias else 0)
