"""What grows, one thing at a time: experts, layers, sequences or context of one model; the others stay as `BASE` has
them.

The model has experts of Qwen3-30B-A3B's size in int4 and its attention, and 4 experts a token, so that there may be as
few as 8 of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.servers.shapes import Shape
from moe_offload.cpu_kernels.packed_layout import ExpertRecord

_HIDDEN, _INTERMEDIATE, _TOP_K, _VOCABULARY = 2048, 768, 4, 151936
_ATTENTION = 2 * _HIDDEN * 4096 + 2 * _HIDDEN * 512
_KV_BYTES = 2 * 4 * 128 * 2  # of a position in a layer


@dataclass(frozen=True, slots=True)
class Cell:
    """One point: E, L, sequences, positions of each."""

    experts: int
    layers: int
    batch: int
    context: int

    @property
    def shape(self) -> Shape:
        """The model."""
        return Shape(
            "growing", self.layers, self.experts, _TOP_K, ExpertRecord(_HIDDEN, _INTERMEDIATE, "int4"),
            self.layers * (_ATTENTION + self.experts * _HIDDEN), _VOCABULARY * _HIDDEN, self.layers * _KV_BYTES,
            repeats=0.40,
        )  # fmt: skip


BASE = Cell(128, 48, 4, 4096)
AXES = {
    "experts": (8, 16, 32, 64, 128, 256, 512, 1024),
    "layers": (16, 24, 32, 48, 64, 96),
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "context": (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
}
SMOKE_BASE = Cell(16, 4, 2, 1024)
SMOKE_AXES = {"experts": (8, 32), "layers": (2, 8), "batch": (1, 8), "context": (1024, 131072)}


def along(axis: str, base: Cell, axes: Mapping[str, tuple[int, ...]]) -> tuple[Cell, ...]:
    """The cells of an axis."""
    if axis not in axes:
        raise ValueError(f"nothing grows along {axis!r}: choose one of {', '.join(axes)}")
    return tuple(replace(base, **{axis: value}) for value in axes[axis])
