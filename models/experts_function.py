"""The function that transformers calls at each MoE block, and how it finds the engine.

An experts module that the engine runs carries a *handle* in its `__dict__` (not as a submodule or a parameter). The
function hands the call over to it. Modules without a handle but with weights of their own, such as those of a
multi-token-prediction head that transformers loads beside the model, run through transformers' own `grouped_mm`.
"""

from typing import Any, Protocol

import torch
from torch import nn

from moe_offload.models.compat import grouped_mm_experts_forward, register_experts_function

NAME = "moe_offload"
HANDLE = "_moe_offload_handle"


class ExpertsHandle(Protocol):
    """What an experts module is attached to."""

    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H] in hidden_states' dtype."""
        ...


def experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Run the routed experts of `module`; the signature is that of transformers' experts functions."""
    handle: ExpertsHandle | None = module.__dict__.get(HANDLE)
    if handle is not None:
        return handle(module, hidden_states, top_k_index, top_k_weights)
    if next(module.parameters(recurse=False), None) is None:
        raise RuntimeError(
            f"{type(module).__name__} has neither weights nor an engine: the model was copied or moved apart "
            "from the one that moe_offload loaded; load it again"
        )
    result: torch.Tensor = grouped_mm_experts_forward(
        module, hidden_states, top_k_index, top_k_weights, *args, **kwargs
    )
    return result


def attach_handle(module: nn.Module, handle: ExpertsHandle) -> None:
    """Let `handle` run this module. nn.Module's own attribute machinery is bypassed: a handle is no part of the
    model.
    """
    module.__dict__[HANDLE] = handle


def detach_handle(module: nn.Module) -> None:
    """Inverse of `attach_handle`; harmless without one."""
    module.__dict__.pop(HANDLE, None)


def register() -> None:
    """Make the function known to transformers as `experts_implementation="moe_offload"`."""
    register_experts_function(NAME, experts_forward)
