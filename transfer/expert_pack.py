"""A finished pack, mapped: addresses of experts for the kernels, and the check of every byte."""

import os
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.transfer.mapped_file import MappedFile
from moe_offload.transfer.pack_layout import PackPlan, Section, UnusablePackError

_CHUNK = 8 << 20  # bytes read at once by a thread that checks


class ExpertPack:
    """The pack of `plan` at `path`.

    Addresses and views are valid until `close()`.

    Raises UnusablePackError when the file is not a whole pack of this plan, OSError when it cannot be read.
    """

    def __init__(self, path: Path, plan: PackPlan) -> None:
        self.path, self.plan = path, plan
        self.checksums = plan.read_checksums(path)
        self._mapped = MappedFile(path)
        if self._mapped.size != plan.size:  # another file was put there since
            self._mapped.close()
            raise UnusablePackError("is being replaced")

    def table(self, name: str) -> NDArray[np.int64]:
        """[E, 6]: addresses of gate, up, down and their f32 biases of every expert of a layer; 0 where absent."""
        section = self.plan.section(name)
        record = section.content
        if not isinstance(record, ExpertRecord):
            raise ValueError(f"{name} is a matrix, not a layer of experts")
        first = self._mapped.address + self.plan.position(section, 0)
        starts = first + np.arange(section.count, dtype=np.int64) * section.record_bytes
        gated, bias = record.gated, record.bias
        present = np.array([gated, True, True, gated and bias, bias, bias])
        addresses: NDArray[np.int64] = (starts[:, None] + np.array(record.offsets, np.int64)) * present
        return addresses

    def record(self, name: str, index: int) -> NDArray[np.uint8]:
        """The bytes of one record: an expert, or (index 0) a matrix."""
        section = self.plan.section(name)
        return self._mapped.bytes(self.plan.position(section, index), section.record_bytes)

    def find_damage(self, threads: int, progress: Callable[[int, int], None] | None = None) -> str | None:
        """Read everything and compare checksums: progress(bytes done, bytes in all). Names the first damaged record
        met; None where there is none.
        """
        total = sum(section.nbytes for section in self.plan.sections)
        jobs = iter([(section, index) for section in self.plan.sections for index in range(section.count)])
        done = 0
        # read through a descriptor: a bad sector under a mapping would kill the process
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        try:
            running: dict[Future[bool], tuple[Section, int]] = {}
            while True:
                while len(running) < 2 * threads and (job := next(jobs, None)) is not None:
                    running[pool.submit(self._is_intact, descriptor, *job)] = job
                if not running:
                    return None
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    section, index = running.pop(future)
                    if not future.result():
                        what = f", expert {index}" if isinstance(section.content, ExpertRecord) else ""
                        return f"{section.name}{what}"
                    done += section.record_bytes
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(descriptor)

    def _is_intact(self, descriptor: int, section: Section, index: int) -> bool:
        at, left, crc = self.plan.position(section, index), section.record_bytes, 0
        while left:
            try:
                chunk = os.pread(descriptor, min(left, _CHUNK), at)
            except OSError:
                return False
            if not chunk:
                return False
            crc = zlib.crc32(chunk, crc)
            at, left = at + len(chunk), left - len(chunk)
        return crc == self.checksums[section.name][index]

    def close(self) -> None:
        """Unmap. Raises BufferError while a view is alive."""
        self._mapped.close()
