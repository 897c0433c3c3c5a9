"""A checkpoint's tensors through numpy alone: bf16 values as the uint16 they are stored in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The bf16 tensors of a folder's safetensors files, mapped when asked for."""

    places: Mapping[str, _Place]

    @classmethod
    def open(cls, folder: Path) -> "StoredTensors":
        """Read every file's header. Raises ValueError for a tensor that is not bf16."""
        places = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{file}: {name} is {entry['dtype']}, only BF16 is compared here")
                places[name] = _Place(file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        return cls(places)

    def bits(self, name: str) -> NDArray[np.uint16]:
        """The tensor's bits, read-only."""
        place = self.places[name]
        return np.memmap(place.file, np.uint16, "r", place.offset, place.shape)

    def float32(self, name: str) -> NDArray[np.float32]:
        """The tensor's values, copied."""
        return (self.bits(name).astype(np.uint32) << 16).view(np.float32)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content
