"""This machine as a server profile: what its memory, its cores, its card and its link give, measured in seconds.

What is not measured (the disk, starts of jobs and launches) is what other profiles assume, and its source says so.
"""

from collections.abc import Callable

import torch

from moe_offload.bench_cpu import CpuBench, ExpertFormat
from moe_offload.cpu_kernels.bandwidth import measure_read_bandwidth
from moe_offload.cpu_kernels.team import ThreadTeam
from moe_offload.machine import cpu_name
from moe_offload.memory import Memory, detect_memory
from moe_offload.models.errors import OptionError
from moe_offload.transfer.accelerator import Accelerator
from moe_offload.transfer.card_facts import measure_copy
from moe_offload.transfer.find_device import DeviceChoice, cuda_problem, detect_cuda, open_accelerator
from moe_offload.transfer.server_profile import ServerProfile
from moe_offload.transfer.server_sources import Source

SECONDS = 1.0
DISK_GBS = 2.6
_MIB = 256
_SHAPE = (2048, 768)
_PROBE = 256 << 20  # bytes of device memory that are read
_ROWS, _SIDE = 64, 8192  # of a product that is timed
# progress(what, share done)
Report = Callable[[str, float], None]


def measure_machine(name: str, threads: int, report: Report) -> ServerProfile:
    """This machine, with its first usable card if it has one."""
    memory = detect_memory()
    card = card_of_this_machine(memory, report)
    with ThreadTeam(threads) as team:
        report("measuring memory", 0.3)
        read = measure_read_bandwidth(team, _MIB, SECONDS / 2)
        bench = CpuBench([ExpertFormat("int8")], _SHAPE, team, _MIB, report)
        bench.run(SECONDS)
        (figures,) = bench.figures()
    if figures.gop_per_s is None:
        raise OptionError("this machine could not be measured: try again when it is less busy")
    cpu = cpu_name() or "unknown CPU"
    what = f"measured: {threads} threads of {cpu}"
    sources = (
        Source(("host_read_gbs",), f"{what}, the read limit"),
        Source(("host_flops",), f"{what}, int8 experts with 64 tokens each"),
        Source(("host_memory_bytes",), "as the system says"),
        Source(("disk_gbs",), "not measured: an NVMe on PCIe 3.0 is assumed"),
    )
    base = card if card is not None else _without_card()
    return ServerProfile(
        name=name, description=f"{base.device or 'no card'}, {cpu} ({threads} threads), measured",
        sources=(*base.sources, *sources), device=base.device, precision=base.precision,
        memory_bytes=base.memory_bytes, memory_gbs=base.memory_gbs, flops=base.flops, link_gbs=base.link_gbs,
        host_memory_bytes=memory.total, host_read_gbs=read, host_flops=figures.gop_per_s * 1e9, disk_gbs=DISK_GBS,
        simulated=False, threads=threads,
    )  # fmt: skip


def card_of_this_machine(memory: Memory, report: Report = lambda what, share: None) -> ServerProfile | None:
    """The first usable card and its link, measured, in a profile whose host is not; None without one."""
    facts = detect_cuda()
    usable = [index for index in range(len(facts.cards)) if cuda_problem(facts, index) is None]
    if not usable:
        return None
    report("measuring the card", 0.1)
    accelerator = open_accelerator(DeviceChoice("cuda", usable[0]), facts=facts)
    assert accelerator is not None
    try:
        link = measure_copy(accelerator)
        rate, flops = _card_rates(accelerator)
        budget = accelerator.budget
    finally:
        accelerator.close()
    name = facts.cards[usable[0]].name
    sources = (
        Source(("memory_bytes",), "what was free"),
        Source(("memory_gbs",), "measured: a sum over 256 MiB"),
        Source(("flops",), f"measured: a product of {_ROWS} rows with a matrix of {_SIDE} x {_SIDE} in f16"),
        Source(("link_gbs",), "measured: 64 MiB of page-locked memory"),
        _STARTS,
    )
    return ServerProfile(
        name="", description=name, sources=sources, device=name, precision="f16", memory_bytes=budget,
        memory_gbs=rate / 1e9, flops=flops, link_gbs=link / 1e9, host_memory_bytes=memory.total, host_read_gbs=1.0,
        host_flops=1.0, disk_gbs=DISK_GBS, simulated=False,
    )  # fmt: skip


_STARTS = Source(
    (
        "link_latency", "launch_seconds", "kernel_seconds", "wait_seconds", "host_expert_seconds", "host_job_seconds",
        "jitter",
    ),
    "not measured: what other profiles assume",
)  # fmt: skip


def _without_card() -> ServerProfile:
    return ServerProfile(
        name="", description="", sources=(_STARTS,), device="", precision="", memory_bytes=0, memory_gbs=0.0, flops=0.0,
        link_gbs=0.0, host_memory_bytes=1, host_read_gbs=1.0, host_flops=1.0, disk_gbs=DISK_GBS, simulated=False,
    )  # fmt: skip


def _card_rates(accelerator: Accelerator) -> tuple[float, float]:
    """Bytes and operations a second of the card, the best of a few."""
    device, stream = accelerator.torch_device, accelerator.compute
    probe = torch.zeros(_PROBE // 4, device=device)
    hidden = torch.zeros(_ROWS, _SIDE, dtype=torch.float16, device=device)
    weight = torch.zeros(_SIDE, _SIDE, dtype=torch.float16, device=device)

    def best(act: Callable[[], torch.Tensor]) -> float:
        times = []
        for _ in range(5):  # the first one finds its kernel
            start = stream.record(timed=True)
            act()
            end = stream.record(timed=True)
            end.synchronize()
            times.append(max(end.time() - start.time(), 1e-9))
        return min(times)

    read = _PROBE / best(probe.sum)
    return read, 2 * _ROWS * _SIDE * _SIDE / best(lambda: hidden @ weight.T)
