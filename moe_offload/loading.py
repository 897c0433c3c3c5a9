"""`load`: a folder or a Hub id in, an ordinary transformers model out, its experts left where they are."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_offload.config import MoeOffloadConfig
from moe_offload.engine import Progress
from moe_offload import models
from moe_offload.models.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_index
from moe_offload.models.errors import CheckpointError, MoeOffloadError
from moe_offload.models.spec import model_class
from moe_offload.options import Weights

# A small Qwen3-MoE model trained on Python's standard library, part of this package.
DEMO_FOLDER = Path(models.__file__).parent / "demo"

# What a model needs beside its shards. Never *.bin, *.gguf or original/: the same weights again in other formats.
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def load(
    model: str | os.PathLike[str],
    *,
    weights: Weights = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    gemm_rows: int | None = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts model without copying its expert weights.

    model: a folder in Hugging Face format, the id of a model on the Hub, or "demo" for the model in this package.
    weights, threads, memory_limit, gemm_rows: see `Options`.
    dtype, attn_implementation, device_map, revision, token, cache_dir, local_files_only: as in transformers'
        `from_pretrained`.
    progress: called with (what, done, total) while kernels are compiled.

    Returns the ordinary transformers model; `model.offload` is the engine (`spec`, `options`, `statistics`, `close()`).

    Raises CheckpointError, UnsupportedModelError, OptionError or NotEnoughMemoryError, each saying what to do.
    """
    folder = find_model(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = read_config(folder)
    Checkpoint.open(folder)  # every header is checked here, before transformers or a kernel relies on one
    inner = getattr(config, "quantization_config", None)
    if inner is not None:
        del config.quantization_config
        inner = inner if isinstance(inner, dict) else inner.to_dict()
    ours = MoeOffloadConfig(weights, threads, memory_limit, gemm_rows, inner=inner, progress=progress)
    wanted = {"attn_implementation": attn_implementation, "device_map": device_map}
    try:
        loaded, info = model_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=ours,
            output_loading_info=True,
            **{name: value for name, value in wanted.items() if value is not None},
        )
    except MoeOffloadError:
        raise
    except (
        SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"transformers could not load {folder}: {_first_line(error)}") from error
    _refuse_incomplete(folder, loaded, info)
    return loaded


def find_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    shards: bool = True,
) -> Path:
    """The local folder of `model`, downloaded from the Hub when it is an id (only its configuration if not `shards`)."""
    if model == "demo":
        return DEMO_FOLDER
    path = Path(model).expanduser()
    name = os.fspath(model)
    if not name:
        raise CheckpointError("the model's name is empty: give a folder, the id of a model on the Hub, or 'demo'")
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the weights")
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name:
        raise CheckpointError(f"there is no folder {path}: check the path")
    unreachable = ""
    try:
        # Without a connection the Hub's client would try for half a minute, also for what was downloaded before.
        unreachable = "" if local_files_only else _hub_problem(name, revision, token)
        hub: dict[str, Any] = {
            "revision": revision, "token": token, "cache_dir": cache_dir,
            "local_files_only": local_files_only or bool(unreachable),
        }  # fmt: skip
        if not shards:
            return Path(snapshot_download(name, allow_patterns=_SMALL_FILES, **hub))
        files = [SINGLE_NAME]
        try:
            files = sorted(set(read_index(Path(hf_hub_download(name, INDEX_NAME, **hub))).values()))
        except (HfHubHTTPError, LocalEntryNotFoundError):
            pass  # an unsharded model has no index; if the model itself is not there, the next call says so
        return Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, *files], **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if unreachable:
            raise CheckpointError(
                f"there is no folder {name!r}, no model of that name was downloaded before, and the Hub cannot be reached: "
                f"{unreachable}"
            ) from error
        raise CheckpointError(
            f"there is no folder {name!r}, and the Hub did not give a model of that name: {_first_line(error)}"
        ) from error


def _hub_problem(name: str, revision: str | None, token: str | bool | None) -> str:
    """Why the Hub cannot be reached; empty when it can. Raises HfHubHTTPError or ValueError when it has no such model."""
    try:
        model_info(name, revision=revision, token=token, timeout=10)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as error:  # whatever the HTTP library of this version raises
        return _first_line(error)
    return ""


def read_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration. Raises CheckpointError when config.json is missing, damaged or unknown."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json: it is no Hugging Face model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise CheckpointError(f"{path} names no model_type: it is no Hugging Face model configuration")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a configuration's own checks raise whatever they like
        raise CheckpointError(f"{path} is not a configuration transformers accepts: {_first_line(error)}") from error


def _refuse_incomplete(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """transformers fills missing tensors with random values and only warns; a wrong model is worse than none."""
    for key, problem in (("missing_keys", "are missing"), ("mismatched_keys", "have the wrong shape")):
        names = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(key) or ())
        if names:
            model.offload.close()
            raise CheckpointError(
                f"{folder}: {len(names)} tensors {problem}, such as {names[0]!r}: the checkpoint is incomplete or of another "
                "architecture than its config.json says"
            )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A heading says nothing without what stands below it.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
