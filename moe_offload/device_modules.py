"""A model's own modules on a real device, its face on the CPU.

Attention, norms, routers and the output head go to the device; the input embedding stays on the CPU, where a lookup
costs nothing and saves the device's memory. So `model.device` is the CPU, tokens come and logits leave there, and
generate() keeps its own tensors where no failing device can take them along. What crosses:

    before a forward      masks and positions go to the device (`carry_in`; not tokens: the embedding wants them)
    behind the embedding  hidden states go to the device
    behind the head       logits come to the CPU

The parameters' host tensors are kept: `withdraw` puts them back, which needs nothing from the device. With tied weights
the head has a copy of its own on the device.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_ON_THE_HOST = ("input_ids", "past_key_values", "labels")


def device_bytes(model: PreTrainedModel) -> int:
    """What of the model goes to a device, in bytes; tensors that several modules share count once."""
    return sum(tensor.numel() * tensor.itemsize for tensor in {id(t): t for _, _, t in _held(model)}.values())


def _held(model: PreTrainedModel) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every tensor that goes to the device, with where it is held."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stays = {id(tensor) for tensor in (*embedding.parameters(), *embedding.buffers())}
    for module in model.modules():
        if module is embedding:
            continue
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and (id(tensor) not in stays or module is head):
                    yield held, name, tensor


class DeviceModules:
    """`model`'s modules on `device`, until `withdraw`."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.device = device
        self._host = list(_held(model))
        moved: dict[int, torch.Tensor] = {}
        for _, _, tensor in self._host:
            if id(tensor) not in moved:
                moved[id(tensor)] = _on(tensor, device)
        for held, name, tensor in self._host:  # once there is room for all of them
            held[name] = moved[id(tensor)]
        head = model.get_output_embeddings()
        self._hooks = [model.get_input_embeddings().register_forward_hook(self._to_device)]
        if head is not None:
            self._hooks.append(head.register_forward_hook(self._to_host))

    def carry_in(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model's forward, those for its layers on the device."""
        return {
            name: value.to(self.device) if torch.is_tensor(value) and name not in _ON_THE_HOST else value
            for name, value in kwargs.items()
        }

    def withdraw(self) -> None:
        """Back to the CPU. Harmless when done twice."""
        for hook in self._hooks:
            hook.remove()
        for held, name, tensor in self._host:
            held[name] = tensor
        self._hooks.clear()
        self._host.clear()

    def _to_device(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(self.device)

    def _to_host(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to("cpu")


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
    return tensor.to(device)
