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
    started = time.perf_counter()
    nbytes = _Readers(descriptor, order, started + seconds).run()
    elapsed = time.perf_counter() - started
    if not direct:
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return ReadRate(nbytes / elapsed, nbytes, elapsed, direct)


class _Readers:
    """Threads that read pieces until there are none, or time is up.

    None of them touches the descriptor when `run` has ended, by Ctrl-C too. Thread.join and ThreadPoolExecutor do not
    hold that: interrupted, the one takes a thread for ended that still reads, the other forgets one that just starts.
    """

    def __init__(self, descriptor: int, pieces: Iterator[int], until: float) -> None:
        self._descriptor, self._pieces, self._until = descriptor, pieces, until
        self._state = threading.Condition()
        self._stop = False
        self._active = self._ended = self._nbytes = 0
        self._problem: OSError | None = None

    def run(self) -> int:
        """Bytes that were read. Raises the first OSError."""
        try:
            for number in range(_THREADS):
                threading.Thread(target=self._work, name=f"disk-{number}", daemon=True).start()
            with self._state:
                self._state.wait_for(lambda: self._ended == _THREADS)
        finally:
            with self._state:
                self._stop = True
                self._state.wait_for(lambda: not self._active)
        if self._problem is not None:
            raise self._problem
        return self._nbytes

    def _work(self) -> None:
        with self._state:
            self._active += 1
        try:
            with mmap.mmap(-1, PIECE) as memory:  # on a page's boundary, as reads past the cache need it
                while (piece := self._next()) is not None:
                    nbytes = os.preadv(self._descriptor, [memory], piece * PIECE)
                    with self._state:
                        self._nbytes += nbytes
        except OSError as error:
            self._problem = self._problem or error
        finally:
            with self._state:
                self._active -= 1
                self._ended += 1
                self._state.notify_all()

    def _next(self) -> int | None:
        with self._state:
            return None if self._stop or time.perf_counter() >= self._until else next(self._pieces, None)
