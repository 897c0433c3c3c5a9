"""Converting a checkpoint's experts into a pack: layer by layer, each expert read, quantised and written by one thread.

In memory at any time are as many experts as threads work on; with experts so large that this would not be little, fewer
threads take an expert each and share its blocks.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels import packing
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.dequantize import read_f32, read_mxfp4
from moe_offload.models.errors import MoeOffloadError, UnsupportedModelError
from moe_offload.models.expert_weights import ExpertWeights, MatrixSet
from moe_offload.models.spec import MoeSpec
from moe_offload.pack_key import content_key
from moe_offload.transfer.pack_layout import PackPlan, Section
from moe_offload.transfer.pack_writer import PackWriter

PackFormat = Literal["int8", "int4", "mxfp4"]

GROUP = 32  # weights to a scale
# Bytes that a conversion may have in flight, unless a single expert needs more.
_IN_FLIGHT = 1 << 30
# Beside its weights as f32 a matrix is held as codes of a byte, and the record is being filled.
_BYTES_PER_WEIGHT = 6


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """A model's experts as a checkpoint holds them."""

    spec: MoeSpec
    checkpoint: Checkpoint
    weights: dict[str, ExpertWeights]  # by the layer's path

    @property
    def formats(self) -> tuple[str, ...]:
        """How they are stored; several where layers differ."""
        return tuple(sorted({each.format for each in self.weights.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of their matrices as stored."""
        return sum(each.num_experts * each.bytes_per_expert for each in self.weights.values())

    def records(self, format_: PackFormat) -> Iterator[tuple[str, ExpertRecord, int]]:
        """(path, record, number of experts) of every layer in a packed format."""
        for layer in self.spec.layers:
            weights = self.weights[layer.path]
            record = ExpertRecord(
                weights.hidden_size, weights.intermediate_size, format_, weights.gate is not None,
                any(each is not None for each in _biases(weights)), GROUP,
            )  # fmt: skip
            yield layer.path, record, weights.num_experts

    def packed_bytes(self, format_: PackFormat) -> int:
        """Bytes of all experts in a packed format."""
        return sum(record.nbytes * count for _, record, count in self.records(format_))

    def plan(self, format_: PackFormat) -> PackPlan:
        """The pack of these experts. Reads samples of the checkpoint; CheckpointError when it cannot."""
        return PackPlan.plan(content_key(self.spec, self.checkpoint), self.records(format_))


def convert(
    experts: StoredExperts, writer: PackWriter, threads: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write every section that `writer` lacks: progress(bytes of the checkpoint converted, bytes to convert).

    Raises OSError when writing fails, UnsupportedModelError for weights that the format cannot hold.
    """
    for kernel in packing.COMPILED:
        kernel.load()  # once, before threads would each
    missing = [section for section in writer.plan.sections if section.name not in writer.finished]
    total = sum(section.count * experts.weights[section.name].bytes_per_expert for section in missing)
    done = 0
    for section in missing:
        weights = experts.weights[section.name]
        checksums = [0] * section.count
        for path in {record.path for matrix in weights.matrices for record in matrix.records}:
            experts.checkpoint.mapping(path)  # here, before several threads would each
        with _threads_for(section, threads) as (pool, split):
            jobs = {
                pool.submit(_convert_one, experts, writer, section, expert, split): expert
                for expert in range(section.count)
            }
            for job in as_completed(jobs):
                checksums[jobs[job]] = job.result()
                done += weights.bytes_per_expert
                if progress is not None:
                    progress(done, total)
        writer.finish_section(section, checksums)
        experts.checkpoint.close()  # gives the layer's pages back; the next one maps anew


@contextmanager
def _threads_for(section: Section, threads: int) -> Iterator[tuple[Executor, packing.Split]]:
    """Threads that take an expert each, and a split over all for what one of them does."""
    record = section.content
    assert isinstance(record, ExpertRecord)
    largest = record.hidden_size * record.intermediate_size * _BYTES_PER_WEIGHT + record.nbytes
    workers = max(1, min(threads, _IN_FLIGHT // largest))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    shared = ThreadPoolExecutor(threads, thread_name_prefix="quantise")
    try:
        yield pool, packing.serial if workers == threads else _split_over(shared, threads)
    finally:
        pool.shutdown(cancel_futures=True)
        shared.shutdown(cancel_futures=True)


def _split_over(pool: Executor, parts: int) -> packing.Split:
    def split(work: Callable[[int, int], None], count: int) -> None:
        bounds = [count * part // parts for part in range(parts + 1)]
        for job in [pool.submit(work, *pair) for pair in zip(bounds, bounds[1:], strict=False)]:
            job.result()

    return split


def _convert_one(
    experts: StoredExperts, writer: PackWriter, section: Section, expert: int, split: packing.Split
) -> int:
    """Convert and write one expert; the checksum of its record."""
    weights, record = experts.weights[section.name], section.content
    assert isinstance(record, ExpertRecord)
    try:
        content = convert_expert(weights, record, experts.checkpoint, expert, split)
    except MoeOffloadError:
        raise
    except ValueError as error:
        raise UnsupportedModelError(
            f"{section.name}, expert {expert}: {error}; load the model with weights={weights.format!r}"
        ) from error
    return writer.write(section, expert, content)


def convert_expert(
    weights: ExpertWeights, record: ExpertRecord, checkpoint: Checkpoint, expert: int, split: packing.Split
) -> NDArray[np.uint8]:
    """One expert's record [record.nbytes]. Raises ValueError for weights that the format cannot hold."""
    out = np.zeros(record.nbytes, np.uint8)
    matrices = (weights.gate, weights.up, weights.down)
    layouts = (record.up_matrix, record.up_matrix, record.down_matrix)
    for matrix, layout, offset in zip(matrices, layouts, record.offsets, strict=False):
        if matrix is not None:
            _pack(matrix, layout, weights, checkpoint, expert, out[offset : offset + layout.nbytes], split)
    for bias, offset in zip(_biases(weights), record.offsets[3:], strict=True):
        if bias is not None:
            values = np.ascontiguousarray(read_f32(bias, weights.format, checkpoint, expert))
            out[offset : offset + values.nbytes] = values.view(np.uint8)
    return out


def _biases(weights: ExpertWeights) -> tuple[MatrixSet | None, MatrixSet | None, MatrixSet | None]:
    return weights.gate_bias, weights.up_bias, weights.down_bias


def _pack(
    matrix: MatrixSet, layout: PackedMatrix, weights: ExpertWeights, checkpoint: Checkpoint, expert: int,
    out: NDArray[np.uint8], split: packing.Split,
) -> None:  # fmt: skip
    if layout.dtype == "mxfp4":
        packing.pack_mxfp4(*read_mxfp4(matrix, checkpoint, expert), layout, out, split)
    else:
        packing.pack_matrix(read_f32(matrix, weights.format, checkpoint, expert), layout, out, split)
