"""Launches attention.cu: attention of one new position a sequence over keys and values on the device.

Letters: B sequences, Hq and Hkv heads of queries and of keys, T positions, D and Dv sizes of a head. The positions are
divided into splits, so that few sequences fill the card: `attend` does the splits, `combine` puts them together.
Nothing here waits for the device, and what it returns does not depend on the order in which the device works. Neither
has run on a card yet: what is known comes from the CPU (tests) and from the compiler.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moe_offload.gpu_kernels.launch import Kernels, Macros

SOURCE = "attention.cu"
KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
NUMBER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LARGEST_HEAD = 256
CHUNK = 8  # elements that a lane reads at once

_THREADS = 128
_HEADS, _TILES = 8, 4  # query heads of a warp, and of such in a block, at most
_MASK_BOOL, _MASK_ADDED = 1, 2
_BLOCKS_PER_MULTIPROCESSOR = 2  # as many as registers allow at eight heads a warp
_LEAST_POSITIONS = 64  # of a split
_MOST_SPLITS = 128
_MOST_BLOCKS = 65535  # of a grid's second and third size

_STRIDES = np.dtype([("batch", np.int64), ("head", np.int64), ("position", np.int64)])
_PROBLEM = np.dtype(
    [(name, _STRIDES) for name in ("query", "keys", "values", "key_scales", "value_scales")]
    + [("mask_batch", np.int64)]
    + [(name, np.int32) for name in ("kv_heads", "group", "length", "window", "splits")]
    + [(name, np.int32) for name in ("query_type", "scale_type", "mask_kind")]
    + [("scale", np.float32), ("softcap", np.float32)]
)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What is the same for all steps of a layer. scale None: 1 / sqrt(D); window: positions seen, 0 = all; softcap c:
    logits become c tanh(logit / c), 0 = they stay.

    Raises ValueError for what the kernel does not take.
    """

    q_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    kv_type: torch.dtype
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0

    def __post_init__(self) -> None:
        for name, size in (("head_size", self.head_size), ("value_size", self.value_size)):
            if not 0 < size <= LARGEST_HEAD or size % CHUNK:
                raise ValueError(f"{name} is {size}; the kernel takes multiples of {CHUNK} up to {LARGEST_HEAD}")
        if self.kv_heads <= 0 or self.q_heads <= 0 or self.q_heads % self.kv_heads:
            raise ValueError(f"{self.q_heads} query heads do not divide among {self.kv_heads} heads of keys")
        if self.kv_type not in KV_TYPES:
            raise ValueError(f"keys and values of {self.kv_type}; the kernel takes {', '.join(map(str, KV_TYPES))}")
        if self.window < 0 or self.softcap < 0:
            raise ValueError(f"window {self.window} and softcap {self.softcap} must not be negative")

    @property
    def group(self) -> int:
        """Query heads that share keys."""
        return self.q_heads // self.kv_heads

    @property
    def tiles(self) -> int:
        """Warps of a block that have different query heads: 1, 2 or 4."""
        return 1 if self.group <= _HEADS else 2 if self.group <= 2 * _HEADS else _TILES

    @property
    def head_blocks(self) -> int:
        """Blocks for the query heads of one head of keys."""
        return -(-self.group // (_HEADS * _TILES))

    @property
    def macros(self) -> Macros:
        heads = -(-self.group // (self.tiles * self.head_blocks))
        return _macros(KV_TYPES[self.kv_type], self.head_size, self.value_size, heads, self.tiles)


def _macros(kv_type: int, head_size: int, value_size: int, heads: int, tiles: int) -> Macros:
    return ("KV_TYPE", kv_type), ("D", head_size), ("DV", value_size), ("HEADS", heads), ("TILES", tiles)


# The launcher compiles for the model at hand; these are what models have, and the largest and smallest.
VARIANTS: dict[str, list[Macros]] = {
    SOURCE: [
        *(_macros(kv_type, 128, 128, 8, 1) for kv_type in KV_TYPES.values()),
        _macros(1, 64, 64, 8, 1),
        _macros(1, 128, 128, 4, 1),
        _macros(1, 128, 128, 6, 2),
        _macros(2, 128, 128, 8, 2),
        _macros(2, 192, 128, 8, 1),
        _macros(0, 256, 256, 8, 4),
        _macros(2, 256, 256, 8, 1),
        _macros(3, 80, 80, 8, 1),
        _macros(1, 8, 8, 1, 1),
    ]
}


class DecodeAttention:
    """Attention of one shape on a device with so many multiprocessors."""

    def __init__(self, kernels: Kernels, shape: DecodeShape, multiprocessors: int) -> None:
        self.shape, self._multiprocessors = shape, multiprocessors
        self._attend = kernels.get(SOURCE, "attend", shape.macros)
        self._combine = kernels.get(SOURCE, "combine", shape.macros)

    def splits(self, batch: int, length: int) -> int:
        """How many parts the positions are divided into."""
        seen = min(length, self.shape.window or length)
        blocks = batch * self.shape.kv_heads * self.shape.head_blocks
        wanted = _BLOCKS_PER_MULTIPROCESSOR * self._multiprocessors // blocks
        return max(1, min(wanted, seen // _LEAST_POSITIONS, _MOST_SPLITS))

    def workspace_size(self, batch: int, length: int, splits: int | None = None) -> int:
        """f32 numbers that a call needs beside its result; 0 for a single split."""
        splits = self.splits(batch, length) if splits is None else splits
        return 0 if splits == 1 else batch * self.shape.q_heads * splits * (self.shape.value_size + 2)

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
        splits: int | None = None,
    ) -> torch.Tensor:
        """[B, Hq, Dv] of the query's type, for query [B, Hq, D], keys [B, Hkv, T, D] and values [B, Hkv, T, Dv].

        mask: [B or 1, T], bool (seen) or numbers that are added to the logits. starts: int32 [B], the first position
        that a sequence sees. sinks: f32 [Hq], one more logit for each head. Scales, of int8 only: f16 or f32
        [B, Hkv, T]. All on one device; rows of keys and values must be `aligned`. What is not seen is not read; a
        sequence that sees nothing gives 0. workspace: f32, of `workspace_size`, or one is made. splits: instead of
        those that `splits` says.

        Raises ValueError for tensors that do not fit.
        """
        shape = self.shape
        batch, length = self._check(query, keys, values, mask, starts, sinks)
        scale_type = self._check_scales(keys, key_scales, value_scales)
        splits = self.splits(batch, length) if splits is None else splits
        if splits < 1:
            raise ValueError(f"{splits} splits; at least 1")
        size = self.workspace_size(batch, length, splits)
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.float32, device=query.device)
        elif workspace.dtype != torch.float32 or workspace.numel() < size or not workspace.is_contiguous():
            raise ValueError(f"workspace is {_text(workspace)}; {size} contiguous numbers of torch.float32 are needed")
        states = workspace.view(-1)[batch * shape.q_heads * splits * shape.value_size :] if size else None
        out = torch.empty((batch, shape.q_heads, shape.value_size), dtype=query.dtype, device=query.device)
        problem = np.zeros(1, _PROBLEM)
        tensors = query.unsqueeze(2), keys, values, key_scales, value_scales
        for name, tensor in zip(("query", "keys", "values", "key_scales", "value_scales"), tensors, strict=True):
            if tensor is not None:
                problem[name] = tensor.stride()[:3]
        if mask is not None:
            problem["mask_batch"] = mask.stride(0) if mask.shape[0] > 1 else 0
            problem["mask_kind"] = _MASK_BOOL if mask.dtype == torch.bool else _MASK_ADDED + NUMBER_TYPES[mask.dtype]
        problem["kv_heads"], problem["group"], problem["length"] = shape.kv_heads, shape.group, length
        problem["window"], problem["splits"], problem["softcap"] = shape.window, splits, shape.softcap
        problem["query_type"], problem["scale_type"] = NUMBER_TYPES[query.dtype], scale_type
        problem["scale"] = shape.head_size**-0.5 if shape.scale is None else shape.scale
        sums = workspace if size else None
        self._attend(
            (splits, shape.kv_heads * shape.head_blocks, batch), (_THREADS,),
            (query, keys, values, key_scales, value_scales, mask, starts, sinks, sums, states, out, problem),
        )  # fmt: skip
        if splits > 1:
            threads = min(-(-shape.value_size // 32) * 32, 256)
            numbers = np.int32(shape.q_heads), np.int32(splits), np.int32(NUMBER_TYPES[query.dtype])
            self._combine((shape.q_heads, batch), (threads,), (sums, states, sinks, out, *numbers))
        return out

    def _check(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None,
        starts: torch.Tensor | None, sinks: torch.Tensor | None,
    ) -> tuple[int, int]:  # fmt: skip
        """B and T."""
        shape = self.shape
        if keys.dim() != 4 or not keys.shape[0] or not keys.shape[2]:
            raise ValueError(f"keys are {_text(keys)}; [B, Hkv, T, D] with some B and T is wanted")
        batch, length = keys.shape[0], keys.shape[2]
        if batch > _MOST_BLOCKS or shape.kv_heads * shape.head_blocks > _MOST_BLOCKS:
            raise ValueError(f"{batch} sequences of {shape.q_heads} heads; a launch takes {_MOST_BLOCKS} of each")
        rows = (batch, shape.kv_heads, length)
        for name, tensor, size in (("keys", keys, shape.head_size), ("values", values, shape.value_size)):
            if tuple(tensor.shape) != (*rows, size) or tensor.dtype != shape.kv_type:
                raise ValueError(f"{name} are {_text(tensor)}; {shape.kv_type} {[*rows, size]} is wanted")
            if not aligned(tensor):
                raise ValueError(
                    f"{name} with strides {tensor.stride()} at {tensor.data_ptr():#x} are not `aligned`; copy them"
                )
        wanted = (batch, shape.q_heads, shape.head_size)
        if tuple(query.shape) != wanted or query.dtype not in NUMBER_TYPES or query.stride(2) != 1:
            raise ValueError(
                f"query is {_text(query)}; [B, Hq, D] = {[*wanted]} of floats is wanted, its last stride 1"
            )
        if mask is not None and (
            mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length or mask.stride(1) != 1
            or mask.dtype not in (torch.bool, *NUMBER_TYPES)
        ):  # fmt: skip
            raise ValueError(f"mask is {_text(mask)}; {[batch, length]} or {[1, length]} of bools or floats is wanted")
        for name, given, count, dtype in (
            ("starts", starts, batch, torch.int32),
            ("sinks", sinks, shape.q_heads, torch.float32),
        ):
            if given is not None and (tuple(given.shape) != (count,) or given.dtype != dtype or given.stride(0) != 1):
                raise ValueError(f"{name} are {_text(given)}; {dtype} {[count]} is wanted, its stride 1")
        return batch, length

    def _check_scales(
        self, keys: torch.Tensor, key_scales: torch.Tensor | None, value_scales: torch.Tensor | None
    ) -> int:
        """The type of both, by number."""
        int8 = self.shape.kv_type == torch.int8
        if (key_scales is not None, value_scales is not None) != (int8, int8):
            raise ValueError("int8 keys and values need scales, others have none")
        if key_scales is None or value_scales is None:
            return 0
        for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
            if scales.shape != keys.shape[:3] or scales.stride(2) != 1 or scales.dtype not in (
                torch.float16, torch.float32
            ) or scales.dtype != key_scales.dtype:  # fmt: skip
                raise ValueError(
                    f"{name} are {_text(scales)}; {[*keys.shape[:3]]} of one of torch.float16 and torch.float32 is "
                    "wanted, the same for both, the last stride 1"
                )
        return NUMBER_TYPES[key_scales.dtype]


def aligned(tensor: torch.Tensor) -> bool:
    """Whether rows of keys or values lie where the kernel can read them: 16 bytes at once, int8 8."""
    unit = CHUNK if tensor.dtype == torch.int8 else 16
    if tensor.stride(-1) != 1 or tensor.data_ptr() % unit:
        return False
    sizes = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return all(size == 1 or stride * tensor.itemsize % unit == 0 for size, stride in sizes)


def _text(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {[*tensor.shape]}"
