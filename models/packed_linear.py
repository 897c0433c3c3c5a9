"""A linear layer whose matrix is quantised and packed, in the place of an `nn.Linear`.

The matrix is no parameter: state_dict does not list it, `to(dtype)` leaves it as it is, copies of the model share it.
A bias stays the parameter that it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree

from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel
from moe_offload.cpu_kernels.packed_layout import WIDTH, PackedMatrix
from moe_offload.cpu_kernels.packing import unpack_matrix

Floats = NDArray[np.float32]
# (kernel, matrices, x [T, K], [out [T, N], ...]): runs `kernel` on the engine's threads.
Multiply = Callable[[MatrixKernel, Sequence[Matrix], Floats, Sequence[Floats]], None]

_UNPACKED_AT_ONCE = 1 << 22  # weights, which take about 16 bytes each on the way


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeights:
    """A packed matrix [N, K], and what multiplies with it."""

    layout: PackedMatrix
    memory: NDArray[np.uint8]  # [layout.nbytes], on a cache line
    kernel: MatrixKernel
    multiply: Multiply

    @property
    def address(self) -> int:
        """Of the first byte; valid as long as this object lives."""
        return int(self.memory.ctypes.data)

    def unpack(self, like: torch.Tensor) -> torch.Tensor:
        """The matrix [N, K] that the packed bytes stand for, in the dtype and on the device of `like`."""
        layout = self.layout
        weight = torch.empty(layout.rows, layout.cols, dtype=like.dtype)
        step = max(1, _UNPACKED_AT_ONCE // (WIDTH * layout.cols)) * WIDTH
        for row in range(0, layout.rows, step):
            part = row_range(layout, row, min(step, layout.rows - row))
            weight[row : row + part.rows] = torch.from_numpy(unpack_matrix(row_bytes(self.memory, layout, row), part))
        return weight.to(like.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeights":
        """Copies of a model share the bytes."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a model that moe_offload loaded cannot be pickled: load it again in the other process")


def row_range(layout: PackedMatrix, first: int, count: int) -> PackedMatrix:
    """The layout of rows first to first + count, which lie as a matrix of their own; `first` is a multiple of 32."""
    if first % WIDTH or not 0 <= first < first + count <= layout.rows:
        raise ValueError(f"rows {first} to {first + count} are no blocks of {layout}")
    return PackedMatrix(count, layout.cols, layout.dtype, layout.group)


def row_bytes(memory: NDArray[np.uint8], layout: PackedMatrix, first: int) -> NDArray[np.uint8]:
    """The packed bytes from row `first` on, a multiple of 32."""
    return memory[first // WIDTH * layout.block_bytes :]


class PackedLinear(nn.Module):
    """`nn.Linear` on packed weights: y = x @ W.T + bias, in x's dtype and on its device.

    `weight` is a tensor that is unpacked when something computes with it; its dtype, device and shape cost nothing. It
    cannot be assigned. There is no gradient.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeights, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.layout.cols, packed.layout.rows
        self.packed = packed
        self.register_parameter("bias", bias)
        self._like = torch.empty(0, dtype=dtype)  # goes wherever `to` sends the model's parameters

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features] in the model's dtype, without gradient."""
        return _UnpackedOnUse(self.packed, self._like)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `weight` has."""
        return self._like.dtype

    def matrix(self, bias: torch.Tensor | None) -> Matrix:
        """For `MatrixKernel`; bias is f32, dense, on the CPU, and has to outlive the call."""
        return Matrix(self.packed.address, self.out_features, 0 if bias is None else bias.data_ptr())

    def float_bias(self) -> torch.Tensor | None:
        """The bias as `matrix` takes it."""
        return None if self.bias is None else self.bias.detach().to("cpu", torch.float32).contiguous()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]. Raises ValueError for another K, RuntimeError when the engine was closed."""
        if input.shape[-1] != self.in_features:
            raise ValueError(f"an input of shape {list(input.shape)} does not fit {self}")
        trains = input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trains and torch.is_grad_enabled():
            result: torch.Tensor = _NoBackward.apply(input, self.bias, self)  # type: ignore[no-untyped-call]
            return result
        return self._product(input)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // self.in_features
        x = input.detach().reshape(tokens, self.in_features).to("cpu", torch.float32).contiguous()
        out = torch.empty(tokens, self.out_features, dtype=torch.float32)
        bias = self.float_bias()
        if tokens:
            self.packed.multiply(self.packed.kernel, [self.matrix(bias)], x.numpy(), [out.numpy()])
        return out.to(input.device, input.dtype).reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weights of a packed linear cannot be replaced, nor tied anew: load with dense='stored' to do that"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        layout = self.packed.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{layout.dtype} in groups of {layout.group}"
        )


class _UnpackedOnUse(torch.Tensor):
    """Looks like the weights; they are unpacked for every operation that takes them."""

    _packed: PackedWeights
    _like: torch.Tensor

    @staticmethod
    def __new__(cls, packed: PackedWeights, like: torch.Tensor) -> "_UnpackedOnUse":
        size = (packed.layout.rows, packed.layout.cols)
        self: _UnpackedOnUse = torch.Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
        self._packed, self._like = packed, like
        return self

    def __init__(self, packed: PackedWeights, like: torch.Tensor) -> None:
        """All is done in __new__."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a C function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = _pytree.tree_map_only(cls, lambda self: self._packed.unpack(self._like), (args, kwargs or {}))
        return func(*args, **kwargs)


class _NoBackward(torch.autograd.Function):
    """Forward as usual, backward refused instead of silently wrong."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, linear: PackedLinear) -> torch.Tensor:
        return linear._product(input)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "moe_offload runs inference only: packed linears have no gradient; load with transformers to train"
        )
