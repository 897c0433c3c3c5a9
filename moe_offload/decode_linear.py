"""Linears as stored, for a few tokens: our kernels read them faster than torch does.

Measured on Zen 4, bf16 [8192, 2048], one token: torch's product reads 12 GB/s of 33. This is for the output head, and
for all linears outside of the experts where a decoder layer runs through transformers' modules; packed ones are
`PackedLinear`s already.
"""

import copy
from typing import Any

import torch
from torch import nn

from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel
from moe_offload.cpu_kernels.target import current_target
from moe_offload.decode_layer import plain_call
from moe_offload.decode_modules import WEIGHT_TYPES

LEAST_WEIGHTS = 1 << 20  # a linear of fewer is over before a launch pays
MOST_TOKENS = 4  # beyond that torch's product has something to gain from its tiles


class DecodeLinear:
    """Stands for the `forward` of an `nn.Linear`; what is unusual or large goes to the original."""

    def __init__(self, engine: Any, linear: nn.Linear) -> None:
        self.engine, self.linear = engine, linear
        self._kernels: dict[torch.dtype, MatrixKernel] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeLinear":
        """A copied model shares the threads."""
        return DecodeLinear(self.engine, copy.deepcopy(self.linear, memo))

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        linear = self.linear
        if torch.compiler.is_compiling() or not self._takes(input):
            return nn.Linear.forward(linear, input)
        weight, bias = linear.weight, linear.bias
        count, width = weight.shape
        x = input.detach().reshape(-1, width).to(torch.float32).contiguous()
        out = torch.empty(len(x), count, dtype=torch.float32)
        floats = None if bias is None else bias.detach().to(torch.float32).contiguous()
        matrix = Matrix(weight.data_ptr(), count, 0 if floats is None else floats.data_ptr())
        self.engine.multiply(self._kernel(weight.dtype, width), [matrix], x.numpy(), [out.numpy()])
        return out.to(input.dtype).reshape(*input.shape[:-1], count)

    def _takes(self, input: torch.Tensor) -> bool:
        weight, bias = self.linear.weight, self.linear.bias
        if type(input) is not torch.Tensor or type(weight) not in (nn.Parameter, torch.Tensor):
            return False
        if not 0 < input.numel() <= MOST_TOKENS * weight.shape[1] or input.shape[-1] != weight.shape[1]:
            return False
        if input.dtype != weight.dtype or weight.dtype not in WEIGHT_TYPES or not weight.is_contiguous():
            return False
        if weight.dtype == torch.float16 and not current_target().half:
            return False
        tensors = [each for each in (input, weight, bias) if each is not None]
        if any(each.device.type != "cpu" for each in tensors) or not plain_call():
            return False
        return not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))

    def _kernel(self, dtype: torch.dtype, width: int) -> MatrixKernel:
        kernel = self._kernels.get(dtype)
        if kernel is None or kernel.cols != width:
            kernel = self._kernels[dtype] = MatrixKernel(width, WEIGHT_TYPES[dtype])
        return kernel
