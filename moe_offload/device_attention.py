"""Attention of a model with a device: where a layer's KV cache is in host memory, its steps run on the CPU.

transformers calls the function that a config names. `attach` names ours, under which masks are made as before, and puts
a handle on each attention module; modules without one compute as they would have. One query position of each sequence
goes to a decode attention of ours: over keys and values in host memory to the CPU's, which reads them where they lie,
over those on the device to the device's, where that is better than torch's (`device_decode_attention.py`). Everything
else runs on the device through the function that stood there before: prompts, and what the kernels do not know (a soft
cap, gradients, on the CPU a mask with holes), for which keys and values in host memory are copied there.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_offload.attention_layers import NAMES, SINK_CLASSES, AttentionLayer, attention_layers
from moe_offload.cpu_kernels.attention import AttentionShape, DecodeAttention
from moe_offload.cpu_kernels.team import Team
from moe_offload.decode_modules import WEIGHT_TYPES
from moe_offload.decode_step import seen_from
from moe_offload.device_decode_attention import DeviceDecode, Sinks
from moe_offload.host_cache import Origin, origin_of
from moe_offload.models import compat

HANDLE = "_moe_offload_attention"
# What may be handed to an attention function and changes nothing here: the mask says what is seen.
_HARMLESS = frozenset(("dropout", "scaling", "is_causal", "sliding_window", "s_aux", "position_ids", "use_cache"))


class AttentionObserver(Protocol):
    """What hears of every attention, runs it, and carries data over. The bodies here are what happens without one."""

    def attended(
        self, layer_idx: int, on_host: bool, batch: int, queries: int, length: int,
        run: Callable[[], torch.Tensor], *, link_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        """Call `run`, once, and return what it returns: the attention of `queries` positions over `length`, its own
        included. on_host: on the CPU, else on the device. link_bytes: what goes over the link for it, new keys and
        values, queries and result included.
        """
        return run()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The queries [B, Hq, D] in host memory, ready to be read."""
        return tensor.to("cpu")

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The CPU's result [B, 1, Hq, Dv] on the device."""
        return tensor.to(device)


class PlainObserver(AttentionObserver):
    """Only runs what it is told of."""


class SharedKernels:
    """What the attentions of one model share: kernels by shape, and the current step's mask."""

    def __init__(self, observer: AttentionObserver, team: Team, decode: DeviceDecode | None) -> None:
        self.observer, self.team, self.decode = observer, team, decode
        self._kernels: dict[AttentionShape, DecodeAttention] = {}
        self._last: tuple[Any, int, int, int, NDArray[np.int64] | None] | None = None

    def kernel(self, shape: AttentionShape) -> DecodeAttention:
        if shape not in self._kernels:
            self._kernels[shape] = DecodeAttention(shape)
        return self._kernels[shape]

    def starts(self, mask: torch.Tensor | None, batch: int, length: int) -> NDArray[np.int64] | None:
        """The first position that each sequence sees; None for a mask with holes. All layers are handed one mask."""
        last = self._last
        version = mask._version if mask is not None and not mask.is_inference() else 0
        if last is not None and last[0] is mask and last[1:4] == (version, batch, length):
            return last[4]
        starts = seen_from(None if mask is None else mask.to("cpu"), batch, length)
        self._last = mask, version, batch, length, starts  # at once: there may be other threads
        return starts


