"""One layer's experts as transformers calls them, on their way to the engine."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from moe_offload.cpu_layer import CpuLayer, PackedLayer

if TYPE_CHECKING:
    from moe_offload.engine import Engine


class LayerCall(NamedTuple):
    """One MoE layer's work, as transformers gives it: T tokens of width H, each routed to K experts."""

    layer: CpuLayer | PackedLayer
    number: int  # among the MoE layers
    module: nn.Module
    hidden_states: torch.Tensor  # [T, H]
    top_k_index: torch.Tensor  # [T, K] int64
    top_k_weights: torch.Tensor  # [T, K]


class LayerHandle:
    """Ties an experts module to the engine."""

    __slots__ = ("engine", "index", "layer")

    def __init__(self, engine: "Engine", layer: CpuLayer | PackedLayer, index: int) -> None:
        self.engine = engine
        self.layer = layer
        self.index = index

    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return self.engine.run(LayerCall(self.layer, self.index, module, hidden_states, top_k_index, top_k_weights))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerHandle":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model loaded by moe_offload cannot be pickled: its experts are mapped files; "
            "load it again in the other process"
        )


class NoBackward(torch.autograd.Function):
    """The experts inside a graph that records gradients: forward as usual, backward refused instead of silently
    wrong.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, engine: "Engine", call: LayerCall) -> torch.Tensor:
        return engine.run_forward(call)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "moe_offload runs inference only: its experts have no gradient; load with transformers to train"
        )
