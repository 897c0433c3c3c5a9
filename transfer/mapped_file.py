"""A file mapped read-only: the disk tier of the expert store.

The kernel's page cache is the only copy of the bytes. Mapped pages are file-backed, so they count as shared memory,
not as the process's own (RssAnon), and the operating system may drop and re-read them under memory pressure.

Lifetime: addresses and arrays taken from a `MappedFile` are valid until `close()`. NumPy views hold an export of
the map, so `close()` with a live view raises `BufferError`; raw addresses are not guarded, their user (the engine)
stops first.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE


class MappedFile:
    """`path` mapped read-only, with its address and read-ahead of ranges.

    Raises OSError if the file cannot be opened, ValueError if it is empty (an empty file cannot be mapped).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        # Experts are runs of megabytes at places that the router picks. Huge pages make a miss read 2 MB at once
        # and map them with one fault. MADV_RANDOM, the obvious advice, reads single pages: 12.3 s to a first token
        # from a cold disk against 1.5 s with this (4.8 GB of experts, 8 prompt tokens).
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages for files: its ordinary read-ahead is nearly as good
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @property
    def address(self) -> int:
        """Address of the file's first byte."""
        return int(self._bytes.ctypes.data)

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return int(self._bytes.size)

    def bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        """A read-only view of `count` bytes from `offset`; IndexError when it reaches outside of the file."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise IndexError(f"bytes {offset}..{offset + count} of a file of {self.size} bytes")
        return self._bytes[offset : offset + count]

    def will_need(self, offset: int, count: int) -> None:
        """Ask the operating system to read a range ahead; returns at once."""
        if count <= 0 or not hasattr(mmap, "MADV_WILLNEED"):
            return
        start = offset // PAGE * PAGE
        self._map.madvise(mmap.MADV_WILLNEED, start, min(offset + count, self.size) - start)

    def close(self) -> None:
        """Unmap. Raises BufferError while a view of the bytes is alive."""
        self._bytes = np.empty(0, np.uint8)
        try:
            self._map.close()
        except BufferError:
            self._bytes = np.frombuffer(self._map, np.uint8)
            raise

    def __enter__(self) -> "MappedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
