"""Packs on disk: found, checked, or made once by one process while others wait.

    MODEL-int4-0123456789abcdef.pack             the pack; the digits name what it was made from
                                    .verified    size, time and inode of the file whose checksums were found right
                                    .lock        held (flock) by the process that makes the pack
                                    .partial     unfinished, with its .journal: see transfer/pack_writer.py

The linears outside of the experts have packs of their own, MODEL-dense-int8-... A pack that is damaged or of another
version costs a conversion, never the load.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from moe_offload.memory import format_bytes
from moe_offload.models.errors import PackError
from moe_offload.options import Progress
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.pack_layout import PackPlan, UnusablePackError
from moe_offload.transfer.pack_writer import PackWriter, partial_path

logger = logging.getLogger(__name__)

_POLL = 0.1  # seconds between looks at another process's lock
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

# Writes what the writer lacks: (writer, progress(bytes done, bytes to do)).
Convert = Callable[[PackWriter, Callable[[int, int], None]], None]


def default_folder() -> Path:
    """Where packs are kept when no folder is given."""
    return Path(platformdirs.user_cache_dir("moe-offload")) / "packs"


def pack_path(folder: Path, model_type: str, weights: str, plan: PackPlan) -> Path:
    """Where the pack of `plan` is, or would be."""
    return folder / f"{model_type}-{weights}-{plan.key[:16]}.pack"


@dataclass(frozen=True, slots=True)
class PackCache:
    """The place of one pack.

    threads: how many check it. progress: called with (what, bytes done, bytes in all). holds: what is in it, for those
    who read of it.
    """

    path: Path
    plan: PackPlan
    threads: int = 1
    progress: Progress | None = None
    holds: str = "experts"

    def open(self, convert: Convert, *, trust: bool = True) -> ExpertPack:
        """The pack, made by `convert` if it is not there or cannot be used.

        Its checksums are compared before its first use; and again if not `trust`.

        Raises PackError when it cannot be made here, and what `convert` raises.
        """
        try:
            pack = self._usable(trust)
            if pack is not None:
                return pack
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pack = self._usable(trust)  # another process may have made it meanwhile
                if pack is None:
                    self._make(convert)
                    pack = self._usable(trust=False)
        except OSError as error:
            raise self._problem(error) from error
        if pack is None:
            raise PackError(
                f"{self.path} does not read back as it was written: the disk or the memory of this machine is failing; "
                "give another folder (pack_dir, --pack-dir)"
            )
        return pack

    def is_there(self) -> bool:
        """Whether a whole pack lies here, going by its header alone."""
        try:
            self.plan.read_checksums(self.path)
        except (UnusablePackError, OSError):
            return False
        return True

    def _usable(self, trust: bool) -> ExpertPack | None:
        try:
            pack = ExpertPack(self.path, self.plan)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnusablePackError as error:
            logger.warning("%s %s: the %s are converted again", self.path, error, self.holds)
            return None
        if trust and self._stamped():
            return pack
        stamp = self._stamp()
        try:
            damaged = pack.find_damage(self.threads, self._report("checking the pack"))
        except BaseException:
            pack.close()
            raise
        if damaged is None:
            self._write_stamp(stamp)
            return pack
        logger.warning("%s is damaged at %s: the %s are converted again", self.path, damaged, self.holds)
        pack.close()
        return None

    def _make(self, convert: Convert) -> None:
        """Write the pack, or go on with it. The lock is held."""
        self.path.unlink(missing_ok=True)  # of no use to anyone, and its space may be needed
        with PackWriter(self.path, self.plan) as writer:
            free = shutil.disk_usage(self.path.parent).free
            if writer.missing_bytes > free:
                raise self._too_small(writer.missing_bytes, free)
            started = time.perf_counter()
            convert(writer, self._report(f"converting {self.holds}"))
            writer.finish()
        seconds = time.perf_counter() - started
        logger.info("wrote %s, %s, in %.1f s", self.path, format_bytes(self.plan.size), seconds)

    def _report(self, what: str) -> Callable[[int, int], None]:
        progress = self.progress
        return lambda done, total: progress(what, done, total) if progress is not None else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that would write this pack; waits for the one that does."""
        descriptor = os.open(self._beside(".lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            waiting = False
            while not _try_lock(descriptor):
                if not waiting:
                    logger.warning("another process is converting these %s: waiting for its %s", self.holds, self.path)
                waiting = True
                if self.progress is not None:
                    done = _size(partial_path(self.path))
                    self.progress(f"waiting for another process to convert the {self.holds}", done, self.plan.size)
                time.sleep(_POLL)
            yield
        finally:
            os.close(descriptor)  # and with it the lock

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _stamp(self) -> dict[str, int]:
        status = self.path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}

    def _stamped(self) -> bool:
        try:
            return bool(json.loads(self._beside(".verified").read_bytes()) == self._stamp())
        except (OSError, ValueError, RecursionError):
            return False

    def _write_stamp(self, stamp: dict[str, int]) -> None:
        target, fresh = self._beside(".verified"), self._beside(f".verified.{os.getpid()}")
        try:
            fresh.write_text(json.dumps(stamp))
            os.replace(fresh, target)
        except OSError as error:
            logger.info("the next load will check %s again: %s", self.path, error)

    def _problem(self, error: OSError) -> PackError:
        folder = self.path.parent
        if error.errno in _NO_SPACE:
            missing = max(self.plan.size - _size(partial_path(self.path)), 0)
            return self._too_small(missing, shutil.disk_usage(folder).free)
        return PackError(
            f"the converted {self.holds} ({format_bytes(self.plan.size)}) cannot be kept in {folder}: "
            f"{error.strerror or error}; give a folder that can be written to (pack_dir, --pack-dir)"
        )

    def _too_small(self, missing: int, free: int) -> PackError:
        return PackError(
            f"{self.path.parent} is full: the converted {self.holds} still need {format_bytes(missing)} there, and "
            f"{format_bytes(free)} are free. Make room and load again, which goes on where this stopped, or give "
            "another folder (pack_dir, --pack-dir)"
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.info("this file system has no locks (%s): two processes could make the same pack", error)
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
