"""`MoeSpec`: what the engine needs to know about a model, read once from its Hugging Face configuration.

The figures come from the architecture's own modules, built without weights, so that no list of model types has to
be kept: which layers have experts, their shapes and activation, and the parameter counts are those of the real
model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_offload.cpu_kernels.layout import Activation
from moe_offload.models.activation import probe_gate
from moe_offload.models.adapters import find_experts
from moe_offload.models.errors import UnsupportedModelError

# Bits per weight, scales included. int8 and int4: groups of 32 with an f16 scale; mxfp4: groups of 32 with an 8-bit
# scale; fp8: blocks of 128 x 128 with an f32 scale, whose share is below 0.01 bit.
BITS_PER_WEIGHT: Mapping[str, float] = {
    "f32": 32,
    "bf16": 16,
    "f16": 16,
    "fp8": 8,
    "int8": 8.5,
    "int4": 4.5,
    "mxfp4": 4.25,
}

_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


@dataclass(frozen=True, slots=True)
class MoeLayerSpec:
    """The routed experts of one decoder layer."""

    path: str  # of the experts module, such as model.layers.3.mlp.experts
    layer: int  # decoder layer number
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    bias: bool
    activation: Activation | None  # None: only the module itself knows, its layer runs through torch
    interleaved: bool  # gate and up alternate in the module's own parameter
    transposed: bool  # the module's own parameters are [in, out]

    @property
    def params_per_expert(self) -> int:
        """Weights of one expert, without biases."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    def bytes_per_expert(self, weights: str) -> int:
        """Bytes of one expert in the weight format `weights` (a key of BITS_PER_WEIGHT), scales included."""
        return round(self.params_per_expert * BITS_PER_WEIGHT[weights] / 8)


@dataclass(frozen=True)
class MoeSpec:
    """One Mixture-of-Experts model, independent of where its weights are."""

    model_type: str
    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int | None
    layers: tuple[MoeLayerSpec, ...]
    non_expert_params: int  # everything but the routed experts' matrices
    shared_expert_params: int

    @cached_property
    def expert_params(self) -> int:
        """Weights of all routed experts."""
        return sum(layer.num_experts * layer.params_per_expert for layer in self.layers)

    @property
    def total_params(self) -> int:
        """All parameters of the model."""
        return self.non_expert_params + self.expert_params

    @property
    def active_params(self) -> int:
        """Parameters that take part in one token: everything but the experts it is not routed to."""
        return self.non_expert_params + sum(layer.top_k * layer.params_per_expert for layer in self.layers)

    def expert_bytes(self, weights: str) -> int:
        """Bytes of all routed experts in the weight format `weights`."""
        return sum(layer.num_experts * layer.bytes_per_expert(weights) for layer in self.layers)

    def bytes_per_token(self, weights: str) -> int:
        """Bytes of expert weights that one token reads in the weight format `weights`."""
        return sum(layer.top_k * layer.bytes_per_expert(weights) for layer in self.layers)

    @classmethod
    def from_hf(cls, config: PreTrainedConfig, model: PreTrainedModel | None = None) -> "MoeSpec":
        """Read the specification from a Hugging Face configuration.

        `model` is the architecture's skeleton where the caller has it already (on meta, expert parameters in
        place); it is built from `config` otherwise. No weight is read or allocated.

        Raises UnsupportedModelError when the architecture has no routed experts that the engine can run.
        """
        if model is None:
            model = build_skeleton(config)
        found = find_experts(model)
        layers = tuple(_layer_spec(path, model, experts) for path, experts in found.items())
        matrices = {
            id(p)
            for module in found.values()
            for name, p in module.named_parameters(recurse=False)
            if not name.endswith("_bias")
        }
        matrices |= _untied_head(config, model)
        others = [(name, p) for name, p in model.named_parameters() if id(p) not in matrices]
        text = config.get_text_config(decoder=True)
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
        return cls(
            model_type=config.model_type,
            architecture=type(model).__name__,
            dtype=str(dtype).removeprefix("torch."),
            num_layers=int(getattr(text, "num_hidden_layers", len(layers))),
            hidden_size=int(text.hidden_size),
            vocab_size=int(text.vocab_size),
            max_context=getattr(text, "max_position_embeddings", None),
            layers=layers,
            non_expert_params=sum(p.numel() for _, p in others),
            shared_expert_params=sum(p.numel() for name, p in others if re.search(r"\.shared_(expert|mlp)", name)),
        )


def _untied_head(config: PreTrainedConfig, model: PreTrainedModel) -> set[int]:
    """Ids of the output head's weights where they will be the embedding's and are not yet: while a model is loaded."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or not getattr(config, "tie_word_embeddings", False):
        return set()
    return {id(head.weight)} - {id(embedding.weight)}


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, on the meta device: modules and shapes, no memory."""
    try:
        with torch.device("meta"):
            return model_class(config)._from_config(config)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UnsupportedModelError(f"transformers cannot build {config.model_type!r}: {error}") from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `load` makes: a causal language model, else what the checkpoint's `architectures` says."""
    import transformers

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
        return chosen
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise UnsupportedModelError(
        f"{config.model_type!r} is not a text-generating architecture that this transformers knows"
    )


def _layer_spec(path: str, model: PreTrainedModel, experts: nn.Module) -> MoeLayerSpec:
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters(recurse=False)}
    first = shapes.get("gate_up_proj") or shapes["up_proj"]
    down = shapes["down_proj"]
    # Undecorated modules (llama4) do not declare it; their shapes tell, H being shared by both parameters.
    transposed = bool(getattr(experts, "is_transposed", down[1] != first[2]))
    hidden, intermediate = down[1:][:: -1 if transposed else 1]
    probe = probe_gate(experts)
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return MoeLayerSpec(
        path=path,
        layer=numbers[0] if numbers else 0,
        num_experts=down[0],
        top_k=_top_k(path, model),
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated="gate_up_proj" in shapes,
        bias="down_proj_bias" in shapes,
        # A norm behind each expert (muse_spark) is the module's business as well.
        activation=None if getattr(experts, "has_post_expert_norm", False) else probe.activation,
        interleaved=probe.interleaved,
        transposed=transposed,
    )


def _top_k(path: str, model: PreTrainedModel) -> int:
    """Experts per token: from the block around the experts, its router, or the configuration."""
    block = model.get_submodule(path.rpartition(".")[0])
    places = [block, *block.children(), model.config.get_text_config(decoder=True)]
    for place in places:
        for name in _TOP_K_NAMES:
            value = getattr(place, name, None)
            if type(value) is int and value > 0:
                return value
    raise UnsupportedModelError(f"cannot tell how many experts a token of {path} is routed to")
