"""What a model's parts weigh and cost, from its configuration and, where they are here, its shards' headers.

No weight is read: the architecture's modules are built without any (`build_skeleton`). Letters: E experts, K top-k.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.attention_layers import attention_layers
from moe_offload.decode_model import MODEL_CLASSES
from moe_offload.decode_modules import LAYER_CLASSES
from moe_offload.dense_choice import dense_linears
from moe_offload.loading import read_config
from moe_offload.models import compat
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import OptionError, UnsupportedModelError
from moe_offload.models.expert_weights import locate_experts
from moe_offload.models.spec import BITS_PER_WEIGHT, MoeSpec, build_skeleton
from moe_offload.options import Weights
from moe_offload.scheduling.memory_share import LayerKv

NARROWER = ("int8", "int4")  # what experts can be converted to
# Of torch's operations around a step over latents, beyond those of other attentions; measured on Zen 4.
_LATENT_MODULES = 9
DEVICE_ITEM = 2  # bytes of a weight on a card
_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class ExpertLayers:
    """MoE layers that are alike. nbytes: of one expert. flops_per_row: of one token in it."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    weights: str
    nbytes: int
    flops_per_row: int

    @property
    def total_bytes(self) -> int:
        """Of all experts of these layers."""
        return self.layers * self.experts * self.nbytes

    def active(self, tokens: int) -> float:
        """Experts of a layer that have any of so many tokens, where all are as likely."""
        return self.experts * (1 - (1 - min(self.top_k, self.experts) / self.experts) ** tokens)

    def rows(self, tokens: int) -> float:
        """Tokens of such an expert, on average."""
        return tokens * min(self.top_k, self.experts) / self.active(tokens)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model with its experts in one weight format, in bytes.

    weights, dense: formats of experts and of other linears on the CPU. step: how it decodes on the CPU: all layers in
    one launch ("whole"), a launch a layer ("layer") or transformers' modules ("modules"). modules: of a layer, without
    children, and what counts as such. dense_bytes: of what is read for every token besides experts and KV cache, on
    the CPU. dense_params: the same as a count. embedding_bytes: looked up, not read, beside those. kv: layers of one
    sequence's cache.
    expand_flops: what latent attention multiplies in a prompt for every position it keeps, in all layers; step_flops:
    the same of a decode step. copied_bytes: of matrices kept once more on the CPU, in f32, for such steps to read.
    """

    num_layers: int
    hidden: int
    max_context: int | None
    step: str
    modules: float
    weights: str
    dense: str
    groups: tuple[ExpertLayers, ...]
    dense_bytes: int
    dense_params: int
    embedding_bytes: int
    kv: tuple[LayerKv, ...]
    expand_flops: int
    step_flops: int
    copied_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        return sum(group.total_bytes for group in self.groups)

    @property
    def expert_count(self) -> int:
        """Of all layers."""
        return sum(group.layers * group.experts for group in self.groups)

    @property
    def host_bytes(self) -> int:
        """Of what lies in host memory besides experts and KV cache where the CPU runs everything."""
        return self.dense_bytes + self.embedding_bytes + self.copied_bytes

    @property
    def slot_bytes(self) -> int:
        """Of one expert slot on a card."""
        return max(-(-group.nbytes // 256) * 256 for group in self.groups)

    @property
    def device_bytes(self) -> int:
        """Of what goes to a card besides experts and KV cache: everything but the embedding, in 16 bits."""
        return DEVICE_ITEM * self.dense_params

    def kv_bytes(self, context: int, sequences: int) -> int:
        """Of the KV cache of all layers."""
        return sequences * sum(layer.nbytes(context) for layer in self.kv)


class PlannedModel:
    """A model's folder, read once; `sizes` for any weight format. Raises as `load` does for what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        self.skeleton: PreTrainedModel = build_skeleton(config)
        self.spec = MoeSpec.from_hf(config, self.skeleton)
        self.complete = any(folder.glob("*.safetensors"))
        self.stored = self._located(folder) if self.complete else _configured(config, self.spec)
        self.convertible = all(layer.activation is not None for layer in self.spec.layers)
        self._linears = sum(each.weight.numel() for each in dense_linears(self.skeleton, self.spec).values())
        self._read, self._embedding = _params(self.skeleton, self.spec)
        self._tied = _is_tied(self.skeleton)
        self._kv = _kv_layers(self.skeleton, _itemsize(self.spec.dtype))
        self._step = _step(self.skeleton)
        self._modules = _leaf_modules(self.skeleton, self.spec)

    def _located(self, folder: Path) -> str:
        checkpoint = Checkpoint.open(folder)
        try:
            located = locate_experts(self.skeleton, checkpoint, self.spec)
            return ", ".join(sorted({weights.format for weights in located.values()}))
        finally:
            checkpoint.close()

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that its experts can have, widest first."""
        if self.stored == "mxfp4" or not self.convertible:
            return (self.stored,)
        bits = BITS_PER_WEIGHT[self.stored]
        return (self.stored, *(name for name in NARROWER if BITS_PER_WEIGHT[name] < bits))

    def check(self, weights: str) -> None:
        """Raises OptionError or UnsupportedModelError for a format that its experts cannot have."""
        if weights not in get_args(Weights):
            raise OptionError(f"--weights {weights} is not one of {', '.join(get_args(Weights))}")
        if weights in NARROWER and not self.convertible:
            raise UnsupportedModelError(
                f"the experts of {self.spec.model_type!r} run through torch and have to stay {self.stored}: "
                f"--weights {weights} is not possible"
            )
        if weights not in ("auto", self.stored, *NARROWER):
            raise OptionError(
                f"--weights {weights}, but the experts are stored as {self.stored}: give that, int8, int4 or auto"
            )

    def sizes(self, weights: str) -> ModelSizes:
        """With experts in the format `weights`, not "auto"."""
        spec = self.spec
        item = _itemsize(spec.dtype)
        packed = weights in NARROWER or weights == "mxfp4"
        linears = round(self._linears * BITS_PER_WEIGHT["int8"] / 8) if packed else self._linears * item
        kinds = Counter(
            ExpertLayers(
                1, layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size, weights,
                layer.bytes_per_expert(weights), 2 * layer.params_per_expert,
            )
            for layer in spec.layers
        )  # fmt: skip
        groups = tuple(
            ExpertLayers(count, *(getattr(each, name) for name in ExpertLayers.__slots__[1:]))
            for each, count in kinds.items()
        )
        embedding = self._embedding * item if packed or not self._tied else 0
        return ModelSizes(
            spec.num_layers, spec.hidden_size, spec.max_context, self._step, self._modules, weights,
            "int8" if packed else _NAMES.get(spec.dtype, "f32"), groups, linears + (self._read - self._linears) * item,
            self._read, embedding, self._kv, *_latent_sizes(self.skeleton),
        )  # fmt: skip


def _configured(config: Any, spec: MoeSpec) -> str:
    """The experts' format as far as the configuration alone tells."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not isinstance(quantised, dict):
        quantised = quantised.to_dict()
    method = str((quantised or {}).get("quant_method", ""))
    return method if method in BITS_PER_WEIGHT else _NAMES.get(spec.dtype, "f32")


