"""Finding experts modules, and fitting those that transformers does not dispatch through its experts interface.

Two undecorated architectures are fitted by swapping a module's class for a subclass of it; swapping back is exact,
and the modules' parameters and buffers are never touched:

    llama4          its block repeats every token for every expert and multiplies densely; the routing weight scales
                    the expert's *input*
    longcat_flash   the standard call, but experts from `num_routed_experts` on are identities without weights
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from moe_offload.models.compat import is_dispatched_experts
from moe_offload.models.errors import UnsupportedModelError
from moe_offload.models.experts_function import experts_forward

ADAPTED = ("llama4", "longcat_flash")


def _llama4_forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama4TextMoe.forward over the chosen experts only. hidden_states [..., H] -> ([T, H], router logits [T, E])."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    logits = functional.linear(hidden_states, self.router.weight, self.router.bias)
    top_values, top_index = torch.topk(logits, self.top_k, dim=1)
    scores = torch.sigmoid(top_values.float()).to(hidden_states.dtype)
    # The weight scales the input, so each (token, expert) pair is a token of its own, with weight 1.
    pairs = (hidden_states[:, None, :] * scores[:, :, None]).reshape(-1, self.hidden_dim)
    index = top_index.reshape(-1, 1)
    routed = experts_forward(self.experts, pairs, index, torch.ones_like(index, dtype=torch.float32))
    out = self.shared_expert(hidden_states)
    out.add_(routed.view(-1, self.top_k, self.hidden_dim).sum(dim=1))
    return out, logits


def _longcat_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """LongcatFlashExperts.forward: routed experts by the engine, identities here."""
    out = experts_forward(self, hidden_states, top_k_index, top_k_weights)
    identity = (top_k_weights * (top_k_index >= self.num_routed_experts)).sum(dim=1, keepdim=True)
    result: torch.Tensor = out + (hidden_states * identity).to(out.dtype)
    return result


# Class name -> the forward that replaces its own. Names only select; what is read are the attributes.
_FORWARDS: dict[str, Callable[..., Any]] = {
    "Llama4TextMoe": _llama4_forward,
    "LongcatFlashExperts": _longcat_forward,
}


def find_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> experts module, for every routed-experts module that the engine can run.

    Raises UnsupportedModelError for a dense model and for a mixture that neither goes through transformers' experts
    interface nor has an adapter.
    """
    found = {}
    for path, module in model.named_modules():
        has_weights = any(name in ("gate_up_proj", "up_proj") for name, _ in module.named_parameters(recurse=False))
        if has_weights and (is_dispatched_experts(module) or type(module).__name__ == "LongcatFlashExperts"):
            found[path] = module
        elif type(module).__name__ == "Llama4TextMoe":
            found[f"{path}.experts"] = module.experts
    if not found:
        raise UnsupportedModelError(_refusal(model))
    return found


def adapt(model: PreTrainedModel) -> Callable[[], None]:
    """Swap the classes of modules that need an adapter; returns the undo."""
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in model.modules():
        original = type(module)
        forward = _FORWARDS.get(original.__name__)
        if forward is not None:
            module.__class__ = type(f"Offloaded{original.__name__}", (original,), {"forward": forward})
            swapped.append((module, original))

    def undo() -> None:
        for module, original in swapped:
            module.__class__ = original

    return undo


def _refusal(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = next((n for name in counts if type(n := getattr(config, name, None)) is int and n > 1), None)
    supported = (
        "supported is every architecture whose experts transformers dispatches through its experts interface "
        f"(Mixtral, Qwen-MoE, DeepSeek, gpt-oss, OLMoE, GLM, Granite-MoE, ...), and {', '.join(ADAPTED)}"
    )
    if experts is None and not any("experts" in name.lower() for name, _ in model.named_modules()):
        return f"{config.model_type!r} is a dense model, it has no experts to offload; {supported}"
    return f"the experts of {config.model_type!r} do not go through transformers' experts interface; {supported}"
