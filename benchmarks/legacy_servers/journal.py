"""Cells that are done, a JSON line each, so that a run that was interrupted goes on where it was.

A line counts as long as the code that made it is the same: its version is a hash of every source file that a cell's
figures depend on. A line that cannot be read, such as the last one of a run that was killed, counts as none.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from benchmarks.legacy_servers.settings import Cell
from benchmarks.legacy_servers.simulated import Outcome
from benchmarks.reporting import WORK

JOURNAL = WORK / "legacy_servers.jsonl"
_ROOT = Path(__file__).parents[2]
_SOURCES = (
    "transfer/*.py", "moe_offload/scheduling/*.py", "moe_offload/prefetch*.py", "moe_offload/dispatch*.py",
    "moe_offload/copies.py", "cpu_kernels/packed_layout.py", "benchmarks/servers/*.py",
    "benchmarks/prefetch/simulation.py",
    *(f"benchmarks/legacy_servers/{name}.py" for name in ("bound", "contestants", "recall", "settings", "simulated")),
)  # fmt: skip


@cache
def code_version(root: Path = _ROOT) -> str:
    """Of what the figures come from."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Journal:
    """A file of outcomes of one code version; lines of others stay."""

    def __init__(self, path: Path = JOURNAL, version: str | None = None) -> None:
        self._path = path
        self._version = code_version() if version is None else version

    def read(self) -> dict[str, Outcome]:
        """By key of the cell."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["version"] == self._version:
                    outcome = Outcome.from_dict(entry["outcome"])
                    found[outcome.cell.key] = outcome
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def add(self, outcome: Outcome) -> None:
        """One more, on the disk when it returns. A torn line before it ends here."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"version": self._version, "outcome": outcome.to_dict()})
        with self._path.open("a+b") as file:
            torn = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write((("\n" if torn else "") + line + "\n").encode())


def missing(cells: list[Cell], done: dict[str, Outcome]) -> list[Cell]:
    """Those to run, the long ones first: two workers then end together."""
    return sorted((cell for cell in cells if cell.key not in done), key=lambda cell: -cell.effort)
