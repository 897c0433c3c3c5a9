"""transformers' own model with eager experts, of which only one decoder layer has its weights at a time.

transformers loads it, without what `_drop` takes out before: the experts, and the plain linears of the layers. `fill`
puts a layer's weights into it, bit for bit those of a plain load, `empty` takes them out again. What is left in memory
is the embeddings, the head, norms and routers, and of checkpoints that are quantised all that is not an expert.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_offload.dense_choice import Source, find_sources
from moe_offload.loading import read_config
from moe_offload.memory import require_memory
from moe_offload.models import compat
from moe_offload.models.errors import CheckpointError, MoeOffloadError, UnsupportedModelError, first_line
from moe_offload.models.skeleton import Skeleton, SkeletonQuantizer
from moe_offload.models.spec import model_class

_METHOD = "moe_offload_reference"


@dataclasses.dataclass(frozen=True, slots=True)
class _Linear:
    """A linear whose weight is not loaded."""

    module: nn.Linear
    source: Source
    dtype: torch.dtype


@dataclasses.dataclass(slots=True)
class Reference:
    """The model, its layers, and how each gets its weights. Valid until `close()`."""

    model: PreTrainedModel
    skeleton: Skeleton
    linears: Mapping[str, _Linear]
    dtype: torch.dtype
    layers: Mapping[str, nn.Module]  # by path, in order

    @property
    def head(self) -> nn.Module:
        """What makes logits."""
        found = self.model.get_output_embeddings()
        assert isinstance(found, nn.Module)
        return found

    @property
    def others(self) -> list[nn.Module]:
        """Modules with parameters of their own that are outside of the layers, the head among them."""
        inside = {each for layer in self.layers.values() for each in layer.modules()}
        above = {path.rpartition(".")[0] for path in self.layers}
        return [
            module
            for path, module in self.model.named_modules()
            if module not in inside
            and next(module.parameters(recurse=False), None) is not None
            and not any(each == path or each.startswith(f"{path}.") or not path for each in above)
        ]

    def fill(self, path: str) -> None:
        """Give a layer its weights."""
        inside = [each for each in self.skeleton.parameters if each.startswith(f"{path}.")]
        parameters = {each: self.skeleton.parameters[each] for each in inside}
        dataclasses.replace(self.skeleton, parameters=parameters, undo=()).restore(self.model, self.dtype)
        for each in self._linears(path):
            stored = each.source.rows(self.skeleton.checkpoint, 0, each.module.out_features, each.dtype)
            each.module.weight = nn.Parameter(stored.clone(), requires_grad=False)

    def empty(self, path: str) -> None:
        """Take them out again."""
        for name, parameters in self.skeleton.parameters.items():
            if name.startswith(f"{path}."):
                module = self.model.get_submodule(name)
                for parameter in parameters:
                    module.register_parameter(parameter, None)
        for each in self._linears(path):
            each.module.register_parameter("weight", None)

    def close(self) -> None:
        """Unmap the checkpoint."""
        self.skeleton.checkpoint.close()

    def _linears(self, path: str) -> list[_Linear]:
        return [each for name, each in self.linears.items() if name.startswith(f"{path}.")]


def load_reference(
    folder: Path, *, dtype: Any = "auto", attn_implementation: str | None = None, memory_limit: int | None = None
) -> Reference:
    """The model in `folder`, its layers empty; dtype and attn_implementation as in `from_pretrained`.

    Raises CheckpointError, UnsupportedModelError or NotEnoughMemoryError.
    """
    config = read_config(folder)
    inner = getattr(config, "quantization_config", None)
    if inner is not None:
        del config.quantization_config
        inner = inner if isinstance(inner, dict) else inner.to_dict()
    ours = ReferenceConfig(inner=inner, memory_limit=memory_limit)
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model, info = model_class(config).from_pretrained(
            folder, config=config, dtype=dtype, quantization_config=ours, output_loading_info=True, **more
        )
    except MoeOffloadError:
        raise
    except (
        SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"transformers could not load {folder}: {first_line(error)}") from error
    reference: Reference = model.__dict__.pop("verify_reference")
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        reference.close()
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, such as {missing[0]!r}: the checkpoint is incomplete or of "
            "another architecture than its config.json says"
        )
    model.eval()
    return reference


@register_quantization_config(_METHOD)
class ReferenceConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Asks `from_pretrained` for the reference. `inner`: as in `MoeOffloadConfig`."""

    def __init__(
        self, inner: dict[str, Any] | None = None, memory_limit: int | None = None, quant_method: str = _METHOD
    ) -> None:
        self.quant_method = quant_method
        self.inner = inner
        self.memory_limit = memory_limit


