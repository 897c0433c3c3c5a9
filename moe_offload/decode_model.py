"""The fused decode step of a whole model: all of its decoder layers in one launch.

Between two fused layers transformers runs some 250 us of Python on caches that the weights have just swept (measured on
Zen 4), and as much again for masks and embeddings. `ModelStep` stands in the place of the inner model's `forward` where
every layer's step is one chain that ends with its experts, and runs their chains as one. Whatever it does not know goes
to the original, layer by layer (decode_layer.py).
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from moe_offload.cpu_kernels.hand_over import HandOver
from moe_offload.cpu_kernels.matrices import Norm
from moe_offload.cpu_kernels.stages import Chain, Stage
from moe_offload.cpu_layer import PackedLayer
from moe_offload.decode_layer import MOST_SEQUENCES, DecodeLayer, DecodeModel, plain_cache, plain_call
from moe_offload.decode_modules import LAYER_CLASSES, WEIGHT_TYPES, Inside, Snapshot, is_transformers, read_norm
from moe_offload.decode_plan import LayerPlan
from moe_offload.kv_room import fill_to, make_room

# inner models whose forward is: embedding, rotary embedding, one causal mask, the layers, a norm
MODEL_CLASSES = frozenset(f"{name}Model" for name in ("Qwen3Moe", "Mixtral", "Olmoe"))
_REPORTS = ("output_attentions", "output_hidden_states", "output_router_logits")


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

    def run(self, rooms: Sequence[tuple[torch.Tensor, torch.Tensor]], position: int) -> None:
        """Run the step; see `LayerPlan.run`. The result, behind the norm, is in buffers.normed."""
        for plan, (keys, values) in zip(self.layers, rooms, strict=True):
            plan.place(keys, values, position)
        stages = [plan.stages for plan in self.layers]
        if self._chain is None or stages != self._stages:
            parts = zip(stages, self._hand_overs, strict=True)
            self._chain = Chain([stage for layer, hand_over in parts for stage in (*layer, hand_over.stage)])
            self._stages = stages
        self._chain.run(self.layers[0].team)


class ModelStep:
    """Stands for an inner model's `forward`."""

    def __init__(self, shared: DecodeModel, model: Any, layers: Sequence[DecodeLayer]) -> None:
        self.shared, self.model, self.layers = shared, model, layers
        self._snapshot = Snapshot()
        self._plan: ModelPlan | None = None
        self._looked = True  # since the last call that was no step

    @cached_property
    def _inside(self) -> Inside:
        return Inside(self.model, {id(each.layer): each for each in self.layers})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelStep":
        """See `DecodeModel`."""
        shared, model = copy.deepcopy(self.shared, memo), copy.deepcopy(self.model, memo)
        return ModelStep(shared, model, copy.deepcopy(self.layers, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_compiling() or args or not plain_call()):
            result = self._step(**kwargs)
            if result is not None:
                return result
        self._looked = False
        return type(self.model).forward(self.model, *args, **kwargs)

    def _step(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> MoeModelOutputWithPast | None:
        """The step's result; None where it is no such step."""
        if type(input_ids) is not torch.Tensor or input_ids.dim() != 2 or input_ids.device.type != "cpu":
            return None
        batch, count = input_ids.shape
        if count != 1 or batch > MOST_SEQUENCES or any(v is not None and v is not False for v in others.values()):
            return None
        if not plain_cache(past_key_values) or not self._untouched():
            return None
        model, dtype = self.model, self.model.embed_tokens.weight.dtype
        if dtype not in WEIGHT_TYPES or not all(each.reads(past_key_values, dtype) for each in self.layers):
            return None
        caches = past_key_values.layers
        position = caches[0].keys.shape[2]
        if len(caches) != len(self.layers) or any(each.keys.shape[2] != position for each in caches):
            return None
        starts = first_seen(attention_mask, batch, position + 1)
        if starts is None:
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), position)
        embedded = model.embed_tokens(input_ids)
        cos, sin = model.rotary_emb(embedded, position_ids=position_ids)
        step = self.shared.inputs.of(None, cos, sin, batch, position + 1)
        plan = self._plan_for(batch, dtype, cos)
        if step is None or plan is None:
            return None
        if not all(p.takes(c.keys, c.values) for p, c in zip(plan.layers, caches, strict=True)):
            return None
        buffers = plan.buffers
        with self.shared.engine.in_flight(), buffers.lock:
            rooms = [make_room(each) for each in caches]
            buffers.x_tensor.copy_(embedded[:, 0])
            buffers.lengths[:] = position + 1
            buffers.starts[:] = starts
            for layer in plan.layers:
                layer.heads.point(step.cos_address, step.sin_address, step.cos_step)
            plan.run(rooms, position)
            for each, (keys, values) in zip(caches, rooms, strict=True):
                fill_to(each, keys, values, position + 1)
            for standing, layer in zip(self.layers, plan.layers, strict=True):
                standing.count(layer)
            hidden = buffers.normed_tensor.to(dtype, copy=True)[:, None]
        return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _untouched(self) -> bool:
        """Whether the model is as it was built, its layers ours, and nobody asked for more than its result."""
        model = self.model
        config = model.config
        if any(getattr(config, name, False) for name in _REPORTS) or not getattr(config, "return_dict", True):
            return False
        if config.num_hidden_layers != len(self.layers) or type(model.embed_tokens) is not nn.Embedding:
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return False
        return not model.training and self._inside.untouched()

    def _plan_for(self, batch: int, dtype: torch.dtype, cos: torch.Tensor) -> ModelPlan | None:
        layers = [each.plan(batch, dtype, cos) for each in self.layers]
        last, snapshot = self._plan, self._snapshot
        sound = snapshot.holds() and (self._looked or snapshot.same())
        self._looked = True
        if last is None or not sound or list(last.layers) != layers:
            self._snapshot = snapshot = Snapshot()
            norm = read_norm(self.model.norm, snapshot)
            whole = [each for each in layers if each is not None and each.whole]
            if norm is None or len(whole) < len(layers) or any(p.buffers is not whole[0].buffers for p in whole):
                self._plan = None
                return None
            last = self._plan = ModelPlan(whole, norm)
        return last


