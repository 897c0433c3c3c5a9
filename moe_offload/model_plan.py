"""A whole model's decode step as one chain: the stages of all layers, and between them the hand-over to the next.

Whoever runs a plan holds its buffers' lock.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.cpu_kernels.hand_over import HandOver
from moe_offload.cpu_kernels.matrices import Norm
from moe_offload.cpu_kernels.stages import Chain, Stage
from moe_offload.decode_plan import LayerPlan
from moe_offload.kv_room import Room


class ModelPlan:
    """The chain of all layers' stages for a number of sequences."""

    def __init__(self, layers: Sequence[LayerPlan], norm: Norm) -> None:
        self.layers = layers
        self.buffers = buffers = layers[0].buffers
        rounding = layers[0].model_type
        between = [HandOver(buffers.out, buffers.x, rounding) for _ in layers[1:]]
        self._hand_overs = [*between, HandOver(buffers.out, buffers.normed, rounding, norm)]
        self._stages: list[tuple[Stage, ...]] = []
        self._chain: Chain | None = None

    def totals(self) -> tuple[int, int, int]:
        """Of the last step: (token, expert) pairs, experts that ran, bytes of their weights."""
        rows, experts, bytes_read = 0, 0, 0
        for layer in self.layers:
            active = layer.active_experts
            rows, experts = rows + layer.routed_rows, experts + active
            bytes_read += active * layer.bytes_per_expert
        return rows, experts, bytes_read

    def begin(
        self,
        x: torch.Tensor,
        starts: NDArray[np.int64],
        length: int,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
    ) -> None:
        """A step's inputs: x [T, H]; what each sequence sees, positions starts[t] to length; cos, sin [T or 1, D]."""
        buffers = self.buffers
        buffers.x_tensor.copy_(x)
        buffers.lengths[:] = length
        buffers.starts[:] = starts
        self._angles = cos, sin  # read until the step's end
        where = int(cos.ctypes.data), int(sin.ctypes.data), 0 if len(cos) == 1 else cos.strides[0]
        for layer in self.layers:
            layer.heads.point(*where)

    def run(self, rooms: Sequence[Room], position: int, meanwhile: Callable[[], None]) -> None:
        """Run the step; see `LayerPlan.run` and `Team.launch`. The result, behind the norm, is in buffers.normed."""
        for plan, room in zip(self.layers, rooms, strict=True):
            plan.place(room, position)
        stages = [plan.stages for plan in self.layers]
        if self._chain is None or stages != self._stages:
            parts = zip(stages, self._hand_overs, strict=True)
            self._chain = Chain([stage for layer, hand_over in parts for stage in (*layer, hand_over.stage)])
            self._stages = stages
        self._chain.run(self.layers[0].team, meanwhile)
