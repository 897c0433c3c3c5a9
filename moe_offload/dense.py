"""The linears outside of the experts, packed: attention projections, shared experts, dense MLPs, the output head.

They are converted right after loading, one after the other on all cores, and each stored parameter is released when
its packed bytes are there: at no time does more than one matrix exist twice. Replaced is what `restore` can bring back
bit for bit, and that is checked: the parameter has to equal the checkpoint's tensor, or another parameter it is tied
to. Everything else stays as it was loaded.
"""

import logging
import mmap
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from moe_offload.cpu_kernels import matrices, packing
from moe_offload.cpu_kernels.matrices import MatrixKernel
from moe_offload.cpu_kernels.packed_layout import WIDTH, PackedMatrix
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.compat import KeyResolver
from moe_offload.models.packed_linear import Multiply, PackedLinear, PackedWeights, row_bytes, row_range
from moe_offload.models.safetensors_header import TensorRecord
from moe_offload.models.skeleton import Skeleton
from moe_offload.models.spec import MoeSpec
from moe_offload.options import Activations, DenseFormat, Progress

logger = logging.getLogger(__name__)

GROUP = 32  # weights to a scale
SMALLEST = WIDTH  # linears with fewer inputs or outputs are not worth a block
_PACKED_AT_ONCE = 1 << 20  # weights that a thread takes at a time: about 10 MB on the way
_COMPARED_AT_ONCE = 1 << 24
_QUIET = 2.0  # seconds before progress is told
# Routing decides which experts run: a small error there is a large one. But GatedDeltaNet and its like are no routers.
_ROUTERS = re.compile(r"[Rr]outer|[Tt]op[Kk]|Gate(?!d)")
_READ_AS_TENSORS = ("dt_proj",)  # Mamba multiplies with the weight itself, at every step


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a linear's weight comes from: a tensor of the checkpoint, or the parameter that it is tied to.

    `scales` are those of FP8 in blocks.
    """

    record: TensorRecord | None
    scales: TensorRecord | None = None
    tied_to: str = ""

    def rows(self, checkpoint: Checkpoint, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows first to last as a plain load gives them; a view of the file where that is what is stored."""
        assert self.record is not None
        stored = checkpoint.view(self.record)
        if self.scales is None:
            return stored[first:last].to(dtype)
        scales = checkpoint.view(self.scales).float()
        # The last block of a side may be cut. Blocks are of 128, or of another power of two.
        heights, widths = (
            torch.arange(size) // 2 ** ceil(log2(-(-size // count)))
            for size, count in zip(stored.shape, scales.shape, strict=True)
        )
        return (stored[first:last].float() * scales[heights[first:last]][:, widths]).to(dtype)


@dataclass(frozen=True, slots=True)
class _Replaced:
    path: str
    linear: nn.Linear  # without its weight
    requires_grad: bool
    source: _Source


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
                each.linear.weight = model.get_parameter(each.source.tied_to)
            else:
                value = torch.empty(packed.out_features, packed.in_features, dtype=packed.dtype)
                for first, last in _pieces(*value.shape, _COMPARED_AT_ONCE):
                    value[first:last] = each.source.rows(skeleton.checkpoint, first, last, packed.dtype)
                each.linear.weight = nn.Parameter(value, requires_grad=each.requires_grad)
            each.linear.bias = packed.bias
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
    sources = _find_sources(model, skeleton, candidates)
    linears = {path: linear for path, linear in candidates.items() if path in sources}
    layouts = {
        path: PackedMatrix(linear.out_features, linear.in_features, format_, GROUP) for path, linear in linears.items()
    }
    for part in (*packing.COMPILED, *matrices.COMPILED):
        part.load()  # once, before several threads would each
    memory = huge_pages(sum(layout.nbytes for layout in layouts.values()))
    kernels: dict[int, MatrixKernel] = {}
    replaced, at, stored_bytes = [], 0, 0
    report = _reporter(progress, sum(linear.weight.nbytes for linear in linears.values()))
    with ThreadPoolExecutor(threads, thread_name_prefix="pack-linears") as pool:
        for path, linear in linears.items():
            layout, source, weight = layouts[path], sources[path], linear.weight
            place = memory[at : at + layout.nbytes]
            reason = _obstacle(weight.detach(), source, skeleton.checkpoint, layout, place, pool)
            report(weight.nbytes)
            if reason:
                logger.warning("%s stays as it is stored: %s", path, reason)
                continue
            at += layout.nbytes
            stored_bytes += weight.nbytes if source.record is not None else 0
            kernel = kernels.setdefault(layout.cols, MatrixKernel(layout.cols, format_, GROUP, activations))
            packed = PackedLinear(PackedWeights(layout, place, kernel, multiply), linear.bias, weight.dtype)
            model.set_submodule(path, packed.train(linear.training))
            replaced.append(_Replaced(path, linear, weight.requires_grad, source))
            linear.register_parameter("weight", None)
    for kernel in kernels.values():
        kernel.load()
    return DenseLinears(format_, tuple(replaced), at, stored_bytes)


