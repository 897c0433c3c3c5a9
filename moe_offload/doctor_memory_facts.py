"""Main memory as `moe-offload doctor` finds it: how much, who limits it, what is swapped out, huge and locked pages."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_offload.doctor_files import read_line, read_number
from moe_offload.doctor_modules import MemoryModules, detect_modules
from moe_offload.memory import detect_memory, group_limits


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Bytes. `total`, `available`: for this process; `machine`: what is built in.

    `limited_by`: the file of the control group that sets `total`. `swap_used`: of `swap`. `lock_limit`: what a process
    may lock, None for no limit. `huge_pages`: the mode of transparent ones, None where there are none or nobody knows.
    `reserved`: in huge pages that were set aside and that nobody uses.
    """

    total: int
    available: int
    machine: int = 0
    limited_by: str | None = None
    swap: int = 0
    swap_used: int = 0
    lock_limit: int | None = None
    huge_pages: str | None = None
    reserved: int = 0
    modules: MemoryModules | None = None


def detect_main_memory(root: Path = Path("/")) -> MemoryFacts:
    """Never raises."""
    groups, membership = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    memory = detect_memory(groups, membership)
    tightest = min(group_limits(groups, membership), key=lambda each: each.limit, default=None)
    try:
        swapped = psutil.swap_memory()
        swap, swap_used = int(swapped.total), int(swapped.used)
    except Exception:  # psutil needs /proc/vmstat for it
        swap = swap_used = 0
    return MemoryFacts(
        memory.total,
        memory.available,
        int(psutil.virtual_memory().total),
        None if tightest is None else tightest.name,
        swap,
        swap_used,
        lock_limit(),
        huge_page_mode(read_line(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        _reserved(root / "sys/kernel/mm/hugepages"),
        detect_modules(root),
    )


def huge_page_mode(text: str | None) -> str | None:
    """'always [madvise] never' -> 'madvise'."""
    match = re.search(r"\[(always|madvise|never)\]", text or "")
    return match[1] if match else None


def lock_limit() -> int | None:
    """What this process may lock. A privileged one may lock everything."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    except Exception:  # no such limit on this system
        return None
    return None if soft == resource.RLIM_INFINITY else soft


def _reserved(folder: Path) -> int:
    total = 0
    for pool in folder.glob("hugepages-*kB"):
        size = pool.name.removeprefix("hugepages-").removesuffix("kB")
        free = read_number(pool / "free_hugepages")
        total += int(size) * 1024 * free if size.isdigit() and free else 0
    return total
