"""What a server is to the virtual accelerator: a card, a link and a host, as rates that programs reach.

The servers are typical ones: cards as in their data sheets, hosts of the same years. Nobody measured these very
machines, except for the experts of `measured_experts.py`, so times are estimates and always to be labelled as
simulated. From data sheet to rate:

- device memory: 65 % (llama.cpp at batch 1: 60 to 70 % on dense models, less on small experts, which pay
  `kernel_seconds`)
- device multiplications: 40 % of tensor cores, 50 % of FP32 cores for products as thin as experts'; the T4 30 %, as 70
  W do not hold its clock
- link: 12 GB/s of PCIe 3.0 x16, 25 GB/s of PCIe 4.0 x16, page-locked (measured on such machines: 10.9 to 13.0, and 25.1
  to 25.3)
- host memory: 75 % of the channels' sum, one socket (STREAM: 75 to 85 %)
- host multiplications: what our quantised kernels reached on a core of a Zen 4 (`benchmarks/results/cpu_experts.json`,
  both tiers; 3.5 GHz assumed), by clock and cores, 80 % for the many threads; half per clock on Broadwell, which
  multiplies bytes on one port only
- memory of the card: less 512 MiB for CUDA's context, and 1/16 where ECC takes it (GDDR)
"""

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_offload.transfer.accelerator import Work
from moe_offload.transfer.measured_experts import XEON_6230R, ExpertTable
from moe_offload.transfer.server_sources import SOURCES, Source

_GIB = 1 << 30
_CONTEXT_BYTES = 512 << 20
_FEW = 16  # up to so many, numbers are added faster in plain Python

_VNNI, _AVX2, _AVX2_ONE_PORT = 90e9, 29e9, 14.5e9  # operations per second, core and GHz


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """A server by its effective rates: GB/s, floating-point operations per second, seconds, bytes.

    flops: of the card, in the precision that it computes experts in (`precision`). launch_seconds: of the host, for
    every launch and copy. kernel_seconds: of the card, for every kernel. wait_seconds: of the host, for waiting for an
    event, even one that is over. host_flops: of quantised kernels. host_job_seconds: to start a job of any size on the
    host's threads. host_expert_seconds: for every expert in it. expert_tables: measured, and used instead of rates
    where they fit the work. jitter: how far modelled times scatter, relative. sources: of every number. simulated:
    put together from data sheets; False: measured on one machine. threads: of the host, where that is known.
    """

    name: str
    description: str
    sources: tuple[Source, ...]
    device: str
    precision: str
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
    wait_seconds: float = 20e-6
    host_expert_seconds: float = 5e-6
    host_job_seconds: float = 20e-6
    jitter: float = 0.0
    expert_tables: tuple[ExpertTable, ...] = ()
    simulated: bool = True
    threads: int = 0

    @property
    def has_card(self) -> bool:
        """Whether there is a card at all: a saved machine may have none."""
        return self.memory_bytes > 0

    def copy_seconds(self, nbytes: int) -> float:
        """A copy of page-locked memory, either way."""
        return self.link_latency + nbytes / (self.link_gbs * 1e9)

    def device_seconds(self, work: Work) -> float:
        """Kernels that do `work`, one after another."""
        seconds = work.launches * self.kernel_seconds + work.link_bytes / (self.link_gbs * 1e9)
        return seconds + _sum_of_larger(work, self.memory_gbs * 1e9, self.flops)

    def host_seconds(self, work: Work) -> float:
        """One job that does `work`."""
        for table in self.expert_tables:
            if table.describes(work.nbytes, work.flops_per_row):
                return self.host_job_seconds + table.sum(np.asarray(work.rows))
        experts = len(work.rows) * self.host_expert_seconds
        return self.host_job_seconds + experts + _sum_of_larger(work, self.host_read_gbs * 1e9, self.host_flops)

    def disk_seconds(self, nbytes: int) -> float:
        """A read of what is not in memory."""
        return nbytes / (self.disk_gbs * 1e9)


