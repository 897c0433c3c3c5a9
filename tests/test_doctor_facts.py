"""What `moe-offload doctor` reads from a system: files of systems that need not exist, and real reads of this disk."""

import _thread
import os
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload import doctor_cpu_facts
from moe_offload.cpu_kernels.team import Team
from moe_offload.doctor_cpu_facts import NumaNode, best_tier, cpu_quota, detect_cpu, measure_memory, numa_nodes
from moe_offload.doctor_disk_facts import DiskFacts, detect_disks, large_file, mount_of
from moe_offload.doctor_files import read_line, read_list, read_number
from moe_offload.doctor_memory_facts import detect_main_memory, huge_page_mode
from moe_offload.doctor_modules import MemoryModules, detect_modules
from moe_offload.memory import Memory, detect_memory, group_folders, group_limits
from moe_offload.transfer import disk_rate
from moe_offload.transfer.disk_rate import PIECE, measure_read

GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def memory_of(root: Path) -> Memory:
    return detect_memory(root / "sys/fs/cgroup", root / "proc/self/cgroup")


def limits_of(root: Path) -> list[tuple[str, int, int]]:
    found = group_limits(root / "sys/fs/cgroup", root / "proc/self/cgroup")
    return [(each.name.removeprefix(f"{root}/sys/fs/cgroup/"), each.limit, each.used) for each in found]


