"""Writing a pack so that nothing is lost and nothing half-made is ever taken for whole.

    NAME.partial   the file to be, its header still empty
    NAME.journal   first line: what is being made; then a line for every finished section, with its checksums

A section's bytes are on disk (fsync) before its line is in the journal. Whoever comes after a kill, a full disk or a
power cut goes on behind the last line. When all sections are there the header is written and the file renamed to NAME.

One process at a time: the caller holds a lock.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.transfer.pack_layout import VERSION, PackPlan, Section, format_crcs, parse_crcs

_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


def partial_path(path: Path) -> Path:
    """Where the pack `path` is while it is being written."""
    return path.with_name(path.name + ".partial")


def journal_path(path: Path) -> Path:
    """Where the finished sections of the pack `path` are listed."""
    return path.with_name(path.name + ".journal")


class PackWriter:
    """Writes the pack of `plan` to `path`, or goes on with what is there of it.

    Every method raises OSError as the file system does; what is finished by then stays.
    """

    def __init__(self, path: Path, plan: PackPlan) -> None:
        self.path, self.plan = path, plan
        empty = {section.name: (0,) * section.count for section in plan.sections}
        digest = hashlib.sha256(plan.header(empty)).hexdigest()
        self._title = {"version": VERSION, "key": plan.key, "plan": digest}
        self._checksums = self._resume()
        self._file = os.open(partial_path(path), os.O_RDWR | os.O_CREAT | _CLOEXEC, 0o644)
        self._journal = -1
        try:
            if not self._checksums:
                os.ftruncate(self._file, 0)
            self._open_journal()
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> frozenset[str]:
        """Names of the sections that need not be written again."""
        return frozenset(self._checksums)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be written."""
        return sum(section.nbytes for section in self.plan.sections if section.name not in self._checksums)

    def write(self, section: Section, index: int, record: NDArray[np.uint8]) -> int:
        """Write one record; several threads may. Returns its checksum, for `finish_section`."""
        if record.nbytes != section.record_bytes:
            raise ValueError(f"a record of {section.name} has {section.record_bytes} bytes, got {record.nbytes}")
        content, at = record.data, self.plan.position(section, index)
        while content:
            count = os.pwrite(self._file, content, at)
            content, at = content[count:], at + count
        return zlib.crc32(record.data)

    def finish_section(self, section: Section, checksums: list[int]) -> None:
        """All records of `section` are written: make sure of it, and note it down."""
        os.fsync(self._file)
        self._note({"section": section.name, "crc": format_crcs(checksums)})
        self._checksums[section.name] = tuple(checksums)

    def finish(self) -> None:
        """Every section is there: make the file a pack."""
        os.pwrite(self._file, self.plan.header(self._checksums), 0)
        os.ftruncate(self._file, self.plan.size)
        os.fsync(self._file)
        os.replace(partial_path(self.path), self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        journal_path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; what is unfinished stays for another writer."""
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = -1

    def _resume(self) -> dict[str, tuple[int, ...]]:
        """What the journal says is finished, as far as it can be trusted."""
        try:
            lines = journal_path(self.path).read_bytes().split(b"\n")[:-1]  # behind the last line end: a torn line
            size = partial_path(self.path).stat().st_size
        except OSError:
            return {}
        entries = [_parse(line) for line in lines]
        if not entries or entries[0] != self._title:
            return {}
        done: dict[str, tuple[int, ...]] = {}
        for section, entry in zip(self.plan.sections, entries[1:], strict=False):
            crcs = parse_crcs(entry.get("crc"), section.count)
            end = self.plan.position(section, section.count - 1) + section.record_bytes
            if entry.get("section") != section.name or crcs is None or end > size:
                break
            done[section.name] = crcs
        return done

    def _open_journal(self) -> None:
        """A journal that holds just what could be trusted, to be appended to."""
        fresh = journal_path(self.path).with_name(self.path.name + ".journal.new")
        self._journal = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _CLOEXEC, 0o644)
        self._note(self._title)
        for name, crcs in self._checksums.items():
            self._note({"section": name, "crc": format_crcs(crcs)})
        os.replace(fresh, journal_path(self.path))

    def _note(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        while line:
            line = line[os.write(self._journal, line) :]
        os.fsync(self._journal)

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
