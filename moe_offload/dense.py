"""The linears outside of the experts, packed: attention projections, shared experts, dense MLPs, the output head.

They are replaced right after loading, one after the other, by packed ones on the bytes of a pack (`dense_pack.py`).
Replaced is what `restore` can bring back bit for bit, and that is checked: the parameter has to equal the checkpoint's
tensor. All of it is compared when the pack is made, a row of every linear whenever it is used. Everything else stays as
it was loaded.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.cpu_kernels import matrices
from moe_offload.cpu_kernels.matrices import MatrixKernel
from moe_offload.dense_choice import Source
from moe_offload.dense_conversion import READ_AT_ONCE, StoredLinears, is_held, pieces
from moe_offload.dense_pack import open_linears
from moe_offload.models.packed_linear import Multiply, PackedLinear, PackedWeights
from moe_offload.models.skeleton import Skeleton
from moe_offload.options import DenseFormat, Options, Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Replaced:
    path: str
    linear: nn.Linear  # without its weight
    requires_grad: bool
    source: Source


@dataclass(frozen=True, slots=True)
class DenseLinears:
    """The linears that were replaced."""

    format: DenseFormat
    replaced: tuple[_Replaced, ...]
    nbytes: int  # of the packed matrices
    stored_bytes: int  # of the parameters that they replace

    def restore(self, model: PreTrainedModel, skeleton: Skeleton) -> None:
        """Put the linears back as they were loaded."""
        for each in self.replaced:
            packed = model.get_submodule(each.path)
            assert isinstance(packed, PackedLinear)
            if each.source.tied_to:
                weight: Any = model.get_parameter(each.source.tied_to)
                each.linear.weight = weight
            else:
                value = torch.empty(packed.out_features, packed.in_features, dtype=packed.dtype)
                for first, last in pieces(packed.out_features, packed.in_features, READ_AT_ONCE):
                    value[first:last] = each.source.rows(skeleton.checkpoint, first, last, packed.dtype)
                each.linear.weight = nn.Parameter(value, requires_grad=each.requires_grad)
            each.linear.register_parameter("bias", packed.bias)
            each.linear.train(packed.training)
            model.set_submodule(each.path, each.linear)


def pack_dense(
    model: PreTrainedModel,
    skeleton: Skeleton,
    format_: DenseFormat,
    options: Options,
    multiply: Multiply,
    progress: Progress | None = None,
) -> DenseLinears:
    """Replace the linears of a loaded model by packed ones that `multiply` runs."""
    stored = StoredLinears.find(model, skeleton.spec, skeleton.checkpoint, skeleton.weights.values())
    if not stored.linears:
        return DenseLinears(format_, (), 0, 0)
    for part in matrices.COMPILED:
        part.load()
    kernels: dict[int, MatrixKernel] = {}
    left: dict[str, list[str]] = {}
    replaced, nbytes, stored_bytes = [], 0, 0
    packed_bytes, were_there = open_linears(stored, format_, options, progress)
    for path, memory in packed_bytes:
        layout, source, linear = stored.layout(path, format_), stored.sources[path], stored.linears[path]
        weight = linear.weight
        if not stored.is_loaded(path, thorough=not were_there):
            left.setdefault("they are not what the checkpoint holds", []).append(path)
            continue
        if not is_held(memory):
            left.setdefault(f"their weights cannot be {format_}", []).append(path)
            continue
        nbytes += layout.nbytes
        stored_bytes += 0 if source.tied_to else weight.nbytes
        kernel = kernels.setdefault(layout.cols, MatrixKernel(layout.cols, format_, layout.group, options.activations))
        packed = PackedLinear(PackedWeights(layout, memory, kernel, multiply), linear.bias, weight.dtype)
        model.set_submodule(path, packed.train(linear.training))
        replaced.append(_Replaced(path, linear, weight.requires_grad, source))
        linear.register_parameter("weight", None)
    for reason, paths in left.items():
        logger.warning("%d linears stay as they are stored, such as %s: %s", len(paths), paths[0], reason)
    for kernel in kernels.values():
        kernel.load()
    return DenseLinears(format_, tuple(replaced), nbytes, stored_bytes)
