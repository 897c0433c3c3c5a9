"""The CPU as `moe-offload doctor` finds it: cores, instructions, clock, NUMA nodes, and how fast memory is read."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding

from moe_offload.bench_cpu import tier_name
from moe_offload.cpu_kernels.amx import permission
from moe_offload.cpu_kernels.bandwidth import measure_read_bandwidth
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import ThreadTeam
from moe_offload.doctor_files import read_line, read_list
from moe_offload.machine import cpu_name
from moe_offload.memory import detect_memory, group_folders

# by the system's own names, the weakest first: the tier of `bench_cpu.tier_name`, and what a CPU needs for it
_TIERS = (
    ("SSE2", set[str]()),
    ("AVX", {"avx"}),
    ("AVX2 without FMA", {"avx", "avx2"}),
    ("AVX2", {"avx", "avx2", "fma"}),
    ("AVX-512", {"avx512f", "avx512bw", "fma"}),
    ("AVX-512 with VNNI", {"avx512f", "avx512bw", "avx512vnni", "fma"}),
)
TIERS = tuple(name for name, _ in _TIERS)
_SECONDS = 1.0
_MOST_MIB, _LEAST_MIB = 1024, 64
_CPUS, _NODES = "sys/devices/system/cpu", "sys/devices/system/node"


@dataclass(frozen=True, slots=True)
class NumaNode:
    """`cpus`: how many of its hardware threads this process may use. None: not known."""

    number: int
    cpus: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """`cores`: the engine's threads. `tier`: the instruction set of the kernels, `best_tier` the CPU's ("": not known).

    `present`, `allowed`, `allowed_cores`: hardware threads of the machine, those that this process may use (affinity),
    and how many cores these are. `quota`: CPUs by the control group. `governor`, `clock_driver`: of the clock.
    `memory_policy`: as in /proc/self/numa_maps. `read_rate`: bytes a second by all threads at once.
    """

    name: str
    cores: int
    tier: str
    best_tier: str = ""
    present: int = 0
    allowed: int = 0
    allowed_cores: int = 0
    quota: float | None = None
    hypervisor: bool = False
    governor: str | None = None
    clock_driver: str | None = None
    nodes: tuple[NumaNode, ...] = ()
    memory_policy: str | None = None
    numactl: bool = False
    read_rate: float | None = None
    read_error: str | None = None

    @property
    def nodes_used(self) -> tuple[NumaNode, ...]:
        """Those with cores for this process."""
        return tuple(node for node in self.nodes if node.cpus)


def detect_cpu(root: Path = Path("/"), measure: bool = True) -> CpuFacts:
    """The CPU as the engine would use it, under this process's affinity and control group."""
    target = current_target()
    tier = tier_name(target)
    if target.tiles:
        tier += " and AMX" if permission() else " (AMX is there, but the system refuses it)"
    allowed = _allowed()
    cpus = root / _CPUS
    clock = cpus / f"cpu{allowed[0]}/cpufreq"
    policy = (read_line(root / "proc/self/numa_maps") or "").split()[1:2]
    rate, error = measure_memory(default_threads()) if measure else (None, None)
    return CpuFacts(
        cpu_name(),
        default_threads(),
        tier,
        best_tier(host_features()) if target.is_x86 else "",
        len(read_list(cpus / "online")) or os.cpu_count() or 1,
        len(allowed),
        len({read_line(cpus / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}),
        cpu_quota(root),
        " hypervisor" in (read_line(root / "proc/cpuinfo") or ""),
        read_line(clock / "scaling_governor"),
        read_line(clock / "scaling_driver"),
        numa_nodes(root, set(allowed)),
        policy[0] if policy else None,
        shutil.which("numactl") is not None,
        rate,
        error,
    )


def measure_memory(threads: int) -> tuple[float | None, str | None]:
    """Bytes a second that all threads together read, or why not. About a second, more where kernels compile first."""
    mib = min(_MOST_MIB, detect_memory().available >> 23)  # an eighth of what is free
    if mib < _LEAST_MIB:
        return None, "too little memory is free"
    try:
        with ThreadTeam(threads) as team:
            return 1e9 * measure_read_bandwidth(team, mib, _SECONDS), None
    except Exception as error:
        return None, str(error).strip().partition("\n")[0] or type(error).__name__


def best_tier(features: set[str]) -> str:
    """The best tier whose instructions are all there."""
    return [name for name, needed in _TIERS if needed <= features][-1]


def host_features() -> set[str]:
    """What the CPU has and the system allows, whatever the environment holds the compiler to."""
    try:
        known = llvmlite.binding.get_host_cpu_features()  # type: ignore[no-untyped-call]
        return {name for name, there in known.items() if there}
    except Exception:
        return set()


def numa_nodes(root: Path, allowed: set[int]) -> tuple[NumaNode, ...]:
    """In the order of their numbers; empty where the system is silent."""
    nodes = []
    for number in read_list(root / _NODES / "online"):
        folder = root / _NODES / f"node{number}"
        cpus = allowed.intersection(read_list(folder / "cpulist"))
        words = (read_line(folder / "meminfo") or "").partition("MemTotal:")[2].split()
        size = int(words[0]) * 1024 if words and words[0].isdigit() else None
        nodes.append(NumaNode(number, len(cpus), size))
    return tuple(nodes)


def cpu_quota(root: Path) -> float | None:
    """The tightest of this process's control groups, in CPUs."""
    quotas = []
    for folder in group_folders("cpu", root / "sys/fs/cgroup", root / "proc/self/cgroup"):
        words = (read_line(folder / "cpu.max") or "").split()
        if len(words) != 2:
            words = [read_line(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if all(word.isascii() and word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0)) or [0]
    return list(range(os.cpu_count() or 1))
