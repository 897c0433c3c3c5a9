"""Safetensors files that are written as a stream and mapped when read, every claim of their headings checked.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON `{name: {"dtype",
"shape", "data_offsets": [begin, end]}, "__metadata__": {...}}`, then the data; offsets count from the end of the JSON.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

DTYPES: Mapping[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"), "I8": np.dtype("i1"),
}  # fmt: skip
_MOST_HEADER = 1 << 20  # ours have a few KB
_MOST_DIMENSIONS = 8

Specs = Mapping[str, tuple[str, tuple[int, ...]]]  # by name: safetensors type and shape
Tensors = dict[str, NDArray[Any]]


def map_tensors(path: Path) -> tuple[dict[str, str], Tensors]:
    """Metadata, and every tensor as a read-only view of the file.

    Raises ValueError for whatever is wrong with the file, OSError when it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not texts")
    entries = {name: _entry(name, entry, size - start) for name, entry in header.items()}
    expected = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != expected:
            raise ValueError(f"tensor {name[:99]!r} begins at byte {begin} of the data instead of {expected}")
        expected = end
    if start + expected != size:
        raise ValueError(f"it has {size} bytes, its heading describes {start + expected}")
    data = np.memmap(path, np.uint8, "r", start, (size - start,)) if size > start else np.empty(0, np.uint8)
    if len(data) != size - start:
        raise ValueError("it is being replaced")
    tensors: Tensors = {
        name: np.asarray(data[begin:end]).view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in entries.items()
    }
    return metadata, tensors


def write_tensors(
    path: Path, specs: Specs, metadata: Mapping[str, str], fill: Callable[[str, Callable[[Any], None]], None]
) -> None:
    """Write a file beside `path` and rename it: after a crash or a full disk there is the whole file, or none.

    fill: called with each tensor's name, in an order that keeps all of them aligned, and with a function that takes its
    data, piece by piece. Raises OSError; what was written beside is gone then.
    """
    names = sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        dtype, shape = specs[name]
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                kind = DTYPES[specs[name][0]]
                end = file.tell() + math.prod(specs[name][1]) * kind.itemsize

                def put(piece: Any, kind: np.dtype[Any] = kind) -> None:
                    file.write(np.ascontiguousarray(piece, kind).data)

                fill(name, put)
                if file.tell() != end:
                    raise ValueError(f"tensor {name!r} of shape {specs[name][1]} was given another amount of data")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        raise ValueError(f"it has {size} bytes and claims a heading of {length} ({_MOST_HEADER} is the most)")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("its heading is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its heading is no JSON object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice in its heading")
    return result


def _entry(name: str, entry: Any, data_size: int) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    where = f"tensor {name[:99]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} is not described by type, shape and offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{where} has a type that no trace has")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has an impossible shape or place")
    begin, end = offsets
    if not begin <= end <= data_size or math.prod(shape) * DTYPES[kind].itemsize != end - begin:
        raise ValueError(f"{where} does not fit its place in the file")
    return DTYPES[kind], tuple(shape), begin, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
