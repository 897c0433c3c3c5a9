"""Packs without a model, for tests of the files: sections of a few records, whose bytes are their numbers."""

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.pack_layout import PackPlan
from moe_offload.transfer.pack_writer import PackWriter

EXPERTS = ExpertRecord(32, 32, "int8", bias=True)
PLAN = PackPlan.plan(
    "0123456789abcdef",
    [("layers.0", EXPERTS, 3), ("layers.1", ExpertRecord(32, 64, "int4", gated=False), 2),
     ("lm_head", PackedMatrix(33, 32, "int8"), 1)],
)  # fmt: skip
Report = Callable[[int, int], None]


def content(section: int, index: int) -> np.ndarray:
    return np.full(PLAN.sections[section].record_bytes, 16 * section + index + 1, np.uint8)


class Conversion:
    """Stands for the conversion of a model; `done` lists the sections that were written. May be told to stop before a
    section.
    """

    def __init__(self, stop_at: str = "", error: BaseException | None = None) -> None:
        self.done: list[str] = []
        self._stop_at, self._error = stop_at, error

    def __call__(self, writer: PackWriter, report: Report) -> None:
        for number, section in enumerate(PLAN.sections):
            if section.name in writer.finished:
                continue
            crcs = [writer.write(section, index, content(number, index)) for index in range(section.count)]
            if section.name == self._stop_at and self._error is not None:
                raise self._error
            writer.finish_section(section, crcs)
            self.done.append(section.name)
            report(number, len(PLAN.sections))


def check(pack: ExpertPack) -> None:
    """Every byte is where the plan says, and the addresses lead to it."""
    for number, section in enumerate(PLAN.sections):
        for index in range(section.count):
            assert np.array_equal(pack.record(section.name, index), content(number, index))
    table = pack.table("layers.0")
    first = pack.record("layers.0", 0).ctypes.data
    assert table.shape == (3, 6) and table[0].tolist() == [first + each for each in EXPERTS.offsets]
    assert np.all(np.diff(table, axis=0) == EXPERTS.nbytes)
    assert not pack.table("layers.1")[:, [0, 3, 4, 5]].any()
    pack.close()


ALL = [section.name for section in PLAN.sections]


def read_only(real: Callable[..., int]) -> Callable[..., int]:
    """`os.open` on media that cannot be written to."""

    def opened(path: Any, flags: int, *rest: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest)

    return opened
