"""What a server is to the virtual accelerator: a card, a link, a host, as effective rates."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_offload.transfer.accelerator import Work

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Measured seconds of one expert of `nbytes` on the host, by rows: seconds[n], index 0 is 0."""

    nbytes: int
    seconds: NDArray[np.float64] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """A server. Rates are what kernels and copies reach, not what data sheets promise."""

    name: str
    description: str
    sources: tuple[str, ...]
    device: str
    memory_bytes: int
    memory_gbs: float
    flops: float
    link_gbs: float
    host_memory_bytes: int
    host_read_gbs: float
    host_flops: float
    disk_gbs: float
    link_latency: float = 10e-6
    launch_seconds: float = 8e-6
    kernel_seconds: float = 4e-6
    wait_seconds: float = 15e-6
    host_expert_seconds: float = 10e-6
    host_job_seconds: float = 20e-6
    jitter: float = 0.0
    expert_tables: tuple[ExpertTable, ...] = ()

    def copy_seconds(self, nbytes: int) -> float:
        """A copy of page-locked memory, either way."""
        return self.link_latency + nbytes / (self.link_gbs * 1e9)

    def device_seconds(self, work: Work) -> float:
        seconds = _sum_of_max(work, self.memory_gbs * 1e9, self.flops)
        return seconds + work.launches * self.kernel_seconds + work.link_bytes / (self.link_gbs * 1e9)

    def host_seconds(self, work: Work) -> float:
        fixed = self.host_job_seconds + len(work.rows) * self.host_expert_seconds
        return fixed + _sum_of_max(work, self.host_read_gbs * 1e9, self.host_flops)


def _sum_of_max(work: Work, bytes_per_second: float, flops: float) -> float:
    """Each entry of rows reads its weights and multiplies, whichever takes longer."""
    read, row = work.nbytes / bytes_per_second, work.flops_per_row / flops
    if len(work.rows) <= 16:
        return float(sum(max(read, row * rows) for rows in work.rows))
    return float(np.maximum(np.asarray(work.rows) * row, read).sum())


PROFILES: dict[str, ServerProfile] = {
    profile.name: profile
    for profile in (
        ServerProfile(
            name="v100-6230r",
            description="Tesla V100 PCIe 32 GB, Xeon Gold 6230R",
            sources=(),
            device="NVIDIA Tesla V100-PCIE-32GB",
            memory_bytes=31 * GIB,
            memory_gbs=585.0,
            flops=40e12,
            link_gbs=12.0,
            host_memory_bytes=256 * GIB,
            host_read_gbs=100.0,
            host_flops=1.5e12,
            disk_gbs=2.6,
        ),
    )
}


def find_profile(name: str) -> ServerProfile:
    """Raises ValueError for a name that does not exist."""
    profile = PROFILES.get(name)
    if profile is None:
        raise ValueError(f"there is no virtual server {name!r}: choose one of {', '.join(PROFILES)}")
    return profile
