"""The fused decode step: a decoder layer's forward in one launch, for one new token of each of a few sequences.

transformers' own modules cost about 250 us of Python per layer and token. `DecodeLayer` stands in the place of a
layer's `forward` (an attribute of the instance, over the class's method) and hands whatever is no such step to
the original: prefill, training, gradients, hooks, another kind of cache, a mask with holes, LoRA's modules in the place
of the linears, torch.compile. Parameters stay the model's; a changed one is noticed by its address and version.

Arithmetic is in f32, and rounded to the model's type where the modules round: after norms, projections, rotary
embedding and residuals.
"""

import copy
from functools import cached_property
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache, DynamicLayer

from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_layer import CpuLayer
from moe_offload.decode_modules import (
    WEIGHT_TYPES,
    Inside,
    Snapshot,
    read_attention,
    read_norm,
    read_router,
)
from moe_offload.decode_plan import Experts, LayerPlan, StepBuffers, source_of
from moe_offload.decode_step import StepInputs
from moe_offload.kv_room import fill_to, make_room

MOST_SEQUENCES = 64  # beyond that Python's share is small, and torch's own modules do
MOST_PLANS = 4  # of a layer, for different numbers of sequences: each has memory for every thread
_KNOWN_ARGUMENTS = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "cache_position")
)
ATTENTIONS = ("sdpa", "eager")


def plain_call() -> bool:
    """Whether nothing around the model watches what its modules do: autocast, tracing, hooks on all modules."""
    if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    return not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def plain_cache(cache: Any) -> bool:
    """Whether it is one of transformers' own, held in memory."""
    return isinstance(cache, Cache) and type(cache).update is Cache.update and not cache.offloading


