"""Matrices outside of the experts: attention projections, shared experts, the output head.

y = x @ W.T + bias for one or several W that take the same x, in the packed layout or row by row as stored.
"""

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import matrix_block as word
from moe_offload.cpu_kernels.activation_rows import arithmetic_for, row_bytes
from moe_offload.cpu_kernels.kernel_cache import compile_job, compiled
from moe_offload.cpu_kernels.layout import ELEMENT_BYTES, WeightType
from moe_offload.cpu_kernels.matrix_job import make_matrix_job
from moe_offload.cpu_kernels.memory import TYPE_CODES, load_i64, store_i64
from moe_offload.cpu_kernels.packed_experts import Activations, both_planes, float_bits, guided_cuts
from moe_offload.cpu_kernels.packed_job import LARGEST_TILE
from moe_offload.cpu_kernels.packed_layout import WIDTH, PackedMatrix, StoredType
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team

LINE = 64
CHUNK = 64
RUN = 8
_compiling = threading.Lock()


class Matrix(NamedTuple):
    """One matrix of a stage: addresses, and its number of outputs. `add` is a residual f32 [T, add_step / 4]."""

    weights: int
    outputs: int
    bias: int = 0  # f32
    add: int = 0
    add_step: int = 0


class Norm(NamedTuple):
    """A norm before the product: addresses of f32 weights; with a bias it is a LayerNorm."""

    weight: int
    epsilon: float
    bias: int = 0


@compiled("void(int64, int64[::1], int64[:,::1], int64[::1], int64, int64, int64, int64)")
def _fill(
    args: int,
    constants: NDArray[np.int64],
    entries: NDArray[np.int64],
    cuts: NDArray[np.int64],
    tokens: int,
    x: int,
    x_step: int,
    local: int,
) -> None:
    """The argument block and the lists behind it. `constants` from ENTRIES on; addresses in it are overwritten."""
    for counter in range(0, word.COUNTERS, LINE):
        store_i64(0, args + counter)
    for i in range(constants.size):
        store_i64(constants[i], args + word.ENTRIES + 8 * i)
    at = args + word.BYTES
    store_i64(at, args + word.ENTRIES)
    for e in range(entries.shape[0]):
        for i in range(entries.shape[1]):
            store_i64(entries[e, i], at + word.ENTRY_BYTES * e + 8 * i)
    at += word.ENTRY_BYTES * entries.shape[0]
    store_i64(at, args + word.ROW_LIST)
    rows = (at + 8 * (tokens + LARGEST_TILE) + LINE - 1) // LINE * LINE
    size = load_i64(args + word.ROW_BYTES)
    for t in range(tokens + LARGEST_TILE):
        store_i64(rows + (t if t < tokens else 0) * size, at + 8 * t)
    store_i64(rows, args + word.ROWS)
    at = rows + tokens * size
    store_i64(at, args + word.NORM_OUT)
    if load_i64(args + word.NORM) != 0:
        at += (tokens * load_i64(args + word.COLS) * 4 + LINE - 1) // LINE * LINE
    store_i64(at, args + word.LOCAL)
    store_i64(local, args + word.LOCAL_BYTES)
    store_i64(tokens, args + word.TOKENS)
    store_i64(x, args + word.X)
    store_i64(x_step, args + word.X_STEP)
    store_i64(cuts.size - 1, args + word.JOBS)
    store_i64(cuts.ctypes.data, args + word.CUTS)


COMPILED = (_fill,)


def _local_bytes(tokens: int) -> int:
    """Each thread's own memory: a run of blocks for a chunk of tokens, and for tiles that reach behind it."""
    return (min(CHUNK, tokens) + LARGEST_TILE) * 4 * WIDTH * RUN + LINE


@cache
def _job(dtype: str, group: int, exact: bool) -> Any:
    target = current_target()
    if dtype in ELEMENT_BYTES:
        key = f"matrix-{dtype}"
        function = make_matrix_job(key, dtype, "exact", target)  # type: ignore[arg-type]
    else:
        layout = PackedMatrix(WIDTH, group, dtype, group)  # type: ignore[arg-type]  # only its kind matters
        arithmetic = arithmetic_for(dtype, exact, target)
        key = f"matrix-{dtype}-{group}-{arithmetic}"
        function = make_matrix_job(key, layout, arithmetic, target)
    return compile_job(function, "void(int64,int64)", key)


