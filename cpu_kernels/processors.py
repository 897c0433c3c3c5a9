"""How many threads this process should use."""

import os
from contextlib import suppress
from pathlib import Path


def default_threads() -> int:
    """Physical cores that the affinity mask allows, not above the cgroup's CPU quota.

    A second hyperthread of a core adds nothing to a kernel that waits for memory.
    """
    cores = {_core_of(cpu) for cpu in _allowed_cpus()}
    quota = _cgroup_cpus(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return len(cores) if quota is None else max(1, min(len(cores), int(quota)))


def cores_of_threads(threads: int) -> list[int]:
    """A logical CPU for each of a team's threads, on physical cores of their own, neighbours first, so that a team
    smaller than the machine keeps to one NUMA node. Empty where there are fewer cores than threads: the system
    shares them out better than a list can.
    """
    first: dict[str, int] = {}
    for cpu in _allowed_cpus():
        first.setdefault(_core_of(cpu), cpu)
    cpus = sorted(first.values(), key=lambda cpu: (_node_of(cpu), cpu))
    return cpus[:threads] if len(cpus) >= threads else []


def pin_thread(cpu: int) -> None:
    """Keep the calling thread on one logical CPU, where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # a CPU that went offline, or a sandbox that forbids it
            os.sched_setaffinity(0, {cpu})


def _node_of(cpu: int, system: Path = Path("/sys/devices/system/cpu")) -> int:
    """The NUMA node of a logical CPU; 0 where the kernel is silent."""
    nodes = [path.name for path in (system / f"cpu{cpu}").glob("node[0-9]*")]
    return int(nodes[0].removeprefix("node")) if nodes else 0


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core_of(cpu: int, system: Path = Path("/sys/devices/system/cpu")) -> str:
    """A name for the physical core of a logical CPU; each its own where the kernel is silent."""
    topology = system / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        try:
            return (topology / name).read_text().strip()
        except OSError:
            continue
    return str(cpu)


def _cgroup_cpus(membership: Path, mount: Path) -> float | None:
    """The tightest CPU quota on the way from this process's cgroup to the root, in CPUs."""
    quotas = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            folder = mount / path.lstrip("/")
        elif "cpu" in controllers.split(","):
            folder = mount / "cpu" / path.lstrip("/")
        else:
            continue
        # inside a container the path may name what only the host can see: its parents remain
        for place in (folder, *folder.parents):
            quotas.append(_quota_of(place))
            if place == mount:
                break
    limits = [quota for quota in quotas if quota is not None]
    return min(limits) if limits else None


def _quota_of(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period_us if quota > 0 else None