def is_plain_layer(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a cache's layer simply holds keys and values, some at least, and of the type of the hidden states."""
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return False
    # a cache in another type becomes what both types promote to
    return bool(layer.get_seq_length() and layer.keys.dtype == layer.values.dtype == dtype)


class DecodeModel:
    """What the decode layers of one model share: buffers per number of tokens, and the current step's inputs."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.inputs = StepInputs()
        self._buffers: dict[tuple[int, ...], StepBuffers] = {}

    def buffers(self, *sizes: int) -> StepBuffers:
        if sizes not in self._buffers:
            self._buffers.setdefault(sizes, StepBuffers(*sizes))
        return self._buffers[sizes]

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeModel":
        """A copied model shares weights and threads, but not the memory that a step works in."""
        return DecodeModel(self.engine)


class DecodeLayer:
    """Stands for a decoder layer's `forward`."""

    def __init__(self, shared: DecodeModel, layer: Any, experts: Experts | None) -> None:
        self.shared, self.layer, self.experts = shared, layer, experts
        self.snapshot = Snapshot()
        self._plans: dict[tuple[Any, ...], LayerPlan | None] = {}
        self._looked = True  # since the last step that was none

    @cached_property
    def _inside(self) -> Inside:
        return Inside(self.layer)

    @cached_property
    def _attention(self) -> Any:
        return self.layer.self_attn

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeLayer":
        """See `DecodeModel`."""
        return DecodeLayer(copy.deepcopy(self.shared, memo), copy.deepcopy(self.layer, memo), self.experts)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or args or not self._is_step(hidden_states, kwargs):
            self._looked = False
            return self._original(hidden_states, *args, **kwargs)
        cache = kwargs["past_key_values"].layers[self._attention.layer_idx]
        position = cache.keys.shape[2]
        cos, sin = kwargs["position_embeddings"]
        plan = self.plan(len(hidden_states), hidden_states.dtype, cos.shape[-1])
        step = self.shared.inputs.of(kwargs["attention_mask"], cos, sin, len(hidden_states), position + 1)
        if plan is None or step is None or not plan.takes(cache.keys, cache.values, position):
            return self._original(hidden_states, **kwargs)
        b = plan.buffers
        with self.shared.engine.in_flight(), b.lock:
            room = make_room(cache)
            b.x_tensor.copy_(hidden_states[:, 0])
            b.lengths[:] = position + 1
            b.starts[:] = step.starts
            plan.heads.point(step.cos_address, step.sin_address, step.cos_step)
            plan.run(room, position)
            fill_to(cache, room, position + 1)
            if plan.whole:
                self.count(plan)
                return b.out_tensor.to(hidden_states.dtype, copy=True)[:, None]
            after = b.after_tensor.to(hidden_states.dtype, copy=True)[:, None]
        return self._block(after)

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _block(self, after: torch.Tensor) -> torch.Tensor:
        """The second half of the layer, through its own modules."""
        mixed = self.layer.mlp(self.layer.post_attention_layernorm(after))
        result: torch.Tensor = after + (mixed[0] if isinstance(mixed, tuple) else mixed)
        return result

    def _is_step(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if type(hidden_states) is not torch.Tensor or hidden_states.dim() != 3:
            return False
        if hidden_states.shape[1] != 1 or len(hidden_states) > MOST_SEQUENCES:
            return False
        if hidden_states.device.type != "cpu" or hidden_states.dtype not in WEIGHT_TYPES or not plain_call():
            return False
        if torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(p.requires_grad for p in self.layer.parameters())
        ):
            return False
        if kwargs.keys() - _KNOWN_ARGUMENTS and any(
            value is not None and value is not False for name, value in kwargs.items() if name not in _KNOWN_ARGUMENTS
        ):
            return False
        if kwargs.get("position_embeddings") is None or "attention_mask" not in kwargs:
            return False
        cache: Any = kwargs.get("past_key_values")
        index = self._attention.layer_idx
        if not plain_cache(cache) or index >= len(cache.layers):
            return False
        if not is_plain_layer(cache.layers[index], hidden_states.dtype):
            return False
        if self._attention.config._attn_implementation not in ATTENTIONS:
            return False
        return not self.layer.training and self._inside.untouched()

    def plan(self, batch: int, dtype: torch.dtype, angles: int) -> LayerPlan | None:
        """The plan for steps of `batch` sequences, made anew where a parameter changed; None where there is none.

        angles: size of a row of the rotary embedding's cos and sin.
        """
        snapshot, plans = self.snapshot, self._plans
        if not (snapshot.holds() and (self._looked or snapshot.same())):
            # plans in other threads go on with what they were made of
            snapshot, plans = self.snapshot, self._plans = Snapshot(), {}
        self._looked = True
        key = batch, dtype, angles
        if key not in plans:
            if len(plans) >= MOST_PLANS:
                plans.pop(next(iter(plans)), None)
            plans[key] = self._make_plan(snapshot, batch, dtype, angles)
        return plans.get(key)  # another thread may have dropped it: then this step is not fused

    def _make_plan(self, snapshot: Snapshot, batch: int, dtype: torch.dtype, angles: int) -> LayerPlan | None:
        layer, model_type = self.layer, WEIGHT_TYPES[dtype]
        # `_inside` has to remember the modules that the plan reads
        if not self._inside.untouched() or (model_type == "f16" and not current_target().half):
            return None
        modules = read_attention(layer, snapshot)
        if modules is None:
            return None
        sources = [source_of(m, snapshot) for m in (*modules.projections, modules.output)]
        found = [source for source in sources if source is not None]
        if len(found) < 4 or len({(s.dtype, s.group) for s in found[:3]}) > 1:
            return None
        experts = self.experts
        if isinstance(experts, CpuLayer) and batch >= experts.gemm_rows:
            experts = None  # some may have so many rows that torch is to multiply them
        router = read_router(layer.mlp, snapshot) if experts is not None else None
        after_norm = read_norm(layer.post_attention_layernorm, snapshot) if router is not None else None
        heads = modules.heads
        width = heads.head_size
        buffers = self.shared.buffers(
            batch, found[3].outputs, heads.q_heads * width, heads.kv_heads * width,
            experts.num_experts if experts is not None else 0,
        )  # fmt: skip
        # gpt-oss gives each angle once, the others twice
        half = angles if type(layer).__name__ == "GptOssDecoderLayer" else angles // 2
        engine = self.shared.engine
        return LayerPlan(
            buffers, snapshot, modules, found, router if after_norm is not None else None, experts, after_norm,
            half, model_type, model_type, engine.options.activations, engine.team,
        )  # fmt: skip

    def count(self, plan: LayerPlan) -> None:
        """Add a step's experts to the statistics."""
        experts = plan.active_experts
        assert self.experts is not None
        self.shared.engine.count_step(plan.routed_rows, experts, experts * self.experts.bytes_per_expert)
