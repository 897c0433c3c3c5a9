"""How much memory this process may still take: the machine's free memory, bounded by the control group's limit."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_offload.models.errors import NotEnoughMemoryError

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of main memory: what the machine (or the control group) has, and what of it is free."""

    total: int
    available: int


def detect_memory(cgroup: Path = _CGROUP) -> Memory:
    """What is there now. `cgroup` is the control group's folder (v2, or v1's `memory` below it)."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit_file, usage_file, stat_key in (
        (cgroup / "memory.max", cgroup / "memory.current", "inactive_file"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(limit_file), _number(usage_file)
        if limit is not None and used is not None and limit < total:
            # Cached file pages count as used, but the kernel gives them back before it refuses memory.
            used -= _stat(limit_file.parent / "memory.stat", stat_key)
            total = limit
            available = min(available, max(limit - used, 0))
    return Memory(total, available)


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
    return int(values.get(key, 0))
