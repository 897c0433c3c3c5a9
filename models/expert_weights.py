"""Where every expert's matrices lie in a checkpoint: resolved once with the loader's own rules, then plain offsets.

transformers fuses experts into `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` (some architectures transposed,
some with gate and up interleaved). On disk they lie in one of these ways, and all of them can be read in place as
strided matrices:

    per expert       experts.N.{gate,up,down}_proj.weight     merged and concatenated by the loader
    fused            [E, 2I, H] and [E, H, I]                 as in memory
    transposed       [E, H, 2I] and [E, I, H]                 rows and columns swapped
    interleaved      rows (or columns) gate0, up0, gate1, up1, ...
    encoded          FP8 blocks with `_scale_inv` or MXFP4 `_blocks` with `_scales` beside each matrix

Matrices here are those of `y = x @ W.T`: `[out, in]`, whatever their strides. No fused tensor is ever made.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.compat import KeyResolver, ResolvedKey, natural_order
from moe_offload.models.errors import CheckpointError, UnsupportedModelError
from moe_offload.models.safetensors_header import DTYPE_BITS, TensorRecord
from moe_offload.models.spec import MoeLayerSpec, MoeSpec

WeightFormat = Literal["bf16", "f16", "f32", "fp8", "mxfp4"]

FORMATS: Mapping[str, WeightFormat] = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F8_E4M3": "fp8", "U8": "mxfp4"}
SUPPORTED_FORMATS = "bf16, f16, f32, FP8 in blocks (with weight_scale_inv) and MXFP4 (with blocks and scales)"


@dataclass(frozen=True, slots=True)
class MatrixSet:
    """The same matrix (or bias vector) of every expert of a layer, as strided views of stored tensors.

    `records` holds one tensor per expert, or one fused over experts in which expert e starts at `e * expert_stride`.
    `start`, `expert_stride` and `strides` count elements. `scales` are the block scales of an encoded matrix.
    """

    records: tuple[TensorRecord, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0
    expert_stride: int | None = None
    scales: "MatrixSet | None" = None

    @property
    def dtype(self) -> str:
        """The stored dtype, as safetensors names it."""
        return self.records[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's matrix, scales included."""
        own = int(np.prod(self.shape)) * DTYPE_BITS[self.dtype] // 8
        return own + (self.scales.nbytes if self.scales else 0)

    @property
    def keys(self) -> set[str]:
        """Names of the stored tensors."""
        return {record.name for record in self.records} | (self.scales.keys if self.scales else set())

    def view(self, checkpoint: Checkpoint, expert: int) -> torch.Tensor:
        """Expert `expert`'s matrix as a strided read-only tensor on the mapped file."""
        if self.expert_stride is None:
            return checkpoint.view(self.records[expert]).as_strided(self.shape, self.strides, self.start)
        start = self.start + expert * self.expert_stride
        return checkpoint.view(self.records[0]).as_strided(self.shape, self.strides, start)

    def addresses(self, checkpoint: Checkpoint, num_experts: int) -> NDArray[np.int64]:
        """Address of each expert's first element."""
        item = DTYPE_BITS[self.dtype] // 8
        base = np.array([checkpoint.address(record) for record in self.records], np.int64)
        if self.expert_stride is not None:
            base = base[0] + np.arange(num_experts, dtype=np.int64) * (self.expert_stride * item)
        return base[:num_experts] + self.start * item


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """All experts of one MoE layer, in place. `gate` is None where experts have no gate."""

    format: WeightFormat
    num_experts: int
    hidden_size: int
    intermediate_size: int
    up: MatrixSet
    down: MatrixSet
    gate: MatrixSet | None = None
    gate_bias: MatrixSet | None = None
    up_bias: MatrixSet | None = None
    down_bias: MatrixSet | None = None

    @property
    def matrices(self) -> tuple[MatrixSet, ...]:
        """The weight matrices that an expert has, gate first."""
        return tuple(m for m in (self.gate, self.up, self.down) if m is not None)

    @property
    def bytes_per_expert(self) -> int:
        """Bytes read to compute one expert."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def keys(self) -> set[str]:
        """Names of the stored tensors that belong to these experts."""
        biases = (b for b in (self.gate_bias, self.up_bias, self.down_bias) if b is not None)
        return set().union(*(each.keys for each in (*self.matrices, *biases)))


def locate_experts(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    spec: MoeSpec,
) -> dict[str, ExpertWeights]:
    """Find the stored weights of each layer of `spec` in `checkpoint`, by the path of the experts module.

    `model` is the skeleton with its expert parameters still in place (on meta).

    Raises CheckpointError for what is missing or of the wrong shape or dtype, UnsupportedModelError for a storage
    layout that is none of the above.
    """
    shapes = {
        layer.path: {
            name: tuple(parameter.shape)
            for name, parameter in model.get_submodule(layer.path).named_parameters(recurse=False)
        }
        for layer in spec.layers
    }
    targets = {f"{path}.{name}" for path, names in shapes.items() for name in names}
    sources = _sources(KeyResolver(model), checkpoint, targets)
    return {layer.path: _Layer(layer, shapes[layer.path], sources, checkpoint).weights() for layer in spec.layers}


def _sources(
    resolve: KeyResolver, checkpoint: Checkpoint, targets: Collection[str]
) -> Mapping[str, Mapping[ResolvedKey, Sequence[TensorRecord]]]:
    """Parameter name -> the way it is reached -> stored tensors in natural order (experts.2 before experts.10)."""
    found: dict[str, dict[ResolvedKey, list[TensorRecord]]] = defaultdict(lambda: defaultdict(list))
    for key in natural_order(checkpoint.records):
        if not key.endswith(("_scale_inv", "_scales")):  # companions are looked up beside their matrix
            resolved = resolve(key.removesuffix("_blocks"))
            if resolved.target in targets:
                found[resolved.target][resolved].append(checkpoint.records[key])
    return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """Stored tensors of one parameter (or of one of its concatenated halves)."""

    records: tuple[TensorRecord, ...]
    fused: bool  # one tensor over all experts
    flipped: bool = False  # stored transposed relative to the parameter
    interleaved: bool = False  # stored with gate and up rows alternating


class _Layer:
    """Turns one experts module's parameters into `ExpertWeights`."""

    def __init__(
        self,
        spec: MoeLayerSpec,
        shapes: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, Mapping[ResolvedKey, Sequence[TensorRecord]]],
        checkpoint: Checkpoint,
    ) -> None:
        self.spec = spec
        self.path = spec.path
        self.shapes = shapes
        self.sources = sources
        self.checkpoint = checkpoint
        self.num_experts = spec.num_experts

    def weights(self) -> ExpertWeights:
        unknown = set(self.shapes) - {
            "gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias",
        }  # fmt: skip
        if unknown:
            raise UnsupportedModelError(f"{self.path} has parameters the engine does not know: {sorted(unknown)}")
        gated = self.spec.gated
        gate, up = self.gate_up("gate_up_proj") if gated else (None, self.matrix("up_proj"))
        gate_bias, up_bias, down_bias = None, None, None
        if gated and "gate_up_proj_bias" in self.shapes:
            gate_bias, up_bias = self.gate_up_bias()
        elif "up_proj_bias" in self.shapes:
            up_bias = self.vector("up_proj_bias")
        if "down_proj_bias" in self.shapes:
            down_bias = self.vector("down_proj_bias")
        down = self.matrix("down_proj")
        formats = {m.dtype for m in (gate, up, down) if m is not None}
        if len(formats) != 1 or not formats <= FORMATS.keys():
            raise CheckpointError(
                f"the experts of {self.path} are stored as {', '.join(sorted(formats))}; "
                f"supported are {SUPPORTED_FORMATS}, one for all matrices of a layer"
            )
        return ExpertWeights(
            FORMATS[formats.pop()], self.num_experts, self.spec.hidden_size, self.spec.intermediate_size,
            up, down, gate, gate_bias, up_bias, down_bias,
        )  # fmt: skip

    def pieces(self, name: str) -> list[_Piece]:
        """The stored tensors of parameter `name`, in the order in which the loader concatenates them."""
        target = f"{self.path}.{name}"
        ways = self.sources.get(target)
        if not ways:
            raise CheckpointError(
                f"the checkpoint has no tensor for {target} {list(self.shapes[name])}: it is incomplete, or of another "
                "architecture than its config.json says"
            )
        first = next(iter(ways))
        operations = first.operation_names
        if operations in (("MergeModulelist",), ("MergeModulelist", "Concatenate")):
            by_pattern = {way.pattern: tuple(records) for way, records in ways.items()}
            pieces = [_Piece(by_pattern.get(pattern, ()), fused=False) for pattern in first.patterns]
            for piece, pattern in zip(pieces, first.patterns, strict=True):
                if len(piece.records) < self.num_experts:
                    raise CheckpointError(
                        f"{target} needs {self.num_experts} tensors {pattern!r}, "
                        f"the checkpoint has {len(piece.records)}"
                    )
            return pieces
        records = [record for way in ways.values() for record in way]
        if len(records) != 1:
            raise CheckpointError(f"{target} is there {len(records)} times, as {[r.name for r in records[:3]]}")
        if not operations:
            return [_Piece(tuple(records), fused=True)]
        if operations == ("Transpose",):
            kept = first.operations[0].check_dims and records[0].shape == self.shapes[name]
            return [_Piece(tuple(records), fused=True, flipped=not kept)]
        if operations == ("Interleave",):
            return [_Piece(tuple(records), fused=True, interleaved=True)]
        raise UnsupportedModelError(
            f"{target} is stored in a way that cannot be read in place ({' then '.join(operations)})"
        )

    def matrix(self, name: str) -> MatrixSet:
        """A parameter that is one matrix per expert (up_proj without a gate, down_proj)."""
        return self.whole(name, self.only(name), self.out_in(name))

    def gate_up(self, name: str) -> tuple[MatrixSet, MatrixSet]:
        """gate and up out of their fused parameter, as [I, H] each."""
        pieces = self.pieces(name)
        out, inner = self.out_in(name)
        if len(pieces) == 2:
            gate, up = (self.whole(name, piece, (out // 2, inner)) for piece in pieces)
            return gate, up
        fused = self.whole(name, self.only(name), (out, inner))
        return self.halves(fused, pieces[0].interleaved or self.spec.interleaved)

    def gate_up_bias(self) -> tuple[MatrixSet, MatrixSet]:
        return self.halves(self.vector("gate_up_proj_bias"), self.spec.interleaved)

    def halves(self, fused: MatrixSet, interleaved: bool) -> tuple[MatrixSet, MatrixSet]:
        """Split along the output dimension: first and second half, or even and odd."""
        rows = fused.shape[0] // 2
        row = fused.strides[0]
        step, second = (2 * row, row) if interleaved else (row, rows * row)

        def half(start: int) -> MatrixSet:
            scales = None
            if fused.scales is not None:
                if not interleaved and rows * fused.scales.shape[0] % fused.shape[0]:
                    raise UnsupportedModelError(f"{self.path}: scale blocks straddle gate and up")
                first, other = self.halves(fused.scales, interleaved)
                scales = other if start else first
            return MatrixSet(
                fused.records, (rows, *fused.shape[1:]), (step, *fused.strides[1:]),
                fused.start + start, fused.expert_stride, scales,
            )  # fmt: skip

        return half(0), half(second)

    def only(self, name: str) -> _Piece:
        pieces = self.pieces(name)
        if len(pieces) != 1:
            raise UnsupportedModelError(f"{self.path}.{name} is stored in {len(pieces)} parts")
        return pieces[0]

    def out_in(self, name: str) -> tuple[int, int]:
        rows, cols = self.shapes[name][1:]
        return (cols, rows) if self.spec.transposed else (rows, cols)

    def whole(self, name: str, piece: _Piece, out_in: tuple[int, int]) -> MatrixSet:
        """One [out, in] matrix per expert, checked against the shapes on disk."""
        record = piece.records[0]
        if record.name.endswith("_blocks"):
            return self.mxfp4(record, out_in)
        flipped = self.spec.transposed != piece.flipped
        stored = tuple(reversed(out_in)) if flipped else out_in
        expected = (self.shapes[name][0], *stored) if piece.fused else stored
        for each in piece.records:
            if each.shape != expected or each.dtype != record.dtype:
                raise CheckpointError(
                    f"tensor {each.name!r} is {each.dtype} {list(each.shape)}, expected {record.dtype} {list(expected)}"
                )
        if record.dtype not in FORMATS or record.dtype == "U8":
            raise CheckpointError(
                f"tensor {record.name!r} has dtype {record.dtype}; experts can be {SUPPORTED_FORMATS}"
            )
        strides = (1, out_in[0]) if flipped else (out_in[1], 1)
        expert_stride = out_in[0] * out_in[1] if piece.fused else None
        scales = self.fp8_scales(piece, out_in, flipped) if record.dtype == "F8_E4M3" else None
        return MatrixSet(piece.records, out_in, strides, 0, expert_stride, scales)

    def fp8_scales(self, piece: _Piece, out_in: tuple[int, int], flipped: bool) -> MatrixSet:
        """The [out / block, in / block] scales beside each FP8 tensor."""
        scales = tuple(self.companion(record, record.name + "_scale_inv") for record in piece.records)
        rows, cols = scales[0].shape[-2:]
        if flipped:
            rows, cols = cols, rows
        if any(s.shape != scales[0].shape for s in scales) or out_in[0] % rows or out_in[1] % cols:
            raise UnsupportedModelError(
                f"scales {scales[0].name!r} {list(scales[0].shape)} do not divide a matrix of "
                f"{list(out_in)} into blocks"
            )
        strides = (1, rows) if flipped else (cols, 1)
        return MatrixSet(scales, (rows, cols), strides, 0, rows * cols if piece.fused else None)

    def mxfp4(self, blocks: TensorRecord, out_in: tuple[int, int]) -> MatrixSet:
        """[E, out, in / 32, 16] bytes of two 4-bit values, one scale byte for each 32."""
        out, inner = out_in
        scales = self.companion(blocks, blocks.name.removesuffix("_blocks") + "_scales")
        groups = inner // 32
        if blocks.shape != (self.num_experts, out, groups, 16) or scales.shape != blocks.shape[:-1]:
            raise CheckpointError(
                f"tensor {blocks.name!r} is {list(blocks.shape)} with scales {list(scales.shape)}, expected "
                f"{[self.num_experts, out, groups, 16]} and {[self.num_experts, out, groups]}"
            )
        scale_set = MatrixSet((scales,), (out, groups), (groups, 1), 0, out * groups)
        return MatrixSet((blocks,), (out, groups, 16), (groups * 16, 16, 1), 0, out * groups * 16, scale_set)

    def vector(self, name: str) -> MatrixSet:
        """A bias, [E, n] on disk."""
        record = self.only(name).records[0]
        if record.shape != self.shapes[name] or record.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(
                f"tensor {record.name!r} is {record.dtype} {list(record.shape)}, "
                f"expected floats {list(self.shapes[name])}"
            )
        return MatrixSet((record,), record.shape[1:], (1,), 0, record.shape[1])

    def companion(self, record: TensorRecord, name: str) -> TensorRecord:
        companion = self.checkpoint.records.get(name)
        if companion is None:
            raise CheckpointError(f"tensor {record.name!r} needs its scales {name!r}, which the checkpoint lacks")
        return companion