def _itemsize(dtype: str) -> int:
    found = getattr(torch, dtype, torch.float32)
    return int(found.itemsize) if isinstance(found, torch.dtype) else 4


def _params(model: PreTrainedModel, spec: MoeSpec) -> tuple[int, int]:
    """Parameters read for every token besides experts, and those of the embedding."""
    root = spec.layers[0].path.split(".layers.")[0] + "." if ".layers." in spec.layers[0].path else ""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    experts = tuple(f"{layer.path}." for layer in spec.layers)
    read = looked = 0
    for name, parameter in model.named_parameters():
        if name.startswith(experts) and not name.endswith("_bias"):
            continue
        if id(parameter) in heads or (name.startswith(root) and id(parameter) not in looked_up):
            read += parameter.numel()
        if id(parameter) in looked_up:
            looked += parameter.numel()
    return read, looked


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether head and embedding are one parameter."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding is not None and head is not None and embedding.weight is head.weight


def _kv_layers(model: PreTrainedModel, item: int) -> tuple[LayerKv, ...]:
    return tuple(LayerKv(item * layer.width, layer.schedulable, layer.window) for layer in attention_layers(model))


def _latent_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Operations for each position in a prompt and in a decode step, and bytes of copies, where latents are cached: all
    heads' keys and values are made of them, or a step attends over the latents (`latent_attention.py`).
    """
    expand = step = copied = 0
    module: Any
    for module in model.modules():
        projection = getattr(module, "kv_b_proj", None)
        if projection is None or not compat.caches_latents(type(module)):
            continue
        one = 2 * projection.weight.numel()
        expand += one
        if compat.only_attends_to_what_it_expands(type(module)):
            heads = projection.out_features // (module.qk_nope_head_dim + module.v_head_dim)
            step += 2 * heads * (2 * projection.in_features + module.qk_rope_head_dim)
            copied += 2 * one
        else:
            step += one
    return expand, step, copied


def _step(model: PreTrainedModel) -> str:
    inner = model.base_model
    layers = {type(layer).__name__ for layer in getattr(inner, "layers", ())}
    if not layers or not layers <= LAYER_CLASSES:
        return "modules"
    return "whole" if type(inner).__name__ in MODEL_CLASSES else "layer"


def _leaf_modules(model: PreTrainedModel, spec: MoeSpec) -> float:
    inside = [name for name, each in model.named_modules() if ".layers." in name and not any(each.children())]
    latent = sum(compat.only_attends_to_what_it_expands(type(each)) for each in model.modules())
    return (len(inside) + _LATENT_MODULES * latent) / max(spec.num_layers, 1)
