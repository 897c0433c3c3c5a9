"""Judgement of `moe-offload doctor` on the CPU: which cores, which instructions, which clock, which memory is near."""

from moe_offload.doctor_cpu_facts import TIERS, CpuFacts, NumaNode
from moe_offload.doctor_findings import Finding
from moe_offload.doctor_modules import MemoryModules
from moe_offload.memory import format_bytes

_PERFORMANCE = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
_OWN_CLOCK = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")  # under these "powersave" raises the clock by itself
_HALF = 0.5
_KERNELS = "AVX2"  # the least that kernels are tuned for


def cpu_findings(cpu: CpuFacts, modules: MemoryModules | None = None) -> list[Finding]:
    """What is wrong with the CPU, or with what this process may use of it. `modules`: of its memory, if known."""
    found = (_cores(cpu), _tier(cpu), _governor(cpu), _nodes(cpu), _empty_nodes(cpu), _rate(cpu, modules))
    return [each for each in found if each is not None]


def better_tier(tier: str) -> str | None:
    """What a newer CPU would bring, measured on a Zen 4 that was held to AVX2 (benchmarks/results/cpu_experts.json)."""
    if level(tier) < level("AVX2"):
        return "AVX2 and FMA (2013 and later) are the least that kernels are tuned for"
    if level(tier) < level("AVX-512 with VNNI"):
        return "AVX-512 with VNNI reads 1.05 to 1.2x as fast at one token, 1.5 to 4x in prompts"
    return None


def level(tier: str) -> int:
    """Higher is better; above all for what is no x86 tier, of which nothing is known."""
    name = tier.partition(" (")[0].removesuffix(" and AMX")
    return TIERS.index(name) if name in TIERS else len(TIERS)


def _cores(cpu: CpuFacts) -> Finding | None:
    if cpu.quota is not None and int(cpu.quota) < cpu.allowed_cores:
        text = f"the control group gives this process {cpu.quota:.3g} CPUs of time, on {_count(cpu.allowed_cores)}"
        help_ = "give the container or the job more (docker run --cpus, systemd CPUQuota, Slurm --cpus-per-task)"
        return Finding("advice", text, instruction=help_, section="CPU")
    if cpu.allowed < cpu.present and 2 * cpu.allowed <= cpu.present:
        text = f"this process may use {cpu.allowed} of the machine's {cpu.present} hardware threads"
        help_ = "if that is not meant so, look for taskset, cpusets of a container or job, and OMP_PROC_BIND"
        return Finding("note", text, instruction=help_, section="CPU")
    return None


def _tier(cpu: CpuFacts) -> Finding | None:
    if cpu.best_tier and level(cpu.tier) < level(cpu.best_tier):
        return Finding(
            "advice",
            f"kernels are held to {cpu.tier}, and this CPU has {cpu.best_tier}",
            command="unset NUMBA_CPU_NAME NUMBA_CPU_FEATURES NUMBA_ENABLE_AVX",
            section="CPU",
        )
    if cpu.hypervisor and level(cpu.tier) < level(_KERNELS):
        text = f"this virtual machine has {cpu.tier} only, which is less than nearly any CPU below it"
        help_ = "give it the host's CPU model (QEMU: -cpu host; Proxmox: type host; VMware: EVC off)"
        return Finding("advice", text, instruction=help_, section="CPU")
    return None


def _governor(cpu: CpuFacts) -> Finding | None:
    if cpu.governor not in ("powersave", "conservative"):
        return None
    if cpu.governor == "powersave" and cpu.clock_driver in _OWN_CLOCK:
        text = f"the clock's governor is powersave ({cpu.clock_driver}): the clock rises late, after every pause"
        return Finding("note", text, command=_PERFORMANCE, section="CPU")
    how = "keeps the lowest clock" if cpu.governor == "powersave" else "raises the clock slowly"
    return Finding(
        "advice", f"the clock's governor is {cpu.governor}, which {how}", command=_PERFORMANCE, section="CPU"
    )


def _nodes(cpu: CpuFacts) -> Finding | None:
    if len(cpu.nodes_used) < 2 or "interleave" in (cpu.memory_policy or ""):
        return None
    first = cpu.nodes_used[0]
    text = (
        f"the cores belong to {len(cpu.nodes_used)} NUMA nodes, and a file's weights lie on the node whose cores read "
        "them first: all others read them over the slower link between the nodes"
    )
    small = "a small model" if not first.memory_bytes else f"a model that fits in {format_bytes(first.memory_bytes)}"
    help_ = (
        f"{'' if cpu.numactl else 'install numactl and '}start with numactl --interleave=all moe-offload ..., or, for "
        f"{small}, numactl --cpunodebind={first.number} --membind={first.number} moe-offload ... (moe-offload bench "
        "tells which is faster); files that were read before keep their place until echo 1 | sudo tee "
        "/proc/sys/vm/drop_caches"
    )
    return Finding("advice", text, instruction=help_, section="CPU")


def _empty_nodes(cpu: CpuFacts) -> Finding | None:
    """Boards with memory modules beside one socket only."""
    empty = [node for node in cpu.nodes_used if node.memory_bytes == 0]
    if not empty or len(empty) == len(cpu.nodes_used):
        return None
    text = f"NUMA node{'' if len(empty) == 1 else 's'} {_numbers(empty)} has cores and no memory"
    help_ = "put memory modules into the slots of that socket: its channels add to the read rate"
    return Finding("advice", text, instruction=help_, section="CPU")


def _rate(cpu: CpuFacts, modules: MemoryModules | None) -> Finding | None:
    if cpu.read_error is not None:
        return Finding("note", f"how fast memory is read could not be measured: {cpu.read_error}", section="CPU")
    most = None if modules is None else modules.rate
    part = cpu.cores < cpu.allowed_cores or cpu.allowed < cpu.present or len(cpu.nodes_used) > 1
    if most is None or cpu.read_rate is None or part or cpu.read_rate >= _HALF * most:
        return None
    text = f"memory is read at {cpu.read_rate / 1e9:.1f} of the {most / 1e9:.1f} GB/s that its modules give"
    help_ = "close programs that use memory, and look in the firmware's settings for power saving and node interleaving"
    return Finding("advice", text, instruction=help_, section="CPU")


def _numbers(nodes: list[NumaNode]) -> str:
    return ", ".join(str(node.number) for node in nodes)


def _count(cores: int) -> str:
    return f"{cores} core{'' if cores == 1 else 's'}"
