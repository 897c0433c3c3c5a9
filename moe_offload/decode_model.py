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
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from moe_offload.decode_layer import (
    ATTENTIONS,
    MOST_SEQUENCES,
    DecodeLayer,
    DecodeModel,
    is_plain_layer,
    plain_cache,
    plain_call,
)
from moe_offload.decode_linear import LEAST_WEIGHTS, DecodeLinear
from moe_offload.decode_modules import LAYER_CLASSES, WEIGHT_TYPES, Inside, Snapshot, is_transformers, read_norm
from moe_offload.dense_choice import dense_linears
from moe_offload.kv_room import Room, fill_to, known_room, make_room
from moe_offload.model_plan import ModelPlan
from moe_offload.rotary_table import RotaryTable

# inner models whose forward is: embedding, rotary embedding, one causal mask, the layers, a norm
MODEL_CLASSES = frozenset(f"{name}Model" for name in ("Qwen3Moe", "Mixtral", "Olmoe"))
_REPORTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class ModelStep:
    """Stands for an inner model's `forward`."""

    def __init__(self, shared: DecodeModel, model: Any, layers: Sequence[DecodeLayer]) -> None:
        self.shared, self.model, self.layers = shared, model, layers
        self._table = RotaryTable()
        self._known: tuple[tuple[Any, ...], ModelPlan | None, Snapshot] = ((), None, Snapshot())
        self._looked = True  # since the last call that was no step
        self._trusted = False  # untouched at the last step: whether it still is can be seen while the next one runs

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
        if not plain_cache(past_key_values) or len(past_key_values.layers) != len(self.layers):
            return None
        if not self._trusted and not self._untouched():
            return None
        weight, caches = self.model.embed_tokens.weight, past_key_values.layers
        if weight.dtype not in WEIGHT_TYPES or weight.device.type != "cpu":
            return None
        if not is_plain_layer(caches[0], weight.dtype):
            return None
        position = caches[0].keys.shape[2]
        starts = first_seen(attention_mask, batch, position + 1)
        if starts is None:
            return None
        embedded = torch.embedding(weight.detach(), input_ids)  # whether somebody trains it shows below
        rotary = self._rotary(position_ids, position, embedded)
        plan = None if rotary is None else self._plan(batch, weight.dtype, rotary[0].shape[1])
        if rotary is None or plan is None:
            return None
        with self.shared.engine.in_flight(), plan.buffers.lock:
            rooms = self._rooms(plan, caches, weight.dtype, position)
            if rooms is None:
                return None
            untouched = False

            def meanwhile() -> None:
                """What the others need not wait for. If the step does not count, nobody sees what it left in rooms."""
                nonlocal untouched
                untouched = self._untouched()
                if untouched:
                    for each, room in zip(caches, rooms, strict=True):
                        fill_to(each, room, position + 1)

            plan.begin(embedded[:, 0], starts, position + 1, *rotary)
            plan.run(rooms, position, meanwhile)
            self._trusted = untouched
            if not untouched:
                return None
            self._count(plan)
            hidden = plan.buffers.normed_tensor.to(weight.dtype, copy=True)[:, None]
        return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _rooms(self, plan: ModelPlan, caches: Sequence[Any], dtype: torch.dtype, position: int) -> list[Room] | None:
        """Every layer's buffers; None where a layer's cache does not go with the others, or with the plan."""
        rooms = []
        for layer, each in zip(plan.layers, caches, strict=True):
            room = known_room(each)
            if room is None:
                if not is_plain_layer(each, dtype) or not layer.takes(each.keys, each.values, position):
                    return None
                room = make_room(each)
            elif room.filled != position or room.dtype != dtype or room.shape != layer.cache_shape:
                return None
            rooms.append(room)
        return rooms

    def _untouched(self) -> bool:
        """Whether the model is as it was built, its layers ours, and nobody asked for more than its result."""
        model = self.model
        config = model.config
        if any(getattr(config, name, False) for name in _REPORTS) or not getattr(config, "return_dict", True):
            return False
        if getattr(config, "sliding_window", None) is not None:  # in the mask, which is not made here
            return False
        if config.num_hidden_layers != len(self.layers) or config._attn_implementation not in ATTENTIONS:
            return False
        if type(model.embed_tokens) is not nn.Embedding or model.embed_tokens.max_norm is not None:
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return False
        return not model.training and self._inside.untouched()

    def _rotary(
        self, position_ids: Any, position: int, like: torch.Tensor
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """cos and sin, f32 [B, D] or [1, D]; None for positions that are none."""
        if position_ids is None:
            position_ids = torch.full((1, 1), position)
        if type(position_ids) is not torch.Tensor or position_ids.device.type != "cpu":
            return None
        if position_ids.dtype != torch.int64 or position_ids.shape not in ((1, 1), (len(like), 1)):
            return None
        known = self._table.rows(self.model.rotary_emb, position_ids.numpy()[:, 0], like)
        if known is not None:
            return known
        cos, sin = self.model.rotary_emb(like, position_ids=position_ids)
        if cos.shape != sin.shape or cos.shape[:-1] != position_ids.shape:
            return None
        rows = [part[:, 0].detach().to(torch.float32).contiguous().numpy() for part in (cos, sin)]
        return rows[0], rows[1]

    def _plan(self, batch: int, dtype: torch.dtype, angles: int) -> ModelPlan | None:
        key = batch, dtype, angles
        known, plan, snapshot = self._known
        if known == key and self._looked and snapshot.holds():
            return plan
        layers = [each.plan(batch, dtype, angles) for each in self.layers]
        own = Snapshot()
        norm = read_norm(self.model.norm, own)
        whole = [each for each in layers if each is not None and each.whole]
        plan = None
        if norm is not None and len(whole) == len(layers) and all(p.buffers is whole[0].buffers for p in whole):
            plan = ModelPlan(whole, norm)
        self._known = key, plan, Snapshot.of_all([own, *(each.snapshot for each in self.layers)])
        self._looked = True
        return plan

    def _count(self, plan: ModelPlan) -> None:
        """Add a step's experts to the statistics."""
        rows, experts, bytes_read = plan.totals()
        self.shared.engine.count_step(rows, experts, bytes_read, len(plan.layers))


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


def attach(engine: Any, model: PreTrainedModel, experts: Mapping[str, Any]) -> list[nn.Module]:
    """Let the decode step run the decoder layers it knows, models of nothing but those, and large linears elsewhere.

    Returns the modules it took.
    experts: by the path of their module.
    """
    shared = DecodeModel(engine)
    taken: dict[int, DecodeLayer] = {}
    found: list[nn.Module] = []
    for path, module in model.named_modules():
        if is_transformers(module) and "forward" not in module.__dict__ and type(module).__name__ in LAYER_CLASSES:
            inside = [each for name, each in experts.items() if name.startswith(path + ".")]
            only = inside[0] if len(inside) == 1 and inside[0].kernel is not None else None
            module.__dict__["forward"] = taken[id(module)] = DecodeLayer(shared, module, only)
            found.append(module)
    for module in model.modules():
        if is_transformers(module) and "forward" not in module.__dict__ and type(module).__name__ in MODEL_CLASSES:
            layers: Any = module.layers
            standing = [taken[id(layer)] for layer in layers if id(layer) in taken]
            one_config = all(each.layer.self_attn.config is module.config for each in standing)
            in_order = [each.layer.self_attn.layer_idx for each in standing] == list(range(len(layers)))
            if standing and one_config and in_order and all(each.experts is not None for each in standing):
                module.__dict__["forward"] = ModelStep(shared, module, standing)
                found.append(module)
    fused = tuple(f"{path}." for path, module in model.named_modules() if id(module) in taken)
    head = model.get_output_embeddings()
    linears = dense_linears(model, engine.spec)
    if taken and type(head) is nn.Linear and head not in linears.values():
        linears[""] = head
    for path, linear in linears.items():
        large = linear.weight.numel() >= LEAST_WEIGHTS or (linear is head and bool(taken))
        if large and "forward" not in linear.__dict__ and not path.startswith(fused):
            linear.__dict__["forward"] = DecodeLinear(engine, linear)
            found.append(linear)
    return found


def detach(modules: list[nn.Module]) -> None:
    """Inverse of `attach`."""
    for module in modules:
        if isinstance(module.__dict__.get("forward"), DecodeLayer | ModelStep | DecodeLinear):
            del module.__dict__["forward"]
