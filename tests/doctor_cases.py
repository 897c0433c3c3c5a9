"""CPUs, memories, disks and environments that need not exist, for the tests of `moe-offload doctor`."""

from hypothesis import strategies as st

from moe_offload.doctor_cpu_facts import TIERS, CpuFacts, NumaNode
from moe_offload.doctor_disk_facts import MODELS, PACKS, DiskFacts
from moe_offload.doctor_memory_facts import MemoryFacts
from moe_offload.doctor_modules import MemoryModules
from moe_offload.doctor_software_facts import VARIABLES, SoftwareFacts

GIB = 1 << 30
BOTH = (
    (MODELS, "/home/u/.cache/huggingface/hub"),
    (PACKS, "/home/u/.cache/moe-offload/packs"),
)

CPU = CpuFacts("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", 14, "AVX2", "AVX2", 28, 28, 14, read_rate=60e9)
MEMORY = MemoryFacts(128 * GIB, 120 * GIB, 128 * GIB, huge_pages="madvise")
DISK = DiskFacts(
    BOTH, "ext4", "/dev/nvme0n1p2", 10**12, 5 * 10**11, rotates=False, read_rate=2.5e9, direct=True
)  # fmt: skip
SOFTWARE = SoftwareFacts((("numba", "0.68.1"), ("numpy", "2.4.6")), 14, "/home/u/.cache/moe-offload/kernels/0123")

sizes = st.integers(0, 1 << 42)
maybe_rates = st.none() | st.floats(0, 1e12)
cpus = st.builds(
    CpuFacts, st.sampled_from(["AMD EPYC", ""]), st.integers(1, 256),
    st.sampled_from([*TIERS, "NEON", "AVX-512 with VNNI and AMX", "AVX2 (AMX is there, but the system refuses it)"]),
    st.sampled_from(["", *TIERS]), st.integers(0, 512), st.integers(0, 512), st.integers(0, 256),
    st.none() | st.floats(0.01, 300), st.booleans(), st.none() | st.sampled_from(["powersave", "performance", "x"]),
    st.none() | st.sampled_from(["intel_pstate", "acpi-cpufreq"]),
    st.lists(st.builds(NumaNode, st.integers(0, 7), st.integers(0, 64), st.none() | sizes), max_size=4).map(tuple),
    st.none() | st.sampled_from(["default", "interleave:0-1", "bind:0"]), st.booleans(), maybe_rates,
    st.none() | st.text(max_size=3),
)  # fmt: skip
modules = st.builds(
    MemoryModules, st.sampled_from(["DDR3", "DDR4", "DDR5"]), st.integers(1, 64), st.integers(1, 64),
    st.integers(1, 9000), st.none() | st.integers(1, 24),
)  # fmt: skip
memories = st.builds(
    MemoryFacts, sizes, sizes, sizes, st.none() | st.just("/sys/fs/cgroup/memory.max"), sizes, sizes, st.none() | sizes,
    st.none() | st.sampled_from(["always", "madvise", "never"]), sizes, st.none() | modules,
)  # fmt: skip
disks = st.builds(
    DiskFacts, st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]),
    st.sampled_from(["ext4", "nfs4", "tmpfs", "overlay", "fuse.sshfs", ""]), st.sampled_from(["/dev/sda1", ""]),
    st.none() | sizes, st.none() | sizes, st.booleans(), st.none() | st.booleans(), maybe_rates,
    st.none() | st.booleans(), st.none() | st.text(max_size=3),
)  # fmt: skip
environments = st.dictionaries(
    st.sampled_from(VARIABLES), st.sampled_from(["", "0", "1", "2,1", "true", "False", "x", "٣"]), max_size=4
)
softwares = st.builds(
    SoftwareFacts, st.sampled_from([(), (("numba", "0.68"), ("numpy", None))]), st.none() | st.integers(1, 64),
    st.none() | st.just("/k"), environments.map(lambda each: tuple(each.items())),
)  # fmt: skip
