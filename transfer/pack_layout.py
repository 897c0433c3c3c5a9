"""The file of a pack: a model's weights in the packed layout, as one file to map.

    0             8 bytes  magic
    8             8 bytes  version, little-endian
    16            8 bytes  length N of the header
    24            N bytes  header: JSON, which describes every section and holds the checksum of every record
    multiple of   sections, one behind the other, each from a multiple of 4096 on
    4096

    section       record 0 | record 1 | ...       records of one size, a multiple of 64 bytes

A section holds the routed experts of one layer, a record for each (`ExpertRecord`), or one matrix (`PackedMatrix`).
Offsets in the header count from the first section's begin, so the header's length does not depend on itself; checksums
have a fixed width, so it is known before there is one.

Where everything lies follows from the model and the format: that is the `PackPlan`. A header is compared with the plan
and never believed: what a damaged or malicious file claims cannot become an address.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix

MAGIC = b"MOEPACK\n"
# Raised whenever the layout or what the quantisers write changes: packs of other versions are made anew.
VERSION = 1
PAGE = 4096
_PREFIX = 24
_CRC_DIGITS = 8

# CRC-32 of every record, by the section's name.
Checksums = Mapping[str, Sequence[int]]


class UnusablePackError(ValueError):
    """A file is no pack of this version for these weights; the message says why, to follow the file's name."""


@dataclass(frozen=True, slots=True)
class Section:
    """`count` records; `offset` is that of the first from the begin of the sections, in bytes."""

    name: str
    content: ExpertRecord | PackedMatrix
    count: int
    offset: int

    @property
    def record_bytes(self) -> int:
        return self.content.nbytes

    @property
    def nbytes(self) -> int:
        return self.count * self.record_bytes

    def describe(self) -> dict[str, Any]:
        """What the header says of the section, checksums aside."""
        kind = "experts" if isinstance(self.content, ExpertRecord) else "matrix"
        return {
            "name": self.name, "kind": kind, **asdict(self.content), "count": self.count, "offset": self.offset,
        }  # fmt: skip


@dataclass(frozen=True)
class PackPlan:
    """What a pack holds and where; made by `plan`."""

    key: str  # names the content that the pack is made from
    sections: tuple[Section, ...]

    @classmethod
    def plan(cls, key: str, contents: Iterable[tuple[str, ExpertRecord | PackedMatrix, int]]) -> "PackPlan":
        """Lay out sections (name, content of a record, number of records) in the order given."""
        sections, offset = [], 0
        for name, content, count in contents:
            section = Section(name, content, count, offset)
            sections.append(section)
            offset = _to_page(offset + section.nbytes)
        return cls(key, tuple(sections))

    @cached_property
    def data_start(self) -> int:
        """Offset of the sections in the file."""
        empty = {section.name: (0,) * section.count for section in self.sections}
        return _to_page(_PREFIX + len(self._json(empty)))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        last = self.sections[-1]
        return self.data_start + last.offset + last.nbytes

    def position(self, section: Section, index: int) -> int:
        """Offset of a record in the file."""
        if not 0 <= index < section.count:
            raise IndexError(f"record {index} of {section.count} in {section.name}")
        return self.data_start + section.offset + index * section.record_bytes

    def section(self, name: str) -> Section:
        """The section of that name; KeyError if there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Section]:
        return {section.name: section for section in self.sections}

    def header(self, checksums: Checksums) -> bytes:
        """The first `data_start` bytes of the file."""
        text = self._json(checksums)
        prefix = MAGIC + VERSION.to_bytes(8, "little") + len(text).to_bytes(8, "little")
        return (prefix + text).ljust(self.data_start, b"\0")

    def _json(self, checksums: Checksums) -> bytes:
        sections = [{**each.describe(), "crc": format_crcs(checksums[each.name])} for each in self.sections]
        return json.dumps({"key": self.key, "sections": sections}).encode()

    def read_checksums(self, path: Path) -> dict[str, tuple[int, ...]]:
        """The checksums in the header of the pack at `path`.

        Raises UnusablePackError when the file is anything but a whole pack of this plan, OSError when it cannot be
        read.
        """
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(self.data_start)
        if len(start) < _PREFIX or start[:8] != MAGIC:
            raise UnusablePackError("is no pack")
        version = int.from_bytes(start[8:16], "little")
        if version != VERSION:
            raise UnusablePackError(f"is of version {version}, this program reads {VERSION}")
        end = _PREFIX + int.from_bytes(start[16:24], "little")
        try:
            content = json.loads(start[_PREFIX:end].decode()) if end <= len(start) else None
        except (ValueError, RecursionError):
            content = None
        return self._compare(content, size)

    def _compare(self, content: Any, size: int) -> dict[str, tuple[int, ...]]:
        if not isinstance(content, dict) or not isinstance(content.get("sections"), list):
            raise UnusablePackError("has a damaged header")
        if content.get("key") != self.key:
            raise UnusablePackError("was made from other weights")
        found = content["sections"]
        if len(found) != len(self.sections):
            raise UnusablePackError(f"has {len(found)} sections, expected {len(self.sections)}")
        checksums = {}
        for section, entry in zip(self.sections, found, strict=True):
            crcs = parse_crcs(entry.pop("crc", None), section.count) if isinstance(entry, dict) else None
            if crcs is None or entry != section.describe():
                raise UnusablePackError(f"has a damaged header: section {section.name}")
            checksums[section.name] = crcs
        if size != self.size:
            raise UnusablePackError(f"has {size} bytes, expected {self.size}")
        return checksums


def format_crcs(crcs: Sequence[int]) -> str:
    """Eight hexadecimal digits each, side by side."""
    return "".join(f"{crc:08x}" for crc in crcs)


def parse_crcs(text: object, count: int) -> tuple[int, ...] | None:
    """Inverse of `format_crcs`; None for anything but `count` checksums."""
    if not isinstance(text, str) or len(text) != _CRC_DIGITS * count or re.fullmatch("[0-9a-f]*", text) is None:
        return None
    return tuple(int(text[at : at + _CRC_DIGITS], 16) for at in range(0, len(text), _CRC_DIGITS))


def _to_page(count: int) -> int:
    return (count + PAGE - 1) // PAGE * PAGE
