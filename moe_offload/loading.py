"""`load`: a folder or a Hub id in, an ordinary transformers model out, its experts left where they are."""

import gc
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_offload.config import MoeOffloadConfig
from moe_offload.device_dtype import dtype_for_device
from moe_offload.model_folder import find_model
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import CheckpointError, MoeOffloadError, first_line
from moe_offload.models.spec import MoeSpec, model_class
from moe_offload.options import Activations, Dense, Progress, Weights

logger = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str],
    *,
    weights: Weights = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    gemm_rows: int | None = None,
    activations: Activations = "auto",
    pack_dir: str | os.PathLike[str] | None = None,
    dense: Dense = "auto",
    fused_decode: bool = True,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    ram: str | int | None = None,
    policy: str = "ours",
    overlap: bool = True,
    predictor: str | os.PathLike[str] = "auto",
    adapt: bool = True,
    cuda_graphs: bool = False,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts model, its expert weights mapped from the checkpoint, or from a pack of them quantised.

    model: a folder in Hugging Face format, the id of a model on the Hub, or "demo" for the model in this package.
    weights, threads, memory_limit, gemm_rows, activations, pack_dir, dense, fused_decode, device, gpu_memory, ram,
    policy, overlap, predictor, adapt, cuda_graphs: see `Options`; sizes may be strings such as "6GiB".
    dtype, attn_implementation, device_map, revision, token, cache_dir, local_files_only: as in transformers'
        `from_pretrained`. On a card without bfloat16 dtype="auto" makes float16 of it, or float32 (`device_dtype.py`).
    progress: called with (what, done, total) while weights are converted (bytes) and kernels are compiled.

    Returns the ordinary transformers model; `model.offload` is the engine (`spec`, `options`, `statistics`, `close()`).

    Raises CheckpointError, UnsupportedModelError, OptionError, PackError or NotEnoughMemoryError, each saying what to
    do.
    """
    folder = find_model(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = read_config(folder)
    checkpoint = Checkpoint.open(folder)  # every header is checked here, before transformers or a kernel relies on one
    inner = getattr(config, "quantization_config", None)
    if inner is not None:
        del config.quantization_config
        inner = inner if isinstance(inner, dict) else inner.to_dict()
    options: dict[str, Any] = dict(
        weights=weights, threads=threads, memory_limit=memory_limit, gemm_rows=gemm_rows, activations=activations,
        pack_dir=pack_dir, dense=dense, fused_decode=fused_decode, device=device, gpu_memory=gpu_memory, ram=ram,
        policy=policy, overlap=overlap, predictor=predictor, adapt=adapt, cuda_graphs=cuda_graphs,
        inner=inner, progress=progress,
    )  # fmt: skip
    ours = MoeOffloadConfig(**options)
    more = {"attn_implementation": attn_implementation, "device_map": device_map}
    source = _Source(folder, config, {name: value for name, value in more.items() if value is not None})
    try:
        choice = dtype_for_device(checkpoint, config, ours.options, dtype, progress)
    finally:
        checkpoint.close()
    loaded = source.load(ours, choice.dtype)
    if loaded.offload.device is not None:
        if choice.note:
            logger.warning("%s", choice.note)
    elif choice.converted:  # for a device that turned out to be of no use
        loaded.offload.close()
        del loaded
        gc.collect()  # a model and its engine hold each other
        loaded = source.load(MoeOffloadConfig(**options | {"device": "cpu", "gpu_memory": None}), dtype)
    return loaded


@dataclass(frozen=True, slots=True)
class _Source:
    """A checked folder, and what goes to transformers as it is."""

    folder: Path
    config: PreTrainedConfig
    arguments: dict[str, Any]

    def load(self, ours: MoeOffloadConfig, dtype: Any) -> PreTrainedModel:
        """The model, by transformers' `from_pretrained`."""
        try:
            loaded, info = model_class(self.config).from_pretrained(
                self.folder,
                config=self.config,
                dtype=dtype,
                quantization_config=ours,
                output_loading_info=True,
                **self.arguments,
            )
        except MoeOffloadError:
            raise
        except (
            SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError,
        ) as error:  # fmt: skip
            raise CheckpointError(f"transformers could not load {self.folder}: {first_line(error)}") from error
        _refuse_incomplete(self.folder, loaded, info)
        return loaded


def read_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration. Raises CheckpointError when config.json is missing, damaged or unknown."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json: it is no Hugging Face model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise CheckpointError(f"{path} names no model_type: it is no Hugging Face model configuration")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a configuration's own checks raise whatever they like
        raise CheckpointError(f"{path} is not a configuration transformers accepts: {first_line(error)}") from error


def require_experts(folder: Path) -> None:
    """Raise what `load` would for the configuration alone, a dense model for one: before something less is said."""
    MoeSpec.from_hf(read_config(folder))


def _refuse_incomplete(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """transformers fills missing tensors with random values and only warns; a wrong model is worse than none."""
    for key, problem in (("missing_keys", "are missing"), ("mismatched_keys", "have the wrong shape")):
        names = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(key) or ())
        if names:
            model.offload.close()
            raise CheckpointError(
                f"{folder}: {len(names)} tensors {problem}, such as {names[0]!r}: the checkpoint is incomplete or of "
                "another architecture than its config.json says"
            )
