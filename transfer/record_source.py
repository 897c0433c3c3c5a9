"""Where the records of experts come from: the disk tier of the expert store."""

import errno
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.pack_layout import Section, UnusablePackError


class RecordSource(Protocol):
    """One record of bytes for every routed expert; the records of a layer have one size. Any thread may read."""

    @property
    def num_experts(self) -> int:
        """E: experts 0 to E - 1 in every layer."""

    def record_bytes(self, layer: int) -> int: ...

    def read_into(self, layer: int, expert: int, out: NDArray[np.uint8]) -> None:
        """Fill out [record_bytes]. An error leaves it in any state."""

    def will_need(self, layer: int, expert: int) -> None:
        """Have the operating system read ahead. A hint: returns at once and raises nothing."""


class PackSource:
    """The records of a pack; `names` gives the section of every layer.

    They are read through a descriptor, not from the mapping: a bad sector is an OSError there, and under a mapping the
    end of the process. The page cache behind both is one.

    Raises UnusablePackError when another file lies at the pack's path by now, OSError when it cannot be read,
    ValueError when sections differ in their number of experts or hold none.
    """

    def __init__(self, pack: ExpertPack, names: Mapping[int, str]) -> None:
        self._plan = pack.plan
        self._sections = {layer: pack.plan.section(name) for layer, name in names.items()}
        for section in self._sections.values():
            if not isinstance(section.content, ExpertRecord):
                raise ValueError(f"{section.name} is a matrix, not a layer of experts")
        counts = {section.count for section in self._sections.values()}
        if len(counts) != 1:
            raise ValueError(f"layers must have one number of experts, got {sorted(counts)}")
        (self.num_experts,) = counts
        self._descriptor = os.open(pack.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        try:
            header = pack.plan.header(pack.checksums)  # names every record by its checksum
            if os.pread(self._descriptor, len(header), 0) != header:
                raise UnusablePackError("was replaced")
        except BaseException:
            self.close()
            raise

    def record_bytes(self, layer: int) -> int:
        return self._sections[layer].record_bytes

    def read_into(self, layer: int, expert: int, out: NDArray[np.uint8]) -> None:
        section = self._sections[layer]
        if out.shape != (section.record_bytes,):
            raise ValueError(f"a record of {section.record_bytes} bytes does not go into {out.shape}")
        # From a cold disk, 2 MB at once: without it the system reads 128 KB at a time, in turn with the copying.
        self.will_need(layer, expert)
        at, done, view = self._position(section, expert), 0, out.data
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], at + done)
            if count == 0:
                raise OSError(errno.EIO, f"the pack ends within {section.name}, expert {expert}")
            done += count

    def will_need(self, layer: int, expert: int) -> None:
        section = self._sections[layer]
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                position = self._position(section, expert)
                os.posix_fadvise(self._descriptor, position, section.record_bytes, os.POSIX_FADV_WILLNEED)

    def _position(self, section: Section, expert: int) -> int:
        return self._plan.position(section, expert)

    def close(self) -> None:
        """Close the descriptor, which nobody reads from any more. Harmless when done twice."""
        self._closer()
