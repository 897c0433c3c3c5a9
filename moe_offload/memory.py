"""How much memory this process may still take: the machine's free memory, bounded by the control group's limit."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_offload.models.errors import NotEnoughMemoryError

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of main memory: what the machine (or the control group) has, and what of it is free."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """A control group that bounds this process's memory. `used`: without file pages, which the kernel gives back."""

    name: str
    limit: int
    used: int


def detect_memory(cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> Memory:
    """What is there now. `cgroup` is where control groups are mounted, `membership` says which of them are ours."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for group in group_limits(cgroup, membership):
        total = min(total, group.limit)
        available = min(available, max(group.limit - group.used, 0))
    return Memory(total, available)


def group_limits(cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> list[GroupLimit]:
    """The limits below the machine's own memory, of this process's group and of those around it, inmost first."""
    machine = int(psutil.virtual_memory().total)
    groups = []
    for folder in group_folders("memory", cgroup, membership):
        for limit_name, usage_name, stat_key in (
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and used is not None and limit < machine:
                used = max(used - _stat(folder / "memory.stat", stat_key), 0)
                groups.append(GroupLimit(str(folder / limit_name), limit, used))
    return groups


def group_folders(controller: str, cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> list[Path]:
    """The folders of this process's control group and of those around it, inmost first, of version 2 and version 1.

    A container may not see the folder that it is in: then those above it remain, of which the last is its own.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    folders: dict[Path, None] = {}
    for line in [*lines, "0::/", f"0:{controller}:/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = cgroup / controller if controllers else cgroup
        place = mount / path.lstrip("/")
        for folder in (place, *place.parents):
            folders[folder] = None
            if folder == mount:
                break
    return list(folders)


def memory_room(limit: int | None) -> int:
    """Bytes that a model may take: what is free, and no more than `limit`, when given."""
    available = detect_memory().available
    return available if limit is None else min(limit, available)


def require_memory(needed: int, limit: int | None, what: str) -> None:
    """Raise NotEnoughMemoryError unless `needed` bytes fit in what is free (and in `limit`, when given)."""
    available = detect_memory().available
    if limit is not None and needed > limit:
        raise NotEnoughMemoryError(
            f"{what} need {format_bytes(needed)} of memory, but the limit given is {format_bytes(limit)}: raise it"
        )
    if needed > available:
        raise NotEnoughMemoryError(
            f"{what} need {format_bytes(needed)} of memory, but {format_bytes(available)} are free: "
            "stop other programs, or take a smaller model"
        )


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KB'; decimal units, as disks and download pages count."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split()[:2] for line in lines if len(line.split()) >= 2)
    try:
        return int(values.get(key, 0))
    except ValueError:
        return 0