def test_a_container_sees_its_limit_where_groups_are_mounted(tmp_path: Path) -> None:
    groups = {"memory.max": GIB, "memory.current": GIB // 2, "memory.stat": "anon 1\ninactive_file 1000"}
    root = write(tmp_path, {"proc/self/cgroup": "0::/", **{f"sys/fs/cgroup/{name}": v for name, v in groups.items()}})
    assert limits_of(root) == [("memory.max", GIB, GIB // 2 - 1000)]
    assert memory_of(root) == Memory(GIB, GIB // 2 + 1000)
    facts = detect_main_memory(root)
    assert facts.total == GIB and facts.limited_by == str(root / "sys/fs/cgroup/memory.max")
    assert facts.machine == psutil.virtual_memory().total > facts.total


def test_limits_of_groups_around_the_own_one(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/user.slice/job"
    root = write(tmp_path, {
        "proc/self/cgroup": "0::/user.slice/job", f"{job}/memory.max": "max", f"{job}/memory.high": 3 * GIB,
        f"{job}/memory.current": GIB, "sys/fs/cgroup/user.slice/memory.max": 2 * GIB,
        "sys/fs/cgroup/user.slice/memory.current": 3 * GIB, "sys/fs/cgroup/other/memory.max": 1,
        "sys/fs/cgroup/other/memory.current": 1,
    })  # fmt: skip
    assert [each[:2] for each in limits_of(root)] == [
        ("user.slice/job/memory.high", 3 * GIB), ("user.slice/memory.max", 2 * GIB)
    ]  # fmt: skip
    assert memory_of(root) == Memory(2 * GIB, 0)  # more is used than allowed: just lowered
    assert str(detect_main_memory(root).limited_by).endswith("user.slice/memory.max")
    write(tmp_path, {f"{job}/memory.high": GIB + 5})
    assert memory_of(root) == Memory(GIB + 5, 0)
    assert str(detect_main_memory(root).limited_by).endswith("job/memory.high")


def test_version_1_in_a_container_that_does_not_see_its_own_folder(tmp_path: Path) -> None:
    own = "sys/fs/cgroup/memory"
    root = write(tmp_path, {
        "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc",
        f"{own}/memory.limit_in_bytes": GIB, f"{own}/memory.usage_in_bytes": 1000,
        f"{own}/memory.stat": "inactive_file 1\ntotal_inactive_file 400", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 150000,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert limits_of(root) == [("memory/memory.limit_in_bytes", GIB, 600)]
    assert cpu_quota(root) == 1.5
    write(tmp_path, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, f"{own}/memory.limit_in_bytes": 2**63 - 4096})
    assert limits_of(root) == [] and cpu_quota(root) is None


def test_the_tightest_quota_counts(tmp_path: Path) -> None:
    root = write(tmp_path, {
        "proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000",
        "sys/fs/cgroup/a/cpu.max": "50000 100000", "sys/fs/cgroup/cpu.max": "400000 100000",
    })  # fmt: skip
    assert cpu_quota(root) == 0.5
    assert cpu_quota(tmp_path / "nothing") is None


@given(st.text(max_size=60), st.sampled_from(["cpu", "memory"]))
@settings(deadline=None, max_examples=100)
def test_any_membership(tmp_path_factory: pytest.TempPathFactory, text: str, controller: str) -> None:
    folder = tmp_path_factory.mktemp("group")
    (folder / "membership").write_text(text, errors="replace")
    places = group_folders(controller, folder, folder / "membership")
    assert folder in places and folder / controller in places
    assert len(set(places)) == len(places)


def test_numa_nodes(tmp_path: Path) -> None:
    nodes = "sys/devices/system/node"
    root = write(tmp_path, {
        f"{nodes}/online": "0,2", f"{nodes}/node0/cpulist": "0-3,8-11", f"{nodes}/node2/cpulist": "4-7",
        f"{nodes}/node0/meminfo": "Node 0 MemTotal:       1000 kB\nNode 0 MemFree:  10 kB",
        f"{nodes}/node2/meminfo": "nothing",
    })  # fmt: skip
    assert numa_nodes(root, {0, 1, 8, 99}) == (NumaNode(0, 3, 1024000), NumaNode(2, 0, None))
    assert numa_nodes(tmp_path / "nothing", {0}) == ()


def test_clock_and_policy(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    clock = f"sys/devices/system/cpu/cpu{cpus[0]}/cpufreq"
    root = write(tmp_path, {
        f"{clock}/scaling_governor": "powersave", f"{clock}/scaling_driver": "intel_pstate",
        "proc/self/numa_maps": "00400000 interleave:0-1 file=/x", "sys/devices/system/cpu/online": "0-31",
        "proc/cpuinfo": "flags : fpu hypervisor sse2",
        **{f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": "0-63" for cpu in cpus},
    })  # fmt: skip
    facts = detect_cpu(root, measure=False)
    assert (facts.governor, facts.clock_driver, facts.memory_policy) == ("powersave", "intel_pstate", "interleave:0-1")
    assert facts.present == 32 and facts.allowed == len(cpus) and facts.allowed_cores == 1 and facts.hypervisor
    bare = detect_cpu(tmp_path / "nothing", measure=False)
    assert bare.governor is None and bare.nodes == () and bare.present >= 1 and not bare.hypervisor
    assert bare.read_rate is None and bare.read_error is None


def test_the_best_tier_of_a_cpu() -> None:
    ivy_bridge = {"sse2", "avx", "f16c"}
    for features, tier in (
        (set[str](), "SSE2"), (ivy_bridge, "AVX"), (ivy_bridge | {"avx2"}, "AVX2 without FMA"),
        (ivy_bridge | {"avx2", "fma"}, "AVX2"), (ivy_bridge | {"avx2", "fma", "avx512f"}, "AVX2"),  # Knights Landing
        (ivy_bridge | {"avx2", "fma", "avx512f", "avx512bw"}, "AVX-512"),
        (ivy_bridge | {"avx2", "fma", "avx512f", "avx512bw", "avx512vnni"}, "AVX-512 with VNNI"),
    ):  # fmt: skip
        assert best_tier(features) == tier


def test_measuring_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is read, with how many threads; the real thing runs in test_cli_doctor.py."""
    taken = list[tuple[int, int]]()

    def measure(team: Team, mib: int, seconds: float) -> float:
        taken.append((team.threads, mib))
        if team.threads == 3:
            raise MemoryError("no room\nat all")
        return 12.5

    monkeypatch.setattr(doctor_cpu_facts, "measure_read_bandwidth", measure)
    for free, mib in ((64 * GIB, 1024), (4 * GIB, 512), (GIB // 2, 64)):
        monkeypatch.setattr(doctor_cpu_facts, "detect_memory", lambda free=free: Memory(free, free))
        assert measure_memory(2) == (12.5e9, None)
        assert taken[-1] == (2, mib)
    assert measure_memory(3) == (None, "no room")
    monkeypatch.setattr(doctor_cpu_facts, "detect_memory", lambda: Memory(GIB, GIB // 8))
    assert measure_memory(2) == (None, "too little memory is free")


def test_huge_pages(tmp_path: Path) -> None:
    for text, mode in (("always [madvise] never", "madvise"), ("[always] madvise never", "always"),
                       ("always madvise [never]", "never"), ("madvise", None), (None, None)):  # fmt: skip
        assert huge_page_mode(text) == mode
    pools = "sys/kernel/mm/hugepages"
    root = write(tmp_path, {
        f"{pools}/hugepages-2048kB/free_hugepages": 10, f"{pools}/hugepages-1048576kB/free_hugepages": 2,
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    })  # fmt: skip
    facts = detect_main_memory(root)
    assert facts.reserved == 10 * 2048 * 1024 + 2 * GIB and facts.huge_pages == "never"


def entry(speed: int = 2400, kind: int = 0x1A, size: int = 16384, length: int = 0x28) -> bytes:
    """SMBIOS' record of a slot for memory."""
    raw = bytearray(length)
    raw[0], raw[1], raw[0x12] = 17, length, kind
    raw[0x0C:0x0E], raw[0x20:0x22] = size.to_bytes(2, "little"), speed.to_bytes(2, "little")
    return bytes(raw)


def with_modules(root: Path, slots: list[bytes], channels: list[str]) -> MemoryModules | None:
    for number, raw in enumerate(slots):
        folder = root / f"sys/firmware/dmi/entries/17-{number}"
        folder.mkdir(parents=True)
        (folder / "raw").write_bytes(raw)
    for number, place in enumerate(channels):
        write(root / f"sys/devices/system/edac/mc/mc{number % 2}/dimm{number}", {"dimm_location": place, "size": 16384})
    return detect_modules(root)


def test_memory_modules(tmp_path: Path) -> None:
    four = [entry(), entry(2133), entry(size=0), entry(0, 0x02, 0), entry(), entry()]
    found = with_modules(tmp_path / "a", four, [f"channel {n // 2 % 2} slot 0" for n in range(4)])
    assert found == MemoryModules("DDR4", 4, 6, 2133, 4) and found.rate == 4 * 8 * 2133e6
    same = with_modules(tmp_path / "b", four, ["channel 0 slot 0"] * 4)
    assert same is not None and same.channels == 2  # two of a channel, on two controllers
    for name, places in (("c", []), ("d", ["channel 0 slot 0"] * 3), ("e", ["csrow 0"] * 4), ("f", ["channel"] * 4)):
        found = with_modules(tmp_path / name, four, places)
        assert found is not None and found.channels is None and found.rate is None
    for name, slots in (("g", []), ("h", [entry(size=0)]), ("i", [entry(kind=0x07)]), ("j", [entry(0)]),
                        ("k", [b""]), ("l", [entry(), entry(kind=0x18)])):  # fmt: skip
        assert with_modules(tmp_path / name, slots, []) is None


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=100)
def test_any_record_of_a_slot(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    found = with_modules(tmp_path_factory.mktemp("slot"), [bytes([17, len(raw) + 2]) + raw], [])
    assert found is None or (found.speed > 0 and found.rate is None)


MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:40 / /data rw - nfs4 nas:/export rw
24 23 8:17 / /data/my\\040disk rw,relatime shared:3 master:1 - xfs /dev/sdb1 rw
25 22 0:50 / /two rw - ext4 /dev/sdc1 rw
26 22 0:51 / /two rw - tmpfs tmp rw
nonsense
27 22 - x
"""


def test_where_a_folder_is_mounted(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    for place, found in (("/home/u", ("ext4", "/dev/sda1")), ("/data", ("nfs4", "nas:/export")),
                         ("/database", ("ext4", "/dev/sda1")), ("/data/my disk/x", ("xfs", "/dev/sdb1")),
                         ("/two/x", ("tmpfs", "tmp"))):  # fmt: skip
        assert mount_of(Path(place), mounts) == found
    assert mount_of(Path("/"), tmp_path / "nothing") == ("", "")


@given(st.text(max_size=80))
@settings(deadline=None, max_examples=100)
def test_any_list_of_mounts(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    mounts = tmp_path_factory.mktemp("mounts") / "mountinfo"
    mounts.write_text(text, errors="replace")
    assert len(mount_of(Path("/data"), mounts)) == 2


def sparse(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_the_file_to_read(tmp_path: Path) -> None:
    assert large_file(tmp_path) is None and large_file(tmp_path / "nothing") is None
    sparse(tmp_path / "small.pack", disk_rate.LEAST_FILE - 1)
    elsewhere = sparse(tmp_path.parent / f"{tmp_path.name}-elsewhere", 8 * disk_rate.LEAST_FILE)
    (tmp_path / "link").symlink_to(elsewhere)  # may be another disk
    assert large_file(tmp_path) is None
    large = sparse(tmp_path / "models--a--b/blobs/0123", 2 * disk_rate.LEAST_FILE)
    sparse(tmp_path / "x.pack", disk_rate.LEAST_FILE)
    assert large_file(tmp_path) == large


def test_reading_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sparse(tmp_path / "file", 8 * PIECE + 100)
    found = measure_read(tmp_path, file, 5.0)
    assert found.nbytes == 8 * PIECE and found.seconds < 5 and found.rate == found.nbytes / found.seconds
    monkeypatch.setattr(disk_rate, "_MOST_BYTES", 2 * PIECE)
    assert measure_read(tmp_path, file, 5.0).nbytes == 2 * PIECE
    assert measure_read(tmp_path, file, 0.0).nbytes == 0
    with pytest.raises(OSError, match="less than"):
        measure_read(tmp_path, sparse(tmp_path / "short", 100))


def test_each_piece_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, places, real = sparse(tmp_path / "file", 16 * PIECE), list[int](), os.preadv

    def preadv(descriptor: int, buffers: list[object], offset: int) -> int:
        places.append(offset)
        return real(descriptor, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    measure_read(tmp_path, file, 5.0)
    assert sorted(places) == [piece * PIECE for piece in range(16)] != places


def test_a_temporary_file_leaves_nothing_behind(tmp_path: Path) -> None:
    found = measure_read(tmp_path, seconds=0.05)
    assert found.nbytes >= PIECE and found.rate > 0
    assert list(tmp_path.iterdir()) == []


def test_where_the_page_cache_cannot_be_bypassed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, dropped, real = sparse(tmp_path / "file", 4 * PIECE), list[int](), os.open

    def no_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", no_direct)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[3]))
    found = measure_read(tmp_path, file, 1.0)
    assert not found.direct and found.nbytes == 4 * PIECE
    assert dropped == [os.POSIX_FADV_DONTNEED] * 2  # before, and after


def test_ctrl_c_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real, calls = sparse(tmp_path / "file", 64 * PIECE), os.preadv, list[int]()
    done: list[int] = []

    def preadv(descriptor: int, buffers: list[object], offset: int) -> int:
        calls.append(offset)
        if len(calls) == 4:
            _thread.interrupt_main()
        threading.Event().wait(0.01)
        got = real(descriptor, buffers, offset)  # type: ignore[arg-type]
        done.append(offset)
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(KeyboardInterrupt):
        measure_read(tmp_path, file, 60.0)
    assert 4 <= len(calls) == len(done) < 64  # nobody reads from a descriptor that is closed


def test_ctrl_c_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdatasync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_read(tmp_path, seconds=60.0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="Input/output"):
        measure_read(tmp_path, sparse(tmp_path / "file", 4 * PIECE))


def test_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, packs = tmp_path / "hub/not/there", tmp_path / "packs"
    packs.mkdir()
    monkeypatch.setattr("moe_offload.doctor_disk_facts.hub_folder", lambda: hub)
    monkeypatch.setattr("moe_offload.doctor_disk_facts.default_folder", lambda: packs)
    (disk,) = detect_disks(measure=False)
    assert disk.folders == (("models", str(hub)), ("converted weights", str(packs)))
    assert disk.filesystem and disk.free and disk.total and disk.free < disk.total and disk.writable
    assert disk.read_rate is None and not hub.exists()

    def full(folder: Path, file: Path | None) -> disk_rate.ReadRate:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_offload.doctor_disk_facts.measure_read", full)
    (disk,) = detect_disks()
    assert disk.read_error in ("No space left on device", None) and (disk.read_error or disk.in_memory)


@pytest.mark.parametrize(
    ("filesystem", "network"),
    [("ext4", False), ("nfs", True), ("nfs4", True), ("cifs", True), ("smb3", True), ("fuse.sshfs", True), ("9p", True),
     ("ceph", True), ("fuse.ceph-fuse", True), ("virtiofs", False), ("fuseblk", False), ("zfs", False), ("", False)],
)  # fmt: skip
def test_network_file_systems(filesystem: str, network: bool) -> None:
    assert DiskFacts((), filesystem).network is network


def test_small_files(tmp_path: Path) -> None:
    root = write(
        tmp_path, {"a": "12", "b": "max", "c": "-3", "d": "٣", "list": "0-2,7", "bad": "0-", "huge": "0-99999"}
    )
    numbers = [read_number(root / name) for name in ("a", "b", "c", "d", "nothing")]
    assert numbers == [12, None, -3, None, None]
    assert read_list(root / "list") == (0, 1, 2, 7)
    assert read_list(root / "bad") == read_list(root / "huge") == read_list(root / "nothing") == ()
    assert read_line(root) is None  # a folder


@given(st.sets(st.integers(0, 300), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_lists_of_cpus(tmp_path_factory: pytest.TempPathFactory, numbers: set[int]) -> None:
    path = tmp_path_factory.mktemp("list") / "cpulist"
    path.write_text(",".join(str(number) for number in sorted(numbers)))
    assert set(read_list(path)) == numbers