class AttentionHandle:
    """One attention module's way to our kernels."""

    def __init__(
        self, shared: SharedKernels, layer: AttentionLayer, former: Callable[..., Any], with_sinks: bool
    ) -> None:
        self.shared, self.index, self.former, self.with_sinks = shared, layer.index, former, with_sinks
        self._host_sinks, self._device_sinks = Sinks(torch.device("cpu")), Sinks()
        # Of another eager attention only the module knows what it computes.
        self._known = not with_sinks or type(layer.module).__name__ in SINK_CLASSES

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionHandle":
        """A copied model shares the threads."""
        return self

    def __call__(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        (batch, _, queries, _), length = query.shape, key.shape[2]
        origin = origin_of(key) or Origin(key.device != query.device, 0)
        link, attended = origin.link_bytes, self.shared.observer.attended
        if origin.on_host:
            step = self._step(module, query, key, value, attention_mask, kwargs)
            if step is not None:
                link += query.nbytes * (query.shape[3] + value.shape[3]) // query.shape[3]
                return attended(self.index, True, batch, 1, length, step, link_bytes=link), None
            link += key.nbytes + value.nbytes
        weights = None

        def run() -> torch.Tensor:
            nonlocal weights
            if not origin.on_host:
                found = self._on_device(module, query, key, value, attention_mask, kwargs)
                if found is not None:
                    return found
            keys, values = key.to(query.device), value.to(query.device)
            result: torch.Tensor
            result, weights = self.former(module, query, keys, values, attention_mask, **kwargs)
            return result

        return attended(self.index, False, batch, queries, length, run, link_bytes=link), weights

    def _step(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, kwargs: Mapping[str, Any],
    ) -> Callable[[], torch.Tensor] | None:  # fmt: skip
        """What runs the CPU's kernel; None for what it does not know."""
        batch, q_heads, _, size = query.shape
        kv_heads, length = key.shape[1:3]
        if not is_plain_step(query, key, value, kwargs) or q_heads % kv_heads:
            return None
        starts = self.shared.starts(mask, batch, length)
        if starts is None or key.stride(-1) != 1 or value.stride(-1) != 1:
            return None
        bf16 = key.dtype == torch.bfloat16
        kernel = self.shared.kernel(
            AttentionShape(
                q_heads, kv_heads, size, value.shape[3], WEIGHT_TYPES[key.dtype], scale=kwargs.get("scaling"),
                q_is_bf16=bf16, bf16_weights=bf16,
            )
        )  # fmt: skip
        sinks = self._host_sinks.of(module) if self.with_sinks else None

        def run() -> torch.Tensor:
            shared = self.shared
            q = shared.observer.to_host(query[:, :, 0]).to(torch.float32).contiguous()
            out = torch.empty((batch, 1, q_heads, value.shape[3]), dtype=torch.float32)
            kernel(
                q.numpy(), stored_array(key), stored_array(value), np.full(batch, length, np.int64), out[:, 0].numpy(),
                shared.team, starts=starts, sinks=None if sinks is None else sinks.numpy(),
            )  # fmt: skip
            return shared.observer.to_device(out.to(query.dtype), query.device)

        return run

    def _on_device(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, kwargs: Mapping[str, Any],
    ) -> torch.Tensor | None:  # fmt: skip
        """The device kernel's result; None where torch's is to be taken."""
        decode = self.shared.decode
        if decode is None or not self._known or not is_plain_step(query, key, value, kwargs):
            return None
        sinks = self._device_sinks.of(module) if self.with_sinks else None
        return decode.run(query, key, value, mask, kwargs.get("scaling"), sinks)


def is_plain_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether it is one position of each sequence, with nothing asked for that our kernels do not know."""
    if query.shape[2] != 1 or kwargs.get("dropout") or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    if any(given is not None and given is not False for name, given in kwargs.items() if name not in _HARMLESS):
        return False
    if key.dtype not in WEIGHT_TYPES or value.dtype != key.dtype or query.dtype != key.dtype:
        return False
    return not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad)


def stored_array(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The attention of `module`; the signature is that of transformers' attention functions."""
    handle: Callable[..., Any] | None = module.__dict__.get(HANDLE)
    if handle is None:  # of a model that was made from an attached one's config
        name = next(former for former, ours in NAMES.items() if ours == module.config._attn_implementation)  # type: ignore[union-attr]
        handle = compat.attention_function(module, name)
        result: tuple[torch.Tensor, torch.Tensor | None] = handle(module, query, key, value, attention_mask, **kwargs)
        return result
    answer: tuple[torch.Tensor, torch.Tensor | None] = handle(module, query, key, value, attention_mask, **kwargs)
    return answer


def attach(
    model: nn.Module, observer: AttentionObserver, team: Team, decode: DeviceDecode | None = None
) -> tuple[AttentionLayer, ...]:
    """Let attention over host layers run on the CPU; every layer's description, with what keeps it on the device.

    decode: runs the steps over layers on the device that torch has no good kernel for; None: torch does. A model with
    no layer that can go to the host is left alone. Attaching again replaces all three.
    """
    layers = attention_layers(model)
    if not any(layer.schedulable for layer in layers):
        return layers
    shared = SharedKernels(observer, team, decode)
    for layer in layers:
        if layer.module is None or layer.implementation not in NAMES:
            continue
        former = compat.attention_function(layer.module, layer.implementation)
        layer.module.__dict__[HANDLE] = AttentionHandle(shared, layer, former, layer.implementation == "eager")
        compat.set_attention_implementation(layer.module.config, NAMES[layer.implementation])
    return layers


def detach(model: nn.Module) -> None:
    """Inverse of `attach`; harmless without one. Host layers of caches in use have to be moved back before."""
    formers = {ours: former for former, ours in NAMES.items()}
    for module in model.modules():
        if module.__dict__.pop(HANDLE, None) is None:
            continue
        config: Any = module.config
        if config._attn_implementation in formers:
            compat.set_attention_implementation(config, formers[config._attn_implementation])


for _former, _ours in NAMES.items():
    compat.register_attention_function(_ours, attention_forward, _former)
