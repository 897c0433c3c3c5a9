"""The disks of models and of converted weights, as `moe-offload doctor` finds them."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from moe_offload.doctor_files import read_number
from moe_offload.pack_cache import default_folder
from moe_offload.transfer.disk_rate import LEAST_FILE, measure_read

_NETWORK = (
    "nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "afs", "9p", "sshfs", "s3", "gcs", "rclone",
    "juicefs", "davfs", "blobfuse", "goofys", "mfs", "ocfs2", "orangefs", "pvfs", "wekafs",
)  # fmt: skip
_MOST_NAMES = 5000  # looked at, for a large file
MODELS, PACKS = "models", "converted weights"


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """`folders`: (what lies there, where), also those that do not exist yet. Sizes in bytes, rates in bytes a second;
    None: not known.

    `network`, `in_memory`, `overlay`: the kind of file system, `rotates`: a hard disk. `direct`: measured past the
    page cache.
    """

    folders: tuple[tuple[str, str], ...]
    filesystem: str = ""
    source: str = ""
    total: int | None = None
    free: int | None = None
    writable: bool = True
    rotates: bool | None = None
    read_rate: float | None = None
    direct: bool | None = None
    read_error: str | None = None

    @property
    def network(self) -> bool:
        """Whether another machine answers."""
        return self.filesystem.removeprefix("fuse.").startswith(_NETWORK)

    @property
    def in_memory(self) -> bool:
        return self.filesystem in ("tmpfs", "ramfs")

    @property
    def overlay(self) -> bool:
        """A container's own layer: gone with the container."""
        return self.filesystem in ("overlay", "fuse-overlayfs", "fuse.fuse-overlayfs", "aufs")


def detect_disks(root: Path = Path("/"), measure: bool = True) -> tuple[DiskFacts, ...]:
    """One for each file system that holds models or packs; measured in a second or two each. Never raises."""
    found: dict[int, DiskFacts] = {}
    for holds, folder in ((MODELS, hub_folder()), (PACKS, default_folder())):
        place = _existing(folder)
        try:
            device = place.stat().st_dev
        except OSError:
            continue
        facts = found[device] if device in found else _look(place, device, root)
        writable = facts.writable and os.access(place, os.W_OK)
        found[device] = replace(facts, folders=(*facts.folders, (holds, str(folder))), writable=writable)
    return tuple(_measured(facts) if measure else facts for facts in found.values())


def hub_folder() -> Path:
    """Where the Hub's client keeps models."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE)
    except Exception:  # not installed, or damaged: then it keeps nothing
        return Path.home() / ".cache/huggingface/hub"


def _look(place: Path, device: int, root: Path) -> DiskFacts:
    filesystem, source = mount_of(place, root / "proc/self/mountinfo")
    total: int | None = None
    free: int | None = None
    with suppress(OSError):
        usage = shutil.disk_usage(place)
        total, free = usage.total, usage.free
    block = (root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return DiskFacts((), filesystem, source, total, free, True, _rotates(block))


def _rotates(block: Path) -> bool | None:
    """A partition's disk is the folder above it. Virtual disks say yes whatever they are made of."""
    if "/virtio" in str(block) or "/vbd-" in str(block):
        return None
    known = (read_number(folder / "queue/rotational") for folder in (block, block.parent))
    return next((bool(each) for each in known if each is not None), None)


def _measured(facts: DiskFacts) -> DiskFacts:
    if facts.in_memory:
        return facts
    folders = [Path(folder) for _, folder in facts.folders]
    try:
        file = next((found for folder in folders if (found := large_file(folder)) is not None), None)
        rate = measure_read(_existing(folders[0]), file)
    except Exception as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return replace(facts, read_error=problem)
    return replace(facts, read_rate=rate.rate, direct=rate.direct)


def mount_of(place: Path, mounts: Path) -> tuple[str, str]:
    """File system and what it is on ("ext4", "/dev/sda1"); empty where the system is silent."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
        path = str(place.resolve())
    except OSError:
        return "", ""
    best, found = -1, ("", "")
    for line in lines:
        before, dash, after = line.partition(" - ")
        words, behind = before.split(" "), after.split(" ")
        if not dash or len(words) < 5 or len(behind) < 2:
            continue
        point = _unescaped(words[4])
        inside = point == "/" or path == point or path.startswith(f"{point}/")
        if inside and len(point) >= best:  # a later mount hides an earlier one
            best, found = len(point), (behind[0], _unescaped(behind[1]))
    return found


def large_file(folder: Path) -> Path | None:
    """The largest one below, of those that can be read; not everything is looked at."""
    best, size = None, LEAST_FILE - 1
    for file in islice(_files(folder, 4), _MOST_NAMES):
        try:
            nbytes = file.stat().st_size
        except OSError:
            continue
        if nbytes > size and os.access(file, os.R_OK):
            best, size = file, nbytes
    return best


def _files(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        elif depth and entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), depth - 1)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return place
    return Path("/")


def _unescaped(name: str) -> str:
    """Mount points have blanks as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)