def dense_linears(model: PreTrainedModel, spec: MoeSpec) -> dict[str, nn.Linear]:
    """Path -> linear, for those in the decoder's layers and the output head that may be quantised."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[nn.Module, int] = {}
    for module in modules.values():
        uses[module] = uses.get(module, 0) + 1
    blocks = {layer.path.rpartition(".")[0] for layer in spec.layers}
    layers = {_outermost_list(layer.path, modules) for layer in spec.layers} - {""}
    head = model.get_output_embeddings()
    found = {}
    for path, module in modules.items():
        if type(module) is not nn.Linear or uses[module] > 1 or min(module.weight.shape) < SMALLEST:
            continue
        inside = any(path.startswith(f"{prefix}.") for prefix in layers)
        routes = path.rpartition(".")[0] in blocks or any(
            _ROUTERS.search(type(modules[above]).__name__) for above in _ancestors(path)[1:]
        )
        if (module is head or (inside and not routes)) and _is_plain(module, model.dtype):
            if path.rpartition(".")[2] not in _READ_AS_TENSORS:
                found[path] = module
    return found


def _is_plain(linear: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether nobody listens to this linear, and it is where and what the CPU's kernels take.

    Weights in another dtype than the model's are those that an architecture keeps precise on purpose.
    """
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks)
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == dtype and not any(hooks) and not hasattr(linear, "_hf_hook")


def _ancestors(path: str) -> list[str]:
    """'a.b.c' -> ['', 'a', 'a.b']."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def _outermost_list(path: str, modules: dict[str, nn.Module]) -> str:
    """The list of layers that a module is in; "" where there is none."""
    return next((above for above in _ancestors(path) if isinstance(modules[above], nn.ModuleList)), "")


def _find_sources(model: PreTrainedModel, skeleton: Skeleton, linears: dict[str, nn.Linear]) -> dict[str, _Source]:
    """Where the weights of the linears come from; without those where that cannot be told."""
    own = {f"{path}.weight" for path in linears}
    tied = {
        id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False) if name not in own
    }
    experts = set().union(*(weights.keys for weights in skeleton.weights.values()))
    resolve = KeyResolver(model)
    records = {}
    for key, record in skeleton.checkpoint.records.items():
        if key not in experts:
            resolved = resolve(key)
            if not resolved.operations:
                records[resolved.target] = record
    sources = {}
    shared: set[int] = set()
    for path, linear in linears.items():
        record = records.get(f"{path}.weight")
        if id(linear.weight) in tied:
            sources[path] = _Source(None, tied_to=tied[id(linear.weight)])
        elif record is not None and record.shape == tuple(linear.weight.shape) and id(linear.weight) not in shared:
            scales = skeleton.checkpoint.records.get(f"{record.name}_scale_inv") if record.dtype == "F8_E4M3" else None
            sources[path] = _Source(record, scales)
            shared.add(id(linear.weight))
    return sources


def _obstacle(
    weight: torch.Tensor, source: _Source, checkpoint: Checkpoint, layout: PackedMatrix, out: NDArray[np.uint8],
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
