"""Judgement on the CPU, memory, disks and software of machines that need not exist."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.doctor import judge
from moe_offload.doctor_cpu import better_tier, cpu_findings, level
from moe_offload.doctor_cpu_facts import TIERS, CpuFacts, NumaNode
from moe_offload.doctor_disk import disk_findings
from moe_offload.doctor_disk_facts import DiskFacts
from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_memory import memory_findings
from moe_offload.doctor_memory_facts import MemoryFacts
from moe_offload.doctor_modules import MemoryModules
from moe_offload.doctor_software import software_findings
from moe_offload.doctor_software_facts import SoftwareFacts
from tests import doctor_cases
from tests.doctor_cases import BOTH, CPU, DISK, GIB, MEMORY, SOFTWARE
from tests.test_doctor import GTX1080TI, check_command, machine

PERFORMANCE = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
DUAL = replace(
    CPU, cores=28, allowed=56, allowed_cores=28, present=56, memory_policy="default", numactl=True,
    nodes=(NumaNode(0, 28, 64 * GIB), NumaNode(1, 28, 64 * GIB)),
)  # fmt: skip
DDR4 = MemoryModules("DDR4", 4, 16, 2400, 4)
LAPTOP = CpuFacts("Intel(R) Core(TM) i5-7200U CPU @ 2.50GHz", 2, "AVX2", "AVX2", 4, 4, 2, governor="powersave",
                  clock_driver="acpi-cpufreq")  # fmt: skip


def cpu(base: CpuFacts = CPU, **changes: Any) -> MachineFacts:
    software = replace(SOFTWARE, torch_threads=changes.get("cores", base.cores))
    return machine(GTX1080TI, cpu=replace(base, **changes), software=software)


def memory(**changes: Any) -> MachineFacts:
    return machine(GTX1080TI, memory=replace(MEMORY, **changes))


def disk(**changes: Any) -> MachineFacts:
    return machine(GTX1080TI, disks=(replace(DISK, **changes),))


def settings_of(threads: int = 14, **environment: str) -> MachineFacts:
    software = replace(SOFTWARE, torch_threads=threads, environment=tuple(environment.items()))
    return machine(GTX1080TI, software=software)


@pytest.mark.parametrize(
    ("facts", "section", "severity", "text", "mend"),
    [
        # an old dual Xeon
        (cpu(DUAL), "CPU", "advice", "belong to 2 NUMA nodes", "with numactl --interleave=all moe-offload ..., or, for "
         "a model that fits in 68.7 GB, numactl --cpunodebind=0 --membind=0"),
        (cpu(DUAL, numactl=False), "CPU", "advice", "2 NUMA nodes", "install numactl and start"),
        (cpu(DUAL, memory_policy="bind:0"), "CPU", "advice", "2 NUMA nodes", "numactl"),
        (cpu(DUAL, memory_policy="interleave:0-1"), "CPU", None, "", ""),
        (cpu(DUAL, nodes=(NumaNode(0, 28, 64 * GIB), NumaNode(1, 0, 64 * GIB))), "CPU", None, "", ""),  # bound to one
        (cpu(DUAL, nodes=(NumaNode(0, 28, 128 * GIB), NumaNode(1, 28, 0)), memory_policy="interleave:0"), "CPU",
         "advice", "NUMA node 1 has cores and no memory", "memory modules"),
        # a container
        (cpu(cores=4, quota=4.0), "CPU", "advice", "gives this process 4 CPUs of time, on 14 cores", "--cpus"),
        (cpu(cores=1, quota=0.5), "CPU", "advice", "0.5 CPUs", "--cpus"),
        (cpu(quota=14.0), "CPU", None, "", ""),
        (cpu(cores=4, allowed=4, allowed_cores=4), "CPU", "note", "4 of the machine's 28 hardware threads", "taskset"),
        (cpu(cores=7, allowed=14, allowed_cores=7), "CPU", "note", "14 of the machine's 28", "taskset"),
        (cpu(cores=12, allowed=24, allowed_cores=12), "CPU", None, "", ""),
        (memory(total=4 * GIB, available=3 * GIB, limited_by="/sys/fs/cgroup/memory.max"), "memory", "advice",
         "may take 4.3 GB of the machine's 137 GB, by the limit in /sys/fs/cgroup/memory.max", "docker run --memory"),
        (memory(total=100 * GIB, available=90 * GIB, limited_by="/x/memory.high"), "memory", "note", "107 GB", "raise"),
        (memory(limited_by="/sys/fs/cgroup/memory.max"), "memory", None, "", ""),
        # a laptop
        (cpu(LAPTOP), "CPU", "advice", "powersave, which keeps the lowest clock", PERFORMANCE),
        (cpu(LAPTOP, clock_driver=None), "CPU", "advice", "keeps the lowest clock", PERFORMANCE),
        (cpu(LAPTOP, clock_driver="intel_pstate"), "CPU", "note", "rises late", PERFORMANCE),
        (cpu(LAPTOP, governor="conservative"), "CPU", "advice", "slowly", PERFORMANCE),
        (cpu(LAPTOP, governor="schedutil"), "CPU", None, "", ""),
        # instructions
        (cpu(tier="AVX2", best_tier="AVX-512 with VNNI"), "CPU", "advice", "held to AVX2, and this CPU has AVX-512",
         "unset NUMBA_CPU_NAME NUMBA_CPU_FEATURES NUMBA_ENABLE_AVX"),
        (cpu(tier="AVX-512 with VNNI and AMX", best_tier="AVX-512 with VNNI"), "CPU", None, "", ""),
        (cpu(tier="SSE2", best_tier="SSE2", hypervisor=True), "CPU", "advice", "virtual machine has SSE2", "-cpu host"),
        (cpu(tier="AVX", best_tier="AVX"), "CPU", None, "", ""),  # an Ivy Bridge: nothing to mend
        (cpu(tier="NEON", best_tier="", hypervisor=True), "CPU", None, "", ""),
        (cpu(read_rate=None, read_error="no"), "CPU", "note", "could not be measured: no", None),
        (machine(GTX1080TI, memory=replace(MEMORY, modules=replace(DDR4, channels=8))), "CPU", "advice",
         "read at 60.0 of the 153.6 GB/s", "firmware"),
        (machine(GTX1080TI, memory=replace(MEMORY, modules=DDR4)), "CPU", None, "", ""),
        (machine(GTX1080TI, memory=replace(MEMORY, modules=replace(DDR4, channels=8, kind="DDR5"))), "CPU", None, "",
         ""),
        (machine(GTX1080TI, memory=replace(MEMORY, modules=replace(DDR4, channels=None))), "CPU", None, "", ""),
        # memory
        (memory(available=20 * GIB), "memory", "advice", "21.5 GB of 137 GB of memory are free", "ps -eo"),
        (memory(swap=8 * GIB, swap_used=7 * GIB), "memory", "advice", "7.5 GB are swapped out", "stop other"),
        (memory(swap=8 * GIB, swap_used=GIB), "memory", None, "", ""),
        (memory(huge_pages="never"), "memory", "advice", "huge pages are off", "echo madvise | sudo tee"),
        (memory(huge_pages="always"), "memory", None, "", ""),
        (memory(huge_pages=None), "memory", None, "", ""),
        (memory(reserved=32 * GIB), "memory", "advice", "34.4 GB are set aside", "sudo sysctl vm.nr_hugepages=0"),
        (memory(lock_limit=64 << 10), "memory", "note", "may lock 65.5 KB", "ulimit -l unlimited"),
        (memory(lock_limit=16 * GIB), "memory", None, "", ""),
        (machine(driver=None, memory=replace(MEMORY, lock_limit=0)), "memory", None, "", ""),  # nothing locks it
        # disks
        (disk(filesystem="nfs4", source="nas:/models", read_rate=110e6), "disk", "advice",
         "models and converted weights come over the network (nfs4, nas:/models), at 110 MB/s", "set HF_HOME"),
        (disk(filesystem="fuse.sshfs"), "disk", "advice", "over the network", "local disk"),
        (disk(filesystem="fuse.juicefs"), "disk", "advice", "over the network", "local disk"),
        (disk(filesystem="fuseblk"), "disk", None, "", ""),  # NTFS
        (disk(filesystem="tmpfs", folders=BOTH[1:]), "disk", "advice", "lie in memory", "give --pack-dir a folder"),
        (disk(filesystem="overlay"), "disk", "note", "gone with it", "a volume that stays"),
        (disk(filesystem="overlay", read_rate=100e6), "disk", "advice", "30 GB take 5 minutes", "a faster disk"),
        (disk(rotates=True, read_rate=150e6), "disk", "advice", "hard disk with models and converted weights reads "
         "150 MB/s", "a faster disk"),
        (disk(rotates=True, read_rate=None), "disk", "advice", "lie on a hard disk", "a faster disk"),
        (disk(rotates=True, read_rate=1e9), "disk", None, "", ""),  # an array
        (disk(read_rate=None), "disk", None, "", ""),
        (disk(read_rate=None, read_error="Input/output error"), "disk", "note", "Input/output error", None),
        (disk(free=5 * 10**9), "disk", "advice", "5.0 GB are free", "a larger disk"),
        (disk(writable=False, folders=BOTH[:1], read_rate=None, read_error="x"), "disk", "advice",
         "/home/u/.cache/huggingface/hub cannot be written to", "set HF_HOME"),
        # software
        (settings_of(1, OMP_NUM_THREADS="1"), "software", "advice", "OMP_NUM_THREADS=1 gives torch 1 of 14 cores",
         "unset OMP_NUM_THREADS"),
        (settings_of(4, OMP_NUM_THREADS="4,2", MKL_NUM_THREADS="7"), "software", "advice", "4 of 14", "unset OMP_NUM"),
        (settings_of(14, OMP_NUM_THREADS="14"), "software", None, "", ""),
        (settings_of(7), "software", None, "", ""),  # nobody knows why
        (settings_of(28), "software", "advice", "28 threads", "export OMP_NUM_THREADS=14"),
        (settings_of(NUMBA_DISABLE_JIT="1"), "software", "problem", "no model runs", "unset NUMBA_DISABLE_JIT"),
        (settings_of(NUMBA_DISABLE_JIT="0"), "software", None, "", ""),
        (settings_of(OMP_PROC_BIND="true"), "software", "advice", "to one core", "unset OMP_PROC_BIND"),
        (settings_of(OMP_PROC_BIND="false", KMP_AFFINITY="disabled"), "software", None, "", ""),
        (settings_of(CUDA_LAUNCH_BLOCKING="1"), "software", "advice", "overlaps", "unset CUDA_LAUNCH_BLOCKING"),
        (settings_of(CUDA_LAUNCH_BLOCKING="0", HF_HOME="/x"), "software", None, "", ""),
        (machine(GTX1080TI, software=replace(SOFTWARE, kernels=None)), "software", "advice", "kept nowhere",
         "NUMBA_CACHE_DIR"),
        (machine(GTX1080TI, software=replace(SOFTWARE, packages=(("numpy", None),))), "software", "advice",
         "numpy is not installed", "pip install numpy"),
    ],
)  # fmt: skip
def test_findings(facts: MachineFacts, section: str, severity: str | None, text: str, mend: str | None) -> None:
    verdict = judge(facts)
    host = [each for each in verdict.findings if each.section != "GPU"]
    if severity is None:
        assert host == []
        return
    assert [(each.section, each.severity) for each in host] == [(section, severity)]
    assert text in host[0].text
    said = host[0].command or host[0].instruction
    assert said is None if mend is None else said is not None and mend in said
    assert verdict.runs is (severity != "problem")
    if host[0].command is not None:
        check_command(host[0].command)


def test_several_at_once_the_worst_first() -> None:
    facts = machine(
        cpu=replace(DUAL, quota=2.0, cores=2), memory=replace(MEMORY, huge_pages="never", total=4 * GIB,
        available=GIB // 2, limited_by="/sys/fs/cgroup/memory.max"), disks=(replace(DISK, filesystem="nfs"),),
        software=replace(SOFTWARE, environment=(("NUMBA_DISABLE_JIT", "1"),)), driver=None,
    )  # fmt: skip
    findings = judge(facts).findings
    assert [each.section for each in findings] == [
        "software", "software", "CPU", "CPU", "memory", "memory", "memory", "disk", "GPU"
    ]  # fmt: skip
    assert findings[0].severity == "problem" and findings[-1].severity == "note"


def test_what_a_better_tier_gives() -> None:
    assert "2013" in str(better_tier("SSE2")) and "VNNI" in str(better_tier("AVX2"))
    assert "VNNI" in str(better_tier("AVX-512"))
    for tier in ("AVX-512 with VNNI", "AVX-512 with VNNI and AMX", "NEON", "512-bit vectors"):
        assert better_tier(tier) is None
    assert sorted(TIERS, key=level) == list(TIERS)


@given(doctor_cases.cpus, doctor_cases.memories, st.lists(doctor_cases.disks, max_size=2), doctor_cases.softwares)
@settings(deadline=None, max_examples=200)
def test_judgement_never_raises(
    cpu: CpuFacts, memory: MemoryFacts, disks: list[DiskFacts], software: SoftwareFacts
) -> None:
    """And says no None; whatever is to be run can be run."""
    findings = (
        cpu_findings(cpu) + memory_findings(memory, True) + disk_findings(tuple(disks))
        + software_findings(software, cpu)
    )  # fmt: skip
    assert len(set(findings)) == len(findings) or len(disks) == 2
    for each in findings:
        assert "None" not in each.text and "()" not in each.text and "  " not in each.text
        assert each.severity != "problem" or each.section == "software"
        assert each.section != "GPU"
        if each.command is not None:
            check_command(each.command)


@given(doctor_cases.memories, st.integers(0, 1 << 40))
@settings(deadline=None, max_examples=50)
def test_more_memory_is_never_worse(memory: MemoryFacts, more: int) -> None:
    def said(facts: MemoryFacts) -> int:
        return sum("are free" in each.text for each in memory_findings(facts, False))

    assert said(replace(memory, available=memory.available + more)) <= said(memory)
