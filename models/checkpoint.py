"""A Hugging Face checkpoint on disk: which files it has, which tensors they hold, and views of them without a copy."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.models.errors import CheckpointError, UnsupportedModelError
from moe_offload.models.safetensors_header import TensorRecord, read_header
from moe_offload.transfer.mapped_file import MappedFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`.

    Raises CheckpointError when there is none, when the index is damaged or names a file or tensor that is not there;
    UnsupportedModelError when the weights are in another format than safetensors.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: check the path, or give the id of a model on the Hub")
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return [folder / SINGLE_NAME]
        other = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".gguf")]
        if other:
            raise UnsupportedModelError(
                f"{folder} holds weights as {other[0]}; only safetensors can be read in place. "
                "Load it with transformers and save_pretrained() it, which writes safetensors"
            )
        raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: it is no model folder")
    files = sorted(set(read_index(index).values()))
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: shard {name} is missing ({INDEX_NAME} lists {len(files)} shards): download it again"
            )
    return [folder / name for name in files]


def read_index(path: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name to file name. Raises CheckpointError if it is not a sane index."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, file in weight_map.items():
        # A file name only: "../x" or an absolute path would read outside of the model folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {tensor!r} is said to be in {file!r}, not a safetensors file name")
    return weight_map


class _WritableAlias:
    """The same bytes as a read-only array, offered through the array interface as writable."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


class Checkpoint:
    """Tensors of some safetensors files by name, mapped read-only.

    `records[name]` says where a tensor lies, `view(name)` is a read-only torch tensor on the mapping,
    `address(record)` its first byte. Everything is valid until `close()`.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.records: dict[str, TensorRecord] = {}
        for path in files:
            for name, record in read_header(path).items():
                if name in self.records:
                    raise CheckpointError(
                        f"tensor {name!r} is in two shards, {self.records[name].path.name} and {path.name}"
                    )
                self.records[name] = record
        self._maps: dict[Path, MappedFile] = {}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """The model in `folder`, with its index checked against the shards' own headers."""
        checkpoint = cls(shard_paths(folder))
        index = folder / INDEX_NAME
        if index.is_file():
            for name, file in read_index(index).items():
                record = checkpoint.records.get(name)
                if record is None or record.path.name != file:
                    raise CheckpointError(f"{INDEX_NAME} says that tensor {name!r} is in {file}, but it is not there")
        return checkpoint

    def mapping(self, path: Path) -> MappedFile:
        """The mapping of one of the files, made on first use."""
        mapped = self._maps.get(path)
        if mapped is None:
            try:
                mapped = self._maps[path] = MappedFile(path)
            except OSError as error:
                raise CheckpointError(f"cannot map {path}: {error.strerror or error}") from error
        return mapped

    def address(self, record: TensorRecord) -> int:
        """Address of a tensor's first byte in this process; need not be aligned to anything."""
        return self.mapping(record.path).address + record.offset

    def view(self, record: TensorRecord) -> torch.Tensor:
        """The tensor itself, on the mapped bytes (read-only: writing to it is a segmentation fault)."""
        dtype = TORCH_DTYPES.get(record.dtype)
        if dtype is None:
            raise UnsupportedModelError(f"tensor {record.name!r} has dtype {record.dtype}, which torch cannot hold")
        raw = self.mapping(record.path).bytes(record.offset, record.nbytes)
        if not record.nbytes:
            return torch.empty(record.shape, dtype=dtype)
        # torch warns of every read-only array; the alias says "writable" and keeps the mapping's export alive.
        return torch.from_numpy(np.asarray(_WritableAlias(raw))).view(dtype).view(record.shape)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(record.nbytes for record in self.records.values())

    def close(self) -> None:
        """Unmap every file. Views must be gone (BufferError otherwise)."""
        while self._maps:
            _, mapped = self._maps.popitem()
            mapped.close()
