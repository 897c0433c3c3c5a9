"""What a benchmark's run moved, and what could have been moved: bytes of weights by where they were read.

Weights alone are counted: KV cache and activations are small beside them at the lengths that are usual. A forward reads
every weight outside of the experts once; experts are counted by the engine as they run. What came from disk is what the
system counts for this process, pages of mapped files among it.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.models.errors import MoeOffloadError
from moe_offload.models.packed_linear import PackedLinear
from moe_offload.transfer.virtual import VirtualAccelerator

_READ_BYTES = 1 << 28  # of device memory, to measure with: several times the largest L2 cache
_READS = 5


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of weights read by the CPU and by the device, copied over the link, and come from disk; experts wanted, and
    found on the device.
    """

    cpu: int = 0
    link: int = 0
    device: int = 0
    disk: int = 0
    wanted: int = 0
    found: float = 0.0

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.cpu - other.cpu, self.link - other.link, self.device - other.device, self.disk - other.disk,
            self.wanted - other.wanted, self.found - other.found,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """GB/s (1e9) that could be had: measured here, or of the simulated server. None: not known."""

    cpu: float | None = None
    link: float | None = None
    device: float | None = None
    disk: float | None = None


@dataclass(frozen=True, slots=True)
class Resource:
    """GB/s of one resource in the time of a test, beside its limit."""

    name: str
    gb_per_s: float
    limit: float | None

    @property
    def share(self) -> float | None:
        """Of the limit; None where that is not known."""
        return self.gb_per_s / self.limit if self.limit else None


class Meter:
    """Clock and counters of a loaded model. On a virtual device the clock is the simulated server's."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._engine: Any = model.offload
        side = self._engine.device
        self._accelerator = None if side is None else side.accelerator
        self.other_bytes, self._read_bytes = _other_weights(model)
        self._device_limit: float | None = None
        if self._accelerator is not None and not self._accelerator.simulated:
            self._device_limit = device_read_limit(self._accelerator.torch_device)

    @property
    def simulated(self) -> bool:
        return self._accelerator is not None and self._accelerator.simulated

    def now(self) -> float:
        """Seconds, once all that was put on the device is through. Raises MoeOffloadError where it was lost."""
        if self._accelerator is None:
            return time.perf_counter()
        if self._engine.device is None:
            raise MoeOffloadError("the device was lost: what was measured from then on is the CPU's")
        self._accelerator.compute.synchronize()
        return float(self._accelerator.now())

    def traffic(self, forwards: int) -> Traffic:
        """What was counted so far, if `forwards` passes have been made."""
        read, others = self._engine.statistics.snapshot().bytes_read, forwards * self._read_bytes
        side = self._engine.device
        if side is None:
            return Traffic(cpu=read + others, disk=disk_bytes())
        stats, sizes = side.stats(), side.dispatcher.parts.record_bytes
        cpu, wanted, found = 0, 0, 0.0
        for layer, size in zip(stats.layers, sizes, strict=True):
            asked = layer.on_cpu + layer.on_device + layer.fetched
            cpu += layer.on_cpu * size
            wanted += asked + layer.whole
            found += asked * layer.hit_rate + layer.whole
        copied = stats.copied_on_demand + stats.prefetched
        disk = 0 if self.simulated else disk_bytes()
        return Traffic(cpu, copied, max(read - cpu, 0) + others, disk, wanted, found)

    def limits(self, read_limit: float | None) -> Limits:
        """`read_limit`: what the CPU was measured to read."""
        accelerator = self._accelerator
        if accelerator is None:
            return Limits(cpu=read_limit)
        if isinstance(accelerator, VirtualAccelerator):
            profile = accelerator.profile
            return Limits(profile.host_read_gbs, profile.link_gbs, profile.memory_gbs)
        side = self._engine.device
        link = None if side is None else side.costs.bytes_per_second / 1e9
        return Limits(read_limit, link, self._device_limit)


def disk_bytes(io: Path = Path("/proc/self/io")) -> int:
    """Bytes that this process has had read from disk; 0 where the system does not tell."""
    try:
        lines = io.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def device_read_limit(device: torch.device) -> float | None:
    """GB/s at which torch reads a device's memory; None where there is no room to measure."""
    try:
        memory = torch.zeros(_READ_BYTES // 4, device=device)
    except torch.OutOfMemoryError:
        return None
    best = 0.0
    memory.sum()
    for _ in range(_READS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        memory.sum()
        torch.cuda.synchronize(device)
        best = max(best, _READ_BYTES / (time.perf_counter() - started) / 1e9)
    del memory
    torch.cuda.empty_cache()  # the model wants it
    return best


def _other_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the weights outside of the experts, and those of them that every forward reads."""
    kept = sum(each.nbytes for each in model.parameters() if not each.is_meta)
    packed = sum(each.packed.layout.nbytes for each in model.modules() if isinstance(each, PackedLinear))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = 0
    if isinstance(embedding, nn.Embedding) and not (
        isinstance(head, nn.Linear) and head.weight is embedding.weight
    ):  # a tied head reads all of it
        looked_up = embedding.weight.nbytes
    return kept + packed, kept + packed - looked_up
