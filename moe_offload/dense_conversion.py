"""Converting the linears outside of the experts: one after the other, each on all cores, into a pack or into memory.

What is packed are the checkpoint's weights, so a pack depends on nothing else and can be made without the model being
loaded. Whether a model has these weights is asked when its linears are replaced.
"""

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from moe_offload.cpu_kernels import packing
from moe_offload.cpu_kernels.packed_layout import WIDTH, PackedMatrix
from moe_offload.dense_choice import Source, dense_linears, find_sources
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.expert_weights import ExpertWeights
from moe_offload.models.packed_linear import row_bytes, row_range
from moe_offload.models.spec import MoeSpec
from moe_offload.options import DenseFormat
from moe_offload.pack_key import content_key
from moe_offload.transfer.pack_layout import PackPlan
from moe_offload.transfer.pack_writer import PackWriter

GROUP = 32  # weights to a scale
_PACKED_AT_ONCE = 1 << 20  # weights that a thread takes at a time: about 10 MB on the way
READ_AT_ONCE = 1 << 24

Report = Callable[[int, int], None]  # (bytes of the checkpoint converted, bytes to convert)


@dataclass(frozen=True, slots=True)
class StoredLinears:
    """The linears of a model that can be packed, by path, and where a checkpoint has their weights."""

    spec: MoeSpec
    checkpoint: Checkpoint
    linears: dict[str, nn.Linear]  # on meta where the model was not loaded
    sources: dict[str, Source]

    @classmethod
    def find(
        cls, model: PreTrainedModel, spec: MoeSpec, checkpoint: Checkpoint, experts: Iterable[ExpertWeights]
    ) -> "StoredLinears":
        """Those of `model`, which may be on meta."""
        found = dense_linears(model, spec)
        sources = find_sources(model, checkpoint, experts, found)
        return cls(spec, checkpoint, {path: found[path] for path in sources}, sources)

    @property
    def nbytes(self) -> int:
        """Bytes of their weights in the model's dtype."""
        return sum(linear.weight.nbytes for linear in self.linears.values())

    def layout(self, path: str, format_: DenseFormat) -> PackedMatrix:
        """How one of them is packed."""
        linear = self.linears[path]
        return PackedMatrix(linear.out_features, linear.in_features, format_, GROUP)

    def plan(self, format_: DenseFormat) -> PackPlan:
        """The pack of these linears. Reads samples of the checkpoint; CheckpointError when it cannot."""
        digest = hashlib.sha256(content_key(self.spec, self.checkpoint).encode())
        for path, source in self.sources.items():
            scales = source.scales.name if source.scales is not None else ""
            # the dtype too: what is stored wider is rounded to it before it is packed
            digest.update(repr((path, source.record.name, scales, self.linears[path].weight.dtype)).encode())
        return PackPlan.plan(digest.hexdigest(), ((path, self.layout(path, format_), 1) for path in self.linears))

    def rows(self, path: str, first: int, last: int) -> torch.Tensor:
        """Rows of one of them as a plain load gives them; a view of the file where that is what is stored."""
        return self.sources[path].rows(self.checkpoint, first, last, self.linears[path].weight.dtype)

    def is_loaded(self, path: str, *, thorough: bool) -> bool:
        """Whether the model has the checkpoint's weights; going by one row in the middle, if not `thorough`."""
        weight = self.linears[path].weight.detach()
        rows, cols = weight.shape
        ranges = pieces(rows, cols, READ_AT_ONCE) if thorough else [(rows // 2, rows // 2 + 1)]
        return all(torch.equal(weight[first:last], self.rows(path, first, last)) for first, last in ranges)


def convert_linears(stored: StoredLinears, writer: PackWriter, threads: int, report: Report) -> None:
    """Write every section that `writer` lacks. A linear that the format cannot hold becomes zeros; see `is_held`.

    Raises OSError when writing fails.
    """
    missing = [section for section in writer.plan.sections if section.name not in writer.finished]
    total = sum(stored.linears[section.name].weight.nbytes for section in missing)
    memory, done = huge_pages(max((section.nbytes for section in missing), default=0)), 0
    with _threads(threads) as pool:
        for section in missing:
            assert isinstance(section.content, PackedMatrix)
            out = memory[: section.nbytes]
            _pack(stored, section.name, section.content, out, pool)
            writer.finish_section(section, [writer.write(section, 0, out)])
            done += stored.linears[section.name].weight.nbytes
            report(done, total)


def convert_in_memory(
    stored: StoredLinears, format_: DenseFormat, threads: int, report: Report
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(path, packed bytes) of one linear after the other; bytes as `convert_linears` writes them."""
    layouts = {path: stored.layout(path, format_) for path in stored.linears}
    # asked now: a linear may be without its weight once its bytes have been handed out
    sizes = {path: linear.weight.nbytes for path, linear in stored.linears.items()}
    memory, at, done = huge_pages(sum(layout.nbytes for layout in layouts.values())), 0, 0
    with _threads(threads) as pool:
        for path, layout in layouts.items():
            out = memory[at : at + layout.nbytes]
            _pack(stored, path, layout, out, pool)
            at, done = at + layout.nbytes, done + sizes[path]
            report(done, sum(sizes.values()))
            yield path, out


def is_held(packed: NDArray[np.uint8]) -> bool:
    """Whether these bytes are a matrix: none packs to zeros alone, whose codes stand for -8 and -128."""
    return bool(packed.any())  # stops at the first


def pieces(rows: int, cols: int, weights: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole blocks, of about so many weights."""
    step = max(1, weights // (WIDTH * cols)) * WIDTH
    return ((first, min(rows, first + step)) for first in range(0, rows, step))


def huge_pages(size: int) -> NDArray[np.uint8]:
    """Zeroed memory on a page, in huge pages where the kernel has them; it is taken as it is written to."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: slower by some percent
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _threads(count: int) -> ThreadPoolExecutor:
    for part in packing.COMPILED:
        part.load()  # once, before several threads would each
    return ThreadPoolExecutor(count, thread_name_prefix="pack-linears")


def _pack(stored: StoredLinears, path: str, layout: PackedMatrix, out: NDArray[np.uint8], pool: Executor) -> None:
    """One linear into out [layout.nbytes]; zeros where the format cannot hold its weights."""
    for first, last in pieces(layout.rows, layout.cols, READ_AT_ONCE):
        rows = stored.rows(path, first, last)  # here: torch would start a team of threads for every one of ours

        def work(start: int, end: int, first: int = first, rows: torch.Tensor = rows) -> None:
            part = row_range(layout, first + start, end - start)
            packing.pack_matrix(_floats(rows[start:end]), part, row_bytes(out, layout, first + start))

        jobs = [pool.submit(work, *piece) for piece in pieces(last - first, layout.cols, _PACKED_AT_ONCE)]
        wait(jobs)  # all of them: `out` may be written to again after an error
        for job in jobs:
            try:
                job.result()
            except ValueError:  # NaN, infinity, or too large for a scale
                out[:] = 0
                return


def _floats(rows: torch.Tensor) -> NDArray[np.float32]:
    """In numpy, for the same reason."""
    if rows.dtype == torch.bfloat16:  # the upper half of an f32
        bits = rows.contiguous().view(torch.int16).numpy().astype(np.int32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return rows.numpy().astype(np.float32)
