"""What float16 would make of a checkpoint's weights, found out before they are loaded.

float16 holds numbers up to 65504, and below 6e-5 with fewer and fewer digits. A bfloat16 weight has eight digits, so it
is exactly itself in float16 from 7.6e-6 to 65280, rounded below, and zero below 3e-8. Tensors are read in pieces from
the mapped files: the next to read them finds them in memory.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.compat import KeyResolver
from moe_offload.models.safetensors_header import TensorRecord

LARGEST = 65504  # of float16
_ROUNDS_TO_INFINITY, _ROUNDS_TO_ZERO = 65520.0, 2.0**-25
_BF16_LARGEST, _BF16_INFINITE = 0x477F, 0x7F80  # 65280; the next is 65536
_BF16_VANISHES = np.uint16(0x3300)  # 2**-25
_FLOATS = ("BF16", "F32", "F64")  # that could fail to fit
_PIECE = 1 << 20  # numbers that are looked at at once
_FP8_LARGEST = 448.0
_FP8_SCALES = "_scale_inv"

Report = Callable[[int, int], None]  # bytes done, of how many


@dataclass(frozen=True, slots=True)
class RangeFacts:
    """`values` were looked at; `vanishing` of them are not zero and would be. `misfit`: the first tensor found with a
    number that is finite and would not be, `largest` that number's magnitude.
    """

    values: int = 0
    vanishing: int = 0
    misfit: str | None = None
    largest: float = 0.0


def loaded_floats(model: PreTrainedModel, checkpoint: Checkpoint, experts: Collection[str]) -> list[TensorRecord]:
    """Tensors that loading in float16 would convert, in the order of the files.

    `model` is the skeleton with its expert parameters, `experts` the keys that are not loaded. What the architecture
    keeps in f32 is left out. Of a matrix stored as FP8 it is the scales, which say how large its numbers get.
    """
    resolve, wanted = KeyResolver(model), model.state_dict()
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    found = []
    for name, record in checkpoint.records.items():
        if name in experts or record.dtype not in _FLOATS:
            continue
        target = resolve(name.removesuffix(_FP8_SCALES)).target
        if target in wanted and not any(part in target for part in kept):
            found.append(record)
    return sorted(found, key=lambda record: (record.path, record.offset))


def check_range(checkpoint: Checkpoint, records: Sequence[TensorRecord], report: Report | None = None) -> RangeFacts:
    """What float16 would make of them. Ends at the first tensor that does not fit."""
    values = vanishing = done = 0
    total = sum(record.nbytes for record in records)
    for record in records:
        flat, largest = checkpoint.view(record).flatten(), 0.0
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            misfit, some = _scaled_range(piece) if record.name.endswith(_FP8_SCALES) else _range(piece)
            largest, vanishing = max(largest, misfit), vanishing + some
            done += piece.nbytes
            if report is not None:
                report(done, total)
        values += len(flat)
        if largest:
            return RangeFacts(values, vanishing, record.name, largest)
    return RangeFacts(values, vanishing)


def _range(piece: torch.Tensor) -> tuple[float, int]:
    """The largest finite magnitude if it does not fit (else 0), and how many numbers would vanish."""
    if piece.dtype == torch.bfloat16:
        return _bf16_range(piece.view(torch.int16).numpy().view(np.uint16))
    return _float_range(piece.to(torch.float64).abs().numpy())


def _scaled_range(scales: torch.Tensor) -> tuple[float, int]:
    """Likewise, of the largest numbers that a scale can make."""
    return _float_range(scales.to(torch.float64).abs().numpy() * _FP8_LARGEST)


def _bf16_range(bits: NDArray[np.uint16]) -> tuple[float, int]:
    """Magnitudes are ordered as their bits are."""
    magnitude = bits & np.uint16(0x7FFF)
    largest = 0.0
    if magnitude.max() > _BF16_LARGEST:
        finite = magnitude[magnitude < _BF16_INFINITE]
        most = int(finite.max()) if len(finite) else 0
        if most > _BF16_LARGEST:
            largest = float(np.uint32(most << 16).view(np.float32))
    magnitude -= np.uint16(1)  # zero becomes the largest
    return largest, int(np.count_nonzero(magnitude < _BF16_VANISHES))


def _float_range(magnitude: NDArray[np.float64]) -> tuple[float, int]:
    misfits = magnitude[(magnitude >= _ROUNDS_TO_INFINITY) & np.isfinite(magnitude)]
    largest = float(misfits.max()) if len(misfits) else 0.0
    return largest, int(np.count_nonzero((magnitude > 0) & (magnitude <= _ROUNDS_TO_ZERO)))
