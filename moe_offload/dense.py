"""The linears outside of the experts, packed: attention projections, shared experts, dense MLPs, the output head.

They are converted right after loading, one after the other on all cores, and each stored parameter is released when
its packed bytes are there: at no time does more than one matrix exist twice. Replaced is what `restore` can bring back
bit for bit, and that is checked: the parameter has to equal the checkpoint's tensor, or another parameter it is tied
to. Everything else stays as it was loaded.
"""

import logging
import mmap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from moe_offload.cpu_kernels import matrices, packing
from moe_offload.cpu_kernels.matrices import MatrixKernel
from moe_offload.cpu_kernels.packed_layout import WIDTH, PackedMatrix
from moe_offload.dense_choice import Source, dense_linears, find_sources
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.packed_linear import Multiply, PackedLinear, PackedWeights, row_bytes, row_range
from moe_offload.models.skeleton import Skeleton
from moe_offload.options import Activations, DenseFormat, Progress

logger = logging.getLogger(__name__)

GROUP = 32  # weights to a scale
_PACKED_AT_ONCE = 1 << 20  # weights that a thread takes at a time: about 10 MB on the way
_COMPARED_AT_ONCE = 1 << 24
_QUIET = 2.0  # seconds before progress is told


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
            if each.source.record is None:
                weight: Any = model.get_parameter(each.source.tied_to)
                each.linear.weight = weight
            else:
                value = torch.empty(packed.out_features, packed.in_features, dtype=packed.dtype)
                for first, last in _pieces(packed.out_features, packed.in_features, _COMPARED_AT_ONCE):
                    value[first:last] = each.source.rows(skeleton.checkpoint, first, last, packed.dtype)
                each.linear.weight = nn.Parameter(value, requires_grad=each.requires_grad)
            each.linear.register_parameter("bias", packed.bias)
            each.linear.train(packed.training)
            model.set_submodule(each.path, each.linear)


def pack_dense(
    model: PreTrainedModel,
    skeleton: Skeleton,
    format_: DenseFormat,
    activations: Activations,
    threads: int,
    multiply: Multiply,
    progress: Progress | None = None,
) -> DenseLinears:
    """Replace the linears of a loaded model by packed ones that `multiply` runs."""
    candidates = dense_linears(model, skeleton.spec)
    sources = find_sources(model, skeleton, candidates)
    linears = {path: linear for path, linear in candidates.items() if path in sources}
    layouts = {
        path: PackedMatrix(linear.out_features, linear.in_features, format_, GROUP) for path, linear in linears.items()
    }
    for part in (*packing.COMPILED, *matrices.COMPILED):
        part.load()  # once, before several threads would each
    memory = huge_pages(sum(layout.nbytes for layout in layouts.values()))
    kernels: dict[int, MatrixKernel] = {}
    left: dict[str, list[str]] = {}
    replaced, at, stored_bytes = [], 0, 0
    report = _reporter(progress, sum(linear.weight.nbytes for linear in linears.values()))
    with ThreadPoolExecutor(threads, thread_name_prefix="pack-linears") as pool:
        for path, linear in linears.items():
            layout, source, weight = layouts[path], sources[path], linear.weight
            place = memory[at : at + layout.nbytes]
            reason = _obstacle(weight.detach(), source, skeleton.checkpoint, layout, place, pool)
            report(weight.nbytes)
            if reason:
                left.setdefault(reason, []).append(path)
                continue
            at += layout.nbytes
            stored_bytes += weight.nbytes if source.record is not None else 0
            kernel = kernels.setdefault(layout.cols, MatrixKernel(layout.cols, format_, GROUP, activations))
            packed = PackedLinear(PackedWeights(layout, place, kernel, multiply), linear.bias, weight.dtype)
            model.set_submodule(path, packed.train(linear.training))
            replaced.append(_Replaced(path, linear, weight.requires_grad, source))
            linear.register_parameter("weight", None)
    for reason, paths in left.items():
        logger.warning("%d linears stay as they are stored, such as %s: %s", len(paths), paths[0], reason)
    for kernel in kernels.values():
        kernel.load()
    return DenseLinears(format_, tuple(replaced), at, stored_bytes)


def _obstacle(
    weight: torch.Tensor, source: Source, checkpoint: Checkpoint, layout: PackedMatrix, out: NDArray[np.uint8],
    pool: Executor,
) -> str:  # fmt: skip
    """Pack weight [N, K] into `out`, or say why it cannot be replaced."""
    if source.record is not None:
        for first, last in _pieces(layout.rows, layout.cols, _COMPARED_AT_ONCE):
            if not torch.equal(weight[first:last], source.rows(checkpoint, first, last, weight.dtype)):
                return "it is not what the checkpoint holds"
    try:
        _pack(weight, layout, out, pool)
    except ValueError as error:
        return str(error)
    return ""


def _pack(weight: torch.Tensor, layout: PackedMatrix, out: NDArray[np.uint8], pool: Executor) -> None:
    """Weight [N, K] into out [layout.nbytes]. Raises ValueError for weights that the format cannot hold."""

    def work(first: int, last: int) -> None:
        part = row_range(layout, first, last - first)
        packing.pack_matrix(_floats(weight[first:last]), part, row_bytes(out, layout, first))

    jobs = [pool.submit(work, *piece) for piece in _pieces(layout.rows, layout.cols, _PACKED_AT_ONCE)]
    wait(jobs)  # all of them: `out` may be used again after an error
    for job in jobs:
        job.result()


def _pieces(rows: int, cols: int, weights: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole blocks, of about so many weights."""
    step = max(1, weights // (WIDTH * cols)) * WIDTH
    return ((first, min(rows, first + step)) for first in range(0, rows, step))


def _floats(rows: torch.Tensor) -> NDArray[np.float32]:
    """In numpy: torch would start a team of threads for every one of ours."""
    if rows.dtype == torch.bfloat16:  # the upper half of an f32
        bits = rows.contiguous().view(torch.int16).numpy().astype(np.int32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return rows.numpy().astype(np.float32)


def huge_pages(size: int) -> NDArray[np.uint8]:
    """Zeroed memory on a page, in huge pages where the kernel has them; it is taken as it is written to."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: slower by some percent
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Tells `progress` of bytes done, once the work has lasted a while."""
    started, done = time.perf_counter(), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None and time.perf_counter() - started > _QUIET:
            progress("converting linears", done, total)

    return report