class MatrixKernel:
    """Products with matrices of K inputs in one format. Compiled (or loaded) with the first call.

    activations: as of PackedExpertKernel; without meaning for bf16, f16 and f32, which take f32 activations.
    """

    def __init__(self, cols: int, dtype: StoredType, group: int = 32, activations: Activations = "auto") -> None:
        if dtype not in get_args(StoredType):
            raise ValueError(f"unknown weight type {dtype!r}; use one of {', '.join(get_args(StoredType))}")
        self.cols, self.dtype, self.group, self.activations = cols, dtype, group, activations
        if dtype in ELEMENT_BYTES:
            padded, records, self._row_bytes = cols, 0, 0
        else:
            layout = PackedMatrix(WIDTH, cols, dtype, group)  # type: ignore[arg-type]
            padded, records = layout.padded_cols, layout.records
            arithmetic = arithmetic_for(dtype, activations == "f32", current_target())
            self._row_bytes = row_bytes(padded, group, arithmetic)
        constants = dict.fromkeys(range(word.ENTRIES, word.ROUND + 8, 8), 0)
        constants |= {
            word.COLS: cols,
            word.PADDED: padded,
            word.RECORDS: records,
            word.ROW_BYTES: self._row_bytes,
            word.RUN: RUN,
            word.CHUNK: CHUNK,
            word.BOTH_PLANES: both_planes(dtype, activations),
            word.ROUND: TYPE_CODES["f32"],
        }
        self._constants = np.array([constants[key] for key in sorted(constants)], np.int64)
        self._cuts: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._compiled: Any = None

    def load(self) -> None:
        """Compile the kernel or load it from the cache."""
        with _compiling:
            self._compiled = _job(self.dtype, self.group, self.activations == "f32")

    @property
    def job(self) -> int:
        """Address of the compiled job, for a chain of stages."""
        if self._compiled is None:
            self.load()
        address: int = self._compiled.address
        return address

    def block_bytes(self, matrices: int, tokens: int, threads: int, norm: bool = False) -> int:
        """Memory that `fill` needs."""
        size = word.BYTES + matrices * word.ENTRY_BYTES + 8 * (tokens + LARGEST_TILE) + 3 * LINE
        size += tokens * (self._row_bytes + (4 * self.cols if norm else 0))
        return size + threads * _local_bytes(tokens)

    def fill(
        self,
        args: int,
        matrices: Sequence[Matrix],
        tokens: int,
        x: int,
        x_step: int,
        outs: Sequence[tuple[int, int]],
        threads: int,
        norm: Norm | None = None,
        rounding: WeightType = "f32",
    ) -> NDArray[np.int64]:
        """Write the argument block of a stage at `args`. Returns an array that has to live as long as the block.

        x: address of f32 inputs, x_step bytes from token to token; outs: the same for each matrix's results.
        """
        entries = np.zeros((len(matrices), word.ENTRY_BYTES // 8), np.int64)
        first = 0
        for entry, matrix, (out, step) in zip(entries, matrices, outs, strict=True):
            entry[:] = matrix.weights, first, matrix.outputs, out, step, matrix.bias, matrix.add, matrix.add_step
            first += (matrix.outputs + WIDTH - 1) // WIDTH
        cuts = self._cuts.get((first, threads))
        if cuts is None:
            cuts = self._cuts[first, threads] = guided_cuts(first, threads)
        constants = self._constants
        if norm is not None or rounding != "f32":
            constants = constants.copy()
            at = {key: (key - word.ENTRIES) // 8 for key in (word.NORM, word.NORM_BIAS, word.EPSILON, word.ROUND)}
            constants[at[word.ROUND]] = TYPE_CODES[rounding]
            if norm is not None:
                constants[at[word.NORM]], constants[at[word.NORM_BIAS]] = norm.weight, norm.bias
                constants[at[word.EPSILON]] = float_bits(norm.epsilon)
        _fill(args, constants, entries, cuts, tokens, x, x_step, _local_bytes(tokens))
        return cuts

    def __call__(
        self,
        matrices: Sequence[Matrix],
        x: NDArray[np.float32],
        outs: Sequence[NDArray[np.float32]],
        team: Team,
    ) -> None:
        """outs[m] [T, N_m] = x [T, K] @ W_m.T + bias. The caller keeps the memory behind the addresses mapped.

        Raises ValueError for shapes that do not fit together.
        """
        tokens = len(x)
        if x.ndim != 2 or x.shape[1] != self.cols or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x {x.shape} {x.dtype} must be a dense f32 [T, {self.cols}]")
        if not tokens or not matrices:
            return
        for matrix, out in zip(matrices, outs, strict=True):
            if out.shape != (tokens, matrix.outputs) or out.dtype != np.float32 or out.strides[1] != 4:
                raise ValueError(f"out {out.shape} {out.dtype} must be f32 [{tokens}, {matrix.outputs}]")
        job = self.job
        with team.lock:
            args = team.scratch(self.block_bytes(len(matrices), tokens, team.threads))
            places = [(int(out.ctypes.data), int(out.strides[0])) for out in outs]
            self.fill(args, matrices, tokens, int(x.ctypes.data), int(x.strides[0]), places, team.threads)
            team.launch(job, args)
