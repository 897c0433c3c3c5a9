"""The header of a safetensors file, read with every claim checked before anyone relies on it.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length N, then N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data; offsets count from the end of the header.
Kernels later read at `address + offset` without a bounds check of their own, so a header that lies must die here:
offsets must lie in the file, agree with shape times item size, and tile the data without overlap or hole.
"""

import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_offload.models.errors import CheckpointError

# The limit of the reference implementation; a bigger header is an attack or an accident.
MAX_HEADER_BYTES = 100_000_000

# torch's limit; a product of more sizes than that would also take its time.
MAX_DIMENSIONS = 64

# A message is one line, whatever the file says: names whole, but no list of a million sizes.
_repr = reprlib.Repr()
_repr.maxstring = 200
_shown = _repr.repr

# Bits per element. Sub-byte types are packed.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one tensor lies: `nbytes` bytes at `offset` (from the file's first byte) of `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorRecord]:
    """All tensors of the safetensors file at `path`, by name. Raises CheckpointError for whatever is wrong with the
    file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _parse_json(path, file, size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    records = {name: _record(path, name, entry, data_start, size - data_start) for name, entry in header.items()}
    _check_tiling(path, records, data_start, size)
    return records


def _parse_json(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: download it again")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, but the file holds {size - 8} after its first 8 "
            f"(and {MAX_HEADER_BYTES} is the most allowed): the file is truncated or not safetensors, download it again"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _record(path: Path, name: str, entry: Any, data_start: int, data_size: int) -> TensorRecord:
    where = f"{path}: tensor {_shown(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by a JSON {type(entry).__name__}, not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has dtype {_shown(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{where} has shape {_shown(shape)}, not a list of at most {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{where} has data_offsets {_shown(offsets)}, not [begin, end]")
    begin, end = offsets
    if not begin <= end <= data_size:
        raise CheckpointError(
            f"{where} claims bytes {begin}..{end}, but the file has {data_size} bytes of data: "
            "it is truncated or damaged, download it again"
        )
    # Python's integers do not overflow, so a product of huge sizes cannot wrap around to a plausible one.
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        raise CheckpointError(
            f"{where} of shape {_shown(shape)} in {dtype} needs {bits // 8} bytes, but its offsets span {end - begin}"
        )
    return TensorRecord(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _check_tiling(path: Path, records: dict[str, TensorRecord], data_start: int, size: int) -> None:
    """Tensors must cover the data exactly: no overlap, no hole, nothing behind the last."""
    expected = data_start
    for record in sorted(records.values(), key=lambda r: (r.offset, r.nbytes)):
        if record.offset != expected:
            kind = "overlaps the one before it" if record.offset < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {_shown(record.name)} at byte {record.offset} {kind} (expected byte {expected})"
            )
        expected += record.nbytes
    if expected != size:
        raise CheckpointError(
            f"{path} has {size} bytes, but its header describes {expected}: it is damaged, download it again"
        )
