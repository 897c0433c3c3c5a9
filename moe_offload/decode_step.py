"""What is the same for all layers of a decode step: the rotary embedding, and what the mask lets each sequence see.

transformers hands the same objects to every layer; they are read at the first one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_HIDDEN = -1e4  # added to a score, leaves a weight of 0; what is nearer to 0 is a bias


@dataclass(frozen=True, slots=True)
class Step:
    """One step's inputs. Rows of cos and sin are f32, cos_step bytes from sequence to sequence (0: one for all)."""

    mask: Any
    source: Any  # the tensor that cos was read from
    length: int
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    starts: NDArray[np.int64]  # the first position that each sequence sees

    @property
    def batch(self) -> int:
        return len(self.starts)

    @property
    def cos_address(self) -> int:
        return int(self.cos.ctypes.data)

    @property
    def sin_address(self) -> int:
        return int(self.sin.ctypes.data)

    @property
    def cos_step(self) -> int:
        return 0 if len(self.cos) == 1 else int(self.cos.strides[0])


class StepInputs:
    """Remembers the last step that was read."""

    def __init__(self) -> None:
        self._last: tuple[Step | None, Any, Any, int] = (None, None, None, 0)

    def of(
        self, mask: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, batch: int, length: int
    ) -> Step | None:
        """The step of these inputs, `length` positions with the new one; None for a mask that is not a left padding."""
        step, last_mask, last_cos, last_length = self._last
        if last_mask is mask and last_cos is cos and last_length == length and (step is None or step.batch == batch):
            return step
        starts = seen_from(mask, batch, length)
        step = None
        if starts is not None and cos.shape == sin.shape and cos.shape[:-1] in ((1, 1), (batch, 1)):
            rows = [part.reshape(-1, part.shape[-1]).to(torch.float32).contiguous().numpy() for part in (cos, sin)]
            step = Step(mask, cos, length, rows[0], rows[1], starts)
        self._last = step, mask, cos, length
        return step


def seen_from(mask: torch.Tensor | None, batch: int, length: int) -> NDArray[np.int64] | None:
    """The first position that each sequence sees, by a mask [B or 1, 1, 1, T]; None for one that is no left padding."""
    if mask is None:
        return np.zeros(batch, np.int64)
    if mask.dim() != 4 or mask.shape[2] != 1 or mask.shape[1] != 1 or mask.shape[3] < length:
        return None
    mask = mask[:, 0, 0].expand(batch, -1)
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (mask.is_floating_point() and bool((visible | (mask <= _HIDDEN)).all())):
        return None
    starts = visible.to(torch.int8).argmax(dim=1)
    # all from the first visible position to the new one, and nothing behind it
    positions = torch.arange(visible.shape[1])[None]
    wanted = (positions >= starts[:, None]) & (positions < length)
    if not torch.equal(visible, wanted):
        return None
    return starts.numpy().astype(np.int64)
