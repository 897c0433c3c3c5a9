"""How fast a folder's disk is read: pieces of the size of experts, from all over a file, by a few threads at once.

Measured on a large file that lies there, else on a temporary one without a name, which the system removes whatever
happens to this process. The page cache must not answer: where the file system allows it reads go past it (O_DIRECT),
so that a model's cached pages stay; elsewhere the file's pages are dropped first.
"""

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PIECE = 4 << 20
LEAST_FILE = 256 << 20  # smaller files may lie in a disk's own cache
_THREADS = 4
_MOST_BYTES = 2 << 30  # read
_TEMPORARY_BYTES = 256 << 20  # written, by a disk that writes them in time


@dataclass(frozen=True, slots=True)
class ReadRate:
    """`rate`: bytes a second. `direct`: past the page cache."""

    rate: float
    nbytes: int
    seconds: float
    direct: bool


def measure_read(folder: Path, file: Path | None = None, seconds: float = 1.0) -> ReadRate:
    """Of `file`, or of a temporary one in `folder`. Takes `seconds`, twice that where there is no file.

    Raises OSError with the reason, also where there is no room for a temporary file.
    """
    if file is not None:
        with _opened(file) as (descriptor, direct):
            return _read(descriptor, direct, seconds)
    with _temporary(folder, seconds) as written:
        # opened anew by its descriptor: it has no name
        with _opened(Path(f"/proc/self/fd/{written}")) as (descriptor, direct):
            return _read(descriptor, direct, seconds)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[int, bool]]:
    """The file's descriptor, and whether it goes past the page cache."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        descriptor, direct = os.open(file, flags | os.O_DIRECT), True
    except OSError:  # tmpfs and some network file systems refuse
        descriptor, direct = os.open(file, flags), False
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield descriptor, direct
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(folder: Path, seconds: float) -> Iterator[int]:
    """A file of random bytes, all of it on the disk: as much as is written in `seconds`."""
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < 4 * _TEMPORARY_BYTES:
        raise OSError("too little free space for a temporary file")
    noise = np.random.default_rng(0)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        until, size = time.perf_counter() + seconds, 0
        while not size or (size < _TEMPORARY_BYTES and time.perf_counter() < until):
            size += file.write(noise.bytes(PIECE))
            os.fdatasync(file.fileno())
        yield file.fileno()


def _read(descriptor: int, direct: bool, seconds: float) -> ReadRate:
    pieces = os.fstat(descriptor).st_size // PIECE
    if not pieces:
        raise OSError(f"a file of less than {PIECE} bytes")
    # in an order that no disk foresees, each piece once: what was read may be kept somewhere below
    order = iter(np.random.default_rng(0).permutation(pieces)[: _MOST_BYTES // PIECE].tolist())
    turn, stop = threading.Lock(), threading.Event()
    started = time.perf_counter()
    until = started + seconds

    def work() -> int:
        done = 0
        with mmap.mmap(-1, PIECE) as memory:  # on a page's boundary, as reads past the cache need it
            while not stop.is_set() and time.perf_counter() < until:
                with turn:
                    piece = next(order, None)
                if piece is None:
                    break
                done += os.preadv(descriptor, [memory], piece * PIECE)
        return done

    # not Thread.join: interrupted by Ctrl-C it takes a thread for ended that still reads
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="disk") as pool:
        try:
            nbytes = sum(share.result() for share in [pool.submit(work) for _ in range(_THREADS)])
        finally:
            stop.set()
    elapsed = time.perf_counter() - started
    if not direct:
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return ReadRate(nbytes / elapsed, nbytes, elapsed, direct)
