"""`MoeOffloadConfig` and its quantizer: how transformers' `from_pretrained` comes to build our engine.

Importing this module registers both with transformers, and the experts function with its experts interface.
"""

import json
import os
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_offload.conversion import StoredExperts
from moe_offload.device_choice import open_device
from moe_offload.device_modules import device_bytes
from moe_offload.engine import Engine
from moe_offload.memory import memory_room, require_memory
from moe_offload.models import experts_function
from moe_offload.models.errors import OptionError
from moe_offload.models.skeleton import Skeleton, SkeletonQuantizer
from moe_offload.options import Activations, Dense, Options, Progress, Weights
from moe_offload.packs import open_pack
from moe_offload.sizes import parse_size
from moe_offload.transfer.accelerator import Accelerator
from moe_offload.weight_choice import WeightChoice, choose_weights

METHOD = "moe_offload"


@register_quantization_config(METHOD)
class MoeOffloadConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Load a model with its experts left in the checkpoint: `from_pretrained(path,
    quantization_config=MoeOffloadConfig())`.

    Parameters are those of `Options`; sizes may be strings such as "6GiB". `inner` is the configuration of a checkpoint
    that is quantised already, as in its config.json; `moe_offload.load` fills it in. `progress` is called while experts
    are converted and kernels compiled.
    """

    def __init__(
        self,
        weights: Weights = "auto",
        threads: int | None = None,
        memory_limit: int | None = None,
        gemm_rows: int | None = None,
        activations: Activations = "auto",
        pack_dir: str | os.PathLike[str] | None = None,
        dense: Dense = "auto",
        fused_decode: bool = True,
        *,
        device: str = "auto",
        gpu_memory: str | int | None = None,
        ram: str | int | None = None,
        policy: str = "ours",
        overlap: bool = True,
        predictor: str | os.PathLike[str] = "auto",
        adapt: bool = True,
        cuda_graphs: bool = False,
        inner: dict[str, Any] | None = None,
        progress: Progress | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise OptionError(f"quant_method={quant_method!r} is not {METHOD!r}")
        self.quant_method = METHOD
        self.options = Options(
            weights, threads, memory_limit, gemm_rows, activations, pack_dir, dense, fused_decode, device,
            parse_size(gpu_memory, "gpu_memory"), parse_size(ram, "ram"), policy, overlap,
            predictor, adapt, cuda_graphs,
        )  # fmt: skip
        self.inner = inner
        self.progress = progress

    def to_dict(self) -> dict[str, Any]:
        """What goes into a serialised configuration: the options that differ from their defaults."""
        values = {name: getattr(self.options, name) for name in Options.__slots__}
        for name in ("pack_dir", "predictor"):
            if values[name] is not None:
                values[name] = os.fspath(values[name])
        default = Options()
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        return {"quant_method": METHOD, **changed}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


@register_quantizer(METHOD)
class MoeOffloadQuantizer(SkeletonQuantizer):
    """Checks the options against the model, has the experts converted, and puts the engine behind them."""

    choice = WeightChoice(None)
    accelerator: Accelerator | None = None

    def check(self, model: PreTrainedModel, skeleton: Skeleton) -> None:
        options: Options = self.quantization_config.options
        needed = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        # before anything is loaded: what is loaded would count as taken
        room = memory_room(options.memory_limit)
        self.choice = choose_weights(options.weights, stored_experts(skeleton), needed, room)
        require_memory(needed, options.memory_limit, "the non-expert weights")
        self.accelerator = open_device(options, device_bytes(model))

    def attach(self, model: PreTrainedModel, skeleton: Skeleton, dtype: torch.dtype) -> None:
        config: MoeOffloadConfig = self.quantization_config
        pack = open_pack(self.choice, stored_experts(skeleton), config.options, config.progress)
        model.offload = Engine(model, skeleton, config.options, dtype, config.progress, pack, self.accelerator)
        model.offload.start_predictor(config.progress)


def stored_experts(skeleton: Skeleton) -> StoredExperts:
    """What of a skeleton can be converted."""
    return StoredExperts(skeleton.spec, skeleton.checkpoint, skeleton.weights)


experts_function.register()