def first_seen(mask: Any, batch: int, length: int) -> NDArray[np.int64] | None:
    """The first position that each sequence sees, from a mask [B, length]; None for one that is not a left padding."""
    if mask is None:
        return np.zeros(batch, np.int64)
    if type(mask) is not torch.Tensor or mask.shape != (batch, length) or mask.device.type != "cpu":
        return None
    seen = (mask != 0).numpy()
    starts = seen.argmax(axis=1)
    if not np.array_equal(seen, np.arange(length) >= starts[:, None]):
        return None
    first: NDArray[np.int64] = starts.astype(np.int64)
    return first


def attach(engine: Any, model: nn.Module, experts: Mapping[str, Any]) -> list[nn.Module]:
    """Let the decode step run the decoder layers it knows, and models of nothing but those; the modules it took.

    experts: by the path of their module.
    """
    shared = DecodeModel(engine)
    taken: dict[int, DecodeLayer] = {}
    found: list[nn.Module] = []
    for path, module in model.named_modules():
        if is_transformers(module) and "forward" not in module.__dict__ and type(module).__name__ in LAYER_CLASSES:
            inside = [each for name, each in experts.items() if name.startswith(path + ".")]
            packed = inside[0] if len(inside) == 1 and isinstance(inside[0], PackedLayer) else None
            module.__dict__["forward"] = taken[id(module)] = DecodeLayer(shared, module, packed)
            found.append(module)
    for module in model.modules():
        if is_transformers(module) and "forward" not in module.__dict__ and type(module).__name__ in MODEL_CLASSES:
            layers: Any = module.layers
            standing = [taken[id(layer)] for layer in layers if id(layer) in taken]
            in_order = [each.layer.self_attn.layer_idx for each in standing] == list(range(len(layers)))
            if standing and in_order and all(each.experts is not None for each in standing):
                module.__dict__["forward"] = ModelStep(shared, module, standing)
                found.append(module)
    return found


def detach(modules: list[nn.Module]) -> None:
    """Inverse of `attach`."""
    for module in modules:
        if isinstance(module.__dict__.get("forward"), DecodeLayer | ModelStep):
            del module.__dict__["forward"]
