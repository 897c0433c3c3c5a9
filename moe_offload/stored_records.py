"""Experts as a checkpoint stores them, gathered into records: what the expert store reads where there is no pack."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.expert_weights import ExpertWeights, MatrixSet

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def stored_record(weights: ExpertWeights) -> ExpertRecord | None:
    """The record of one of these experts; None where no record holds their format."""
    if weights.format == "fp8" or weights.format == "mxfp4":
        return None
    return ExpertRecord(
        weights.hidden_size, weights.intermediate_size, weights.format, weights.gate is not None,
        weights.down_bias is not None,
    )  # fmt: skip


class StoredSource:
    """Implements `RecordSource` on the mapped checkpoint: gate, up and down lie apart there, often in other strides."""

    def __init__(
        self, checkpoint: Checkpoint, weights: Sequence[ExpertWeights], records: Mapping[int, ExpertRecord]
    ) -> None:
        self._checkpoint, self._weights, self._records = checkpoint, weights, records
        self.num_experts = weights[0].num_experts

    def record_bytes(self, layer: int) -> int:
        return self._records[layer].nbytes

    def read_into(self, layer: int, expert: int, out: NDArray[np.uint8]) -> None:
        weights, record = self._weights[layer], self._records[layer]
        target, dtype = torch.from_numpy(out), _DTYPES[record.dtype]
        parts = (weights.gate, weights.up, weights.down)
        biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
        for part, offset in zip(parts, record.offsets[:3], strict=True):
            self._copy(part, expert, target, offset, dtype)
        for bias, offset in zip(biases, record.offsets[3:], strict=True):
            self._copy(bias, expert, target, offset, torch.float32)

    def _copy(self, part: MatrixSet | None, expert: int, out: torch.Tensor, offset: int, dtype: torch.dtype) -> None:
        if part is None:
            return
        source = part.view(self._checkpoint, expert)
        out[offset : offset + source.numel() * dtype.itemsize].view(dtype).view(source.shape).copy_(source)

    def will_need(self, layer: int, expert: int) -> None:
        """The mapped file reads ahead by itself: a record is megabytes in a row."""