def _sum_of_larger(work: Work, bytes_per_second: float, flops: float) -> float:
    """Every entry of rows reads its weights while it multiplies: whichever takes longer."""
    read, row = work.nbytes / bytes_per_second, work.flops_per_row / flops
    rows = work.rows
    if len(rows) > _FEW:
        return float(np.maximum(np.asarray(rows) * row, read).sum())
    total = 0.0
    for count in rows:
        multiply = count * row
        total += multiply if multiply > read else read
    return float(total)


def _usable(gib: int, *, ecc: bool = False) -> int:
    return (gib * _GIB * 15 // 16 if ecc else gib * _GIB) - _CONTEXT_BYTES


def _channels(count: int, megatransfers: int) -> float:
    """GB/s of so many DDR4 channels."""
    return 0.75 * count * megatransfers * 8 / 1e3


def _cores(count: int, gigahertz: float, per_clock: float) -> float:
    return 0.8 * count * gigahertz * per_clock


_ALL = (
    ServerProfile(
        name="v100-6230r",
        description="Tesla V100 PCIe 32 GB, Xeon Gold 6230R (26 cores, 6 x DDR4-2933), PCIe 3.0 x16, NVMe",
        sources=SOURCES["v100-6230r"],
        device="NVIDIA Tesla V100-PCIE-32GB",
        precision="f16 tensor cores",
        memory_bytes=_usable(32),
        memory_gbs=0.65 * 900,
        flops=0.4 * 112e12,
        link_gbs=12.0,
        host_memory_bytes=256 * _GIB,
        host_read_gbs=_channels(6, 2933),
        host_flops=_cores(26, 2.2, _VNNI),
        disk_gbs=2.6,
        expert_tables=XEON_6230R,
    ),
    ServerProfile(
        name="p40",
        description="Tesla P40 24 GB, Xeon E5-2690 v4 (14 cores, 4 x DDR4-2400), PCIe 3.0 x16, SATA SSD",
        sources=SOURCES["p40"],
        device="NVIDIA Tesla P40",
        precision="f32",
        memory_bytes=_usable(24, ecc=True),
        memory_gbs=0.65 * 346,
        flops=0.5 * 11.8e12,
        link_gbs=12.0,
        host_memory_bytes=128 * _GIB,
        host_read_gbs=_channels(4, 2400),
        host_flops=_cores(14, 2.9, _AVX2_ONE_PORT),
        disk_gbs=0.5,
        launch_seconds=10e-6,
    ),
    ServerProfile(
        name="p100",
        description="Tesla P100 PCIe 16 GB, Xeon E5-2698 v4 (20 cores, 4 x DDR4-2400), PCIe 3.0 x16, SATA SSD",
        sources=SOURCES["p100"],
        device="NVIDIA Tesla P100-PCIE-16GB",
        precision="f16, twice the rate of f32",
        memory_bytes=_usable(16),
        memory_gbs=0.65 * 732,
        flops=0.5 * 18.7e12,
        link_gbs=12.0,
        host_memory_bytes=256 * _GIB,
        host_read_gbs=_channels(4, 2400),
        host_flops=_cores(20, 2.5, _AVX2_ONE_PORT),
        disk_gbs=0.5,
        launch_seconds=10e-6,
    ),
    ServerProfile(
        name="gtx1080ti",
        description="GeForce GTX 1080 Ti 11 GB, Xeon E5-2680 v4 (14 cores, 4 x DDR4-2400), PCIe 3.0 x16, NVMe",
        sources=SOURCES["gtx1080ti"],
        device="NVIDIA GeForce GTX 1080 Ti",
        precision="f32",
        memory_bytes=_usable(11),
        memory_gbs=0.65 * 484,
        flops=0.5 * 11.3e12,
        link_gbs=12.0,
        host_memory_bytes=64 * _GIB,
        host_read_gbs=_channels(4, 2400),
        host_flops=_cores(14, 2.7, _AVX2_ONE_PORT),
        disk_gbs=2.6,
        launch_seconds=10e-6,
    ),
    ServerProfile(
        name="rtx2080ti",
        description="GeForce RTX 2080 Ti 11 GB, Core i9-9900K (8 cores, 2 x DDR4-2666), PCIe 3.0 x16, NVMe",
        sources=SOURCES["rtx2080ti"],
        device="NVIDIA GeForce RTX 2080 Ti",
        precision="f16 tensor cores that add in f32 (half rate on GeForce)",
        memory_bytes=_usable(11),
        memory_gbs=0.65 * 616,
        flops=0.4 * 53.8e12,
        link_gbs=12.0,
        host_memory_bytes=64 * _GIB,
        host_read_gbs=_channels(2, 2666),
        host_flops=_cores(8, 4.5, _AVX2),
        disk_gbs=2.6,
        launch_seconds=5e-6,
        wait_seconds=12e-6,
    ),
    ServerProfile(
        name="t4",
        description="Tesla T4 16 GB, Xeon Silver 4216 (16 cores, 6 x DDR4-2400), PCIe 3.0 x16, NVMe",
        sources=SOURCES["t4"],
        device="NVIDIA Tesla T4",
        precision="f16 tensor cores",
        memory_bytes=_usable(16, ecc=True),
        memory_gbs=0.65 * 320,
        flops=0.3 * 65e12,
        link_gbs=12.0,
        host_memory_bytes=192 * _GIB,
        host_read_gbs=_channels(6, 2400),
        host_flops=_cores(16, 1.9, _VNNI),
        disk_gbs=2.6,
    ),
    ServerProfile(
        name="rtx3090",
        description="GeForce RTX 3090 24 GB, Ryzen 9 5950X (16 cores, 2 x DDR4-3200), PCIe 4.0 x16, NVMe",
        sources=SOURCES["rtx3090"],
        device="NVIDIA GeForce RTX 3090",
        precision="bf16 tensor cores that add in f32",
        memory_bytes=_usable(24),
        memory_gbs=0.65 * 936,
        flops=0.4 * 71e12,
        link_gbs=25.0,
        host_memory_bytes=128 * _GIB,
        host_read_gbs=_channels(2, 3200),
        host_flops=_cores(16, 4.0, _AVX2),
        disk_gbs=5.0,
        launch_seconds=5e-6,
        kernel_seconds=3e-6,
        wait_seconds=12e-6,
    ),
    ServerProfile(
        name="a100",
        description="A100 PCIe 40 GB, EPYC 7543 (32 cores, 8 x DDR4-3200), PCIe 4.0 x16, NVMe",
        sources=SOURCES["a100"],
        device="NVIDIA A100-PCIE-40GB",
        precision="bf16 tensor cores",
        memory_bytes=_usable(40),
        memory_gbs=0.65 * 1555,
        flops=0.4 * 312e12,
        link_gbs=25.0,
        host_memory_bytes=512 * _GIB,
        host_read_gbs=_channels(8, 3200),
        host_flops=_cores(32, 3.2, _AVX2),
        disk_gbs=5.0,
        launch_seconds=6e-6,
        kernel_seconds=3e-6,
        wait_seconds=15e-6,
    ),
)
PROFILES: dict[str, ServerProfile] = {profile.name: profile for profile in _ALL}


def find_profile(name: str) -> ServerProfile:
    """A server of this module, or one that the user saved. Raises ValueError for one that does not exist, for a file
    that is damaged or of another version, and for a saved machine without a card.
    """
    profile = find_server(name)
    if not profile.has_card:
        raise ValueError(
            f"the profile {name!r} has no card, so it cannot be a device: take --profile with plan, or cpu"
        )
    return profile


def find_server(name: str) -> ServerProfile:
    """As `find_profile`, machines without a card too."""
    from moe_offload.transfer.profile_file import read_profile, saved_names

    profile = PROFILES.get(name)
    if profile is not None:
        return profile
    saved = saved_names()
    if name in saved:
        found: Any = read_profile(name)  # a type that mypy knows by another name here
        server: ServerProfile = found
        return server
    known = [*PROFILES, *saved]
    close = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ValueError(f"there is no virtual server {name!r}: choose one of {', '.join(known)}{hint}")
