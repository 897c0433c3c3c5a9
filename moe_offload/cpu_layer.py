"""One MoE layer's experts on the CPU: kernels for the few-token experts, torch's matrix product for the rest.

Both ways read the weights where they lie in the mapped checkpoint and add into one f32 output, rounded once at the end.
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from moe_offload.cpu_kernels.experts import ExpertKernel
from moe_offload.cpu_kernels.grouping import Groups
from moe_offload.cpu_kernels.layout import ExpertLayout, WeightType
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.team import Team
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.dequantize import read_matrix
from moe_offload.models.expert_weights import ExpertWeights, MatrixSet
from moe_offload.models.spec import MoeLayerSpec

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NEVER = 1 << 62  # tokens
_BIAS_TYPES: dict[str, WeightType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


def kernel_layout(weights: ExpertWeights) -> ExpertLayout | None:
    """The kernels' description of how these experts lie, or None if no kernel reads them so."""
    if weights.format not in ("bf16", "f16", "f32"):
        return None
    up, down, bias = weights.up, weights.down, weights.down_bias
    transposed = down.strides[0] == 1 and weights.intermediate_size > 1 and weights.hidden_size > 1
    return ExpertLayout(
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        dtype=weights.format,
        gated=weights.gate is not None,
        transposed=transposed,
        gate_up_stride=up.strides[1] if transposed else up.strides[0],
        gate_up_step=up.strides[0] if transposed else 1,
        bias=bias is not None,
        bias_dtype=_BIAS_TYPES[bias.dtype] if bias is not None else None,
        bias_step=weights.up_bias.strides[0] if weights.up_bias is not None else 1,
    )


class CpuLayer:
    """The experts of one layer, called with rows grouped by expert."""

    def __init__(
        self,
        spec: MoeLayerSpec,
        weights: ExpertWeights,
        checkpoint: Checkpoint,
        kernel: ExpertKernel | None,
        team: Team,
        gemm_rows: int,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.checkpoint = checkpoint
        self.kernel = kernel
        self.team = team
        self.gemm_rows = gemm_rows
        self.num_experts = weights.num_experts
        self.bytes_per_expert = weights.bytes_per_expert
        self.table = _address_table(weights, checkpoint) if kernel is not None else None

    def __call__(self, module: nn.Module, groups: Groups, hidden_states: torch.Tensor, out: torch.Tensor) -> int:
        """Add the experts' rows to `out` [T, H] f32. hidden_states [T, H] on the CPU. Returns the experts torch ran."""
        if self.kernel is None or self.table is None:
            self._run_torch(module, groups, hidden_states, out)
            return len(groups.experts)
        # torch multiplies like by like: weights in another dtype than the tokens would be converted at every call.
        same_dtype = hidden_states.dtype == _DTYPES[self.weights.format]
        many = np.diff(groups.offsets) >= (self.gemm_rows if same_dtype else NEVER)
        by_torch = int(np.count_nonzero(many))
        few = groups.select(~many) if by_torch else groups
        if len(few.experts):
            hidden = hidden_states.float().contiguous()
            self.kernel(self.table, few, hidden.numpy(), out.numpy(), self.team)
        if by_torch:
            self._run_torch(module, groups.select(many), hidden_states, out)
        return by_torch

    def _run_torch(self, module: nn.Module, groups: Groups, hidden_states: torch.Tensor, out: torch.Tensor) -> None:
        tokens = torch.from_numpy(groups.tokens)
        row_weights = torch.from_numpy(groups.weights)
        for position, expert in enumerate(groups.experts.tolist()):
            start, stop = groups.offsets[position], groups.offsets[position + 1]
            rows = tokens[start:stop]
            result = self._expert(module, expert, hidden_states[rows])
            out.index_add_(0, rows, result.float() * row_weights[start:stop, None])

    def _expert(self, module: nn.Module, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """One expert as its module defines it, in the dtype of `rows` [n, H]."""
        weights = self.weights
        up = self._project(rows, weights.up, weights.up_bias, expert)
        if weights.gate is None:
            inner = module.act_fn(up)  # type: ignore[operator]
        else:
            gate = self._project(rows, weights.gate, weights.gate_bias, expert)
            if self.spec.interleaved:
                gate_up = torch.stack([gate, up], dim=-1).flatten(-2)
            else:
                gate_up = torch.cat([gate, up], dim=-1)
            if hasattr(module, "_apply_gate"):
                inner = module._apply_gate(gate_up)  # type: ignore[operator]
            else:
                inner = module.act_fn(gate) * up  # type: ignore[operator]
        result = self._project(inner, weights.down, weights.down_bias, expert)
        if getattr(module, "has_post_expert_norm", False):
            result = module.post_expert_norm(result)  # type: ignore[operator]
        return result

    def _project(self, rows: torch.Tensor, matrix: MatrixSet, bias: MatrixSet | None, expert: int) -> torch.Tensor:
        weight = read_matrix(matrix, self.weights.format, self.checkpoint, expert, rows.dtype)
        vector = None if bias is None else bias.view(self.checkpoint, expert).to(rows.dtype)
        return functional.linear(rows, weight, vector)


class PackedLayer:
    """The experts of one layer in a pack: all of them through its kernel, which has the arithmetic for many tokens too.

    table [E, 6]: addresses of the parts of each expert's record.
    """

    def __init__(self, kernel: PackedExpertKernel, table: NDArray[np.int64], team: Team) -> None:
        self.kernel = kernel
        self.table = table
        self.team = team
        self.num_experts = len(table)
        self.bytes_per_expert = kernel.record.weight_bytes

    def __call__(self, module: nn.Module, groups: Groups, hidden_states: torch.Tensor, out: torch.Tensor) -> int:
        """As `CpuLayer`; torch runs none of the experts."""
        if len(groups.experts):
            self.kernel(self.table, groups, hidden_states.float().contiguous().numpy(), out.numpy(), self.team)
        return 0


def _address_table(weights: ExpertWeights, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """[E, 6]: where each expert's gate, up, down and their biases begin; 0 for what it has not."""
    columns = (
        weights.gate, weights.up, weights.down,
        weights.gate_bias, weights.up_bias, weights.down_bias,
    )  # fmt: skip
    table = np.zeros((weights.num_experts, len(columns)), np.int64)
    for column, matrix in enumerate(columns):
        if matrix is not None:
            table[:, column] = matrix.addresses(checkpoint, weights.num_experts)
    return table
