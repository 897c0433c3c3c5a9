"""A model without its expert weights: the quantizer hook that transformers calls around loading.

Protocol, inside one `from_pretrained`:

1. transformers builds the model on meta and calls `_process_model_before_weight_loading` with the checkpoint's files.
   Here the experts are found, their stored weights located, undecorated classes adapted, and their parameters dropped.
   What has no parameter is never read: transformers loads the rest as usual.
2. A checkpoint that is quantised already (FP8 blocks, MXFP4) has a quantizer of its own, the *inner* one. It sees the
   model with the experts hidden, so that it rewrites everything but them, and handles the rest of the weights.
3. transformers calls `_process_model_after_weight_loading`. The subclass attaches its engine to the experts modules.

`Skeleton.restore` is the inverse: it puts parameters, classes and configuration back as a plain load would have
left them.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from moe_offload.models import compat
from moe_offload.models.adapters import adapt
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.dequantize import read_matrix
from moe_offload.models.errors import UnsupportedModelError
from moe_offload.models.expert_weights import SUPPORTED_FORMATS, ExpertWeights, locate_experts
from moe_offload.models.experts_function import NAME, detach_handle
from moe_offload.models.loaded_weights import check_loaded_weights
from moe_offload.models.spec import MoeLayerSpec, MoeSpec

# Quantisation methods whose experts can be read in place, as config.json names them.
INNER_METHODS = ("fp8", "mxfp4")


@dataclass(frozen=True)
class Skeleton:
    """A model whose expert parameters were dropped, and what is needed to run or to restore them."""

    spec: MoeSpec
    checkpoint: Checkpoint
    weights: dict[str, ExpertWeights]
    parameters: dict[str, dict[str, nn.Parameter]]  # the dropped ones, on meta
    undo: tuple[Callable[[], None], ...]

    def layer_spec(self, path: str) -> MoeLayerSpec:
        """The specification of the experts module at `path`."""
        return next(layer for layer in self.spec.layers if layer.path == path)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Skeleton":
        """Copies of a model share the mapped files."""
        return self

    def restore(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Make `model` what a plain load gives: expert parameters in memory, no trace of this package."""
        for path, parameters in self.parameters.items():
            module = model.get_submodule(path)
            detach_handle(module)
            for name, meta in parameters.items():
                value = self._parameter(path, name, meta, dtype)
                module.register_parameter(name, nn.Parameter(value, requires_grad=meta.requires_grad))
        for undo in self.undo:
            undo()

    def _parameter(self, path: str, name: str, meta: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        spec, weights = self.layer_spec(path), self.weights[path]
        value = torch.empty(meta.shape, dtype=dtype)
        for expert in range(weights.num_experts):
            value[expert] = self._expert_parameter(spec, weights, name, expert, dtype)
        value[weights.num_experts :] = 0  # longcat_flash's identities have rows, but no weights
        return value

    def _expert_parameter(
        self, spec: MoeLayerSpec, weights: ExpertWeights, name: str, expert: int, dtype: torch.dtype
    ) -> torch.Tensor:
        bias = name.endswith("_bias")
        if name.startswith("down_proj"):
            parts = [weights.down_bias if bias else weights.down]
        elif bias:
            parts = [weights.gate_bias, weights.up_bias]
        else:
            parts = [weights.gate, weights.up]
        rows = [
            read_matrix(part, weights.format if part.scales else "f32", self.checkpoint, expert, dtype)
            for part in parts
            if part is not None
        ]
        if len(rows) == 2 and spec.interleaved:
            fused = torch.stack(rows, dim=1).flatten(0, 1)
        else:
            fused = torch.cat(rows)
        return fused.T if spec.transposed and not bias else fused


class SkeletonQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a model without its experts. Subclasses say what runs them (`attach`)."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Nothing is quantised on the fly, so transformers may keep its threaded loader.
        self.pre_quantized = True
        self.inner: HfQuantizer | None = None
        inner = getattr(quantization_config, "inner", None)
        if inner is not None:
            self.inner = inner_quantizer(inner)
        self.skeleton: Skeleton | None = None
        self._built: dict[str, torch.dtype] = {}

    @abstractmethod
    def check(self, model: PreTrainedModel, skeleton: Skeleton) -> None:
        """Called before anything is loaded, with the skeleton of what will be; raises what speaks against loading."""

    @abstractmethod
    def attach(self, model: PreTrainedModel, skeleton: Skeleton, dtype: torch.dtype) -> None:
        """Called when everything but the experts is loaded."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise UnsupportedModelError(
                f"experts are read in place from safetensors files, not from {[f.name for f in files[:3]] or 'memory'}"
            )
        spec = MoeSpec.from_hf(model.config, model)
        checkpoint = Checkpoint(files)
        weights = locate_experts(model, checkpoint, spec)
        experts = set().union(*(each.keys for each in weights.values()))
        check_loaded_weights(model, checkpoint, experts, quantised=self.inner is not None)
        saved = compat.experts_implementations(model)
        undo = [adapt(model), lambda: compat.restore_experts_implementations(saved)]
        parameters = {}
        for layer in spec.layers:
            module = model.get_submodule(layer.path)
            parameters[layer.path] = dict(module.named_parameters(recurse=False))
            for name in parameters[layer.path]:
                module.register_parameter(name, None)
            # Nothing to initialise: the model's own _init_weights would touch the dropped parameters.
            module._is_hf_initialized = True
        undo.append(compat.ignore_unexpected_keys(model, list(parameters)))
        self.skeleton = Skeleton(spec, checkpoint, weights, parameters, tuple(undo))
        self.check(model, self.skeleton)
        # also of what an inner quantizer decodes: FP8 becomes bfloat16, whatever was asked for
        self._built = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if self.inner is not None:
            hidden = {path: model.get_submodule(path) for path in parameters}
            for path in hidden:
                model.set_submodule(path, nn.Identity())
            self.inner._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
            for path, module in hidden.items():
                model.set_submodule(path, module)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.inner is not None:
            self.inner._process_model_after_weight_loading(model, **kwargs)
        compat.cast_as_built(model, self._built)
        assert self.skeleton is not None
        model.set_experts_implementation(NAME)
        self.attach(model, self.skeleton, model.dtype)
        return model

    # What the inner quantizer has to say about the weights that are loaded.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.inner is not None:
            self.inner.validate_environment(*args, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.inner.update_dtype(dtype) if self.inner is not None else dtype

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        return self.inner.update_device_map(device_map) if self.inner is not None else device_map

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        get_new_dtype = super().get_new_dtype if self.inner is None else self.inner.get_new_dtype
        chosen: torch.dtype | None = get_new_dtype(converter, param, dtype)
        return chosen

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.inner is not None and self.inner.param_needs_quantization(model, param_name, **kwargs)

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        if self.inner is not None:
            return self.inner.update_weight_conversions(weight_conversions, *args)
        return weight_conversions

    def is_serializable(self, *args: Any) -> bool:
        """save_pretrained is refused: the experts are not in the model."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """No: the static cache would make generate() compile a forward that leaves torch at every layer."""
        return False


def inner_quantizer(config: dict[str, Any]) -> HfQuantizer:
    """transformers' own quantizer for what is not an expert, dequantising: old cards and CPUs have no FP8 or FP4
    linears.
    """
    method = config.get("quant_method")
    if method not in INNER_METHODS:
        raise UnsupportedModelError(f"the checkpoint is quantised with {method!r}; supported are {SUPPORTED_FORMATS}")
    return AutoHfQuantizer.from_config(
        AutoQuantizationConfig.from_dict({**config, "dequantize": True}), pre_quantized=True
    )