@register_quantizer(_METHOD)
class _ReferenceQuantizer(SkeletonQuantizer):
    """Takes the layers' linears out before loading, and gives the model its own experts code back after it."""

    def check(self, model: PreTrainedModel, skeleton: Skeleton) -> None:
        if model.get_output_embeddings() is None:
            raise UnsupportedModelError(f"{type(model).__name__} makes no logits: there is nothing to compare")
        self._layers = _layers(model, skeleton)
        # of a quantised checkpoint the inner quantizer has plans for the linears
        self._linears = _drop(model, skeleton, self._layers) if self.inner is None else {}
        config: ReferenceConfig = self.quantization_config
        kept = sum(parameter.nbytes for parameter in model.parameters())
        largest = max(_layer_bytes(path, skeleton, self._linears, model.dtype) for path in self._layers)
        require_memory(kept + largest, config.memory_limit, "the reference's embeddings, head and largest layer")

    def attach(self, model: PreTrainedModel, skeleton: Skeleton, dtype: torch.dtype) -> None:
        dataclasses.replace(skeleton, parameters={}).restore(model, dtype)
        model.set_experts_implementation("eager")
        layers = {path: model.get_submodule(path) for path in self._layers}
        model.__dict__["verify_reference"] = Reference(model, skeleton, self._linears, dtype, layers)


def _layers(model: PreTrainedModel, skeleton: Skeleton) -> list[str]:
    """Paths of the decoder's layers: the members of the outermost lists that experts are in."""
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for layer in skeleton.spec.layers:
        parts = layer.path.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts)))
        outer = next((each for each in above if isinstance(modules[each], nn.ModuleList)), None)
        if outer is None:
            raise UnsupportedModelError(f"{layer.path} is in no list of layers: the reference cannot be run by layers")
        found.update((f"{outer}.{name}", None) for name, _ in modules[outer].named_children())
    return list(found)


def _drop(model: PreTrainedModel, skeleton: Skeleton, layers: list[str]) -> dict[str, _Linear]:
    """Take the weights out of the layers' linears, as far as they are stored as they are."""
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    precise = re.compile("|".join(map(re.escape, kept)) or r"(?!)")
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    linears = {
        path: module
        for layer in layers
        for path, module in model.get_submodule(layer).named_modules(prefix=layer)
        if type(module) is nn.Linear
        and uses[id(module.weight)] == 1
        and not precise.search(path)
        # small, and set by what is around them when a model is initialised
        and "router" not in type(model.get_submodule(path.rpartition(".")[0])).__name__.lower()
    }
    sources = find_sources(model, skeleton.checkpoint, skeleton.weights.values(), linears)
    dropped = {path: _Linear(linears[path], source, linears[path].weight.dtype) for path, source in sources.items()}
    for each in dropped.values():
        each.module.register_parameter("weight", None)
    compat.ignore_unexpected_keys(model, list(dropped))
    return dropped


def _layer_bytes(path: str, skeleton: Skeleton, linears: Mapping[str, _Linear], dtype: torch.dtype) -> int:
    inside = f"{path}."
    experts = (
        p.numel() for name, each in skeleton.parameters.items() if name.startswith(inside) for p in each.values()
    )
    dense = (
        each.module.out_features * each.module.in_features for name, each in linears.items() if name.startswith(inside)
    )
    return (sum(experts) + sum(dense)) * dtype.itemsize
