"""A limit on a process's memory that the kernel holds: a Linux control group, where this user may make one.

What counts is the group's private memory and the file pages it was the first to read; the rest of the limit serves as
page cache. Pages that lie in the cache from before count for nobody: drop them first (`evict`).
"""

import os
from pathlib import Path

_VERSIONS = (
    # root, limit, greatest usage
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)


class ControlGroup:
    """A group of its own below the root, for processes that are given to it; a context manager that removes it.

    Its processes must have ended by then. Raises OSError where groups cannot be made.
    """

    def __init__(self, name: str) -> None:
        root, self._limit, self._peak = next(
            (version for version in _VERSIONS if (version[0] / "cgroup.procs").is_file()), _VERSIONS[-1]
        )
        self._folder = root / f"{name}-{os.getpid()}"
        self._folder.mkdir()
        if not (self._folder / self._limit).is_file():
            self._folder.rmdir()
            raise FileNotFoundError(f"{root} does not control memory")

    def __enter__(self) -> "ControlGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.rmdir()

    def add(self, pid: int) -> None:
        """Put a process into the group; what it has allocated before stays where it was counted."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def limit(self, count: int) -> None:
        """Allow `count` bytes. Pages that can be given back are; raises OSError when the rest is more."""
        (self._folder / self._limit).write_text(str(count))

    def reset_peak(self) -> None:
        """Measure the greatest usage from here on, where the kernel can start anew."""
        (self._folder / self._peak).write_text("0")

    def peak(self) -> int:
        """Greatest usage in bytes, page cache included."""
        return int((self._folder / self._peak).read_text())


def evict(folder: Path) -> None:
    """Drop the clean pages of all files below `folder` from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # dirty pages cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
