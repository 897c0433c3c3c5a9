"""Where a model is: a folder given by name, the demo model of this package, or the Hub's cache after a download.

A mistyped path is told at once: the libraries that take seconds to import are left alone until they are needed.
"""

import os
from pathlib import Path
from typing import Any

from moe_offload import models
from moe_offload.models.errors import CheckpointError, first_line

# A small Qwen3-MoE model trained on Python's standard library, part of this package.
DEMO_FOLDER = Path(models.__file__).parent / "demo"

# What a model needs beside its shards. Never *.bin, *.gguf or original/: the same weights again in other formats.
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def find_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    shards: bool = True,
) -> Path:
    """The local folder of `model`, downloaded when it is an id on the Hub; without its weights if not `shards`."""
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
    return _from_hub(
        name, shards, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )


def _from_hub(name: str, shards: bool, *, local_files_only: bool, **hub: Any) -> Path:
    """The folder in the Hub's cache, after a download of what is not there yet."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from moe_offload.models.checkpoint import INDEX_NAME, SINGLE_NAME, read_index

    unreachable = ""
    try:
        # Without a connection the Hub's client would try for half a minute, also for what was downloaded before.
        unreachable = "" if local_files_only else _hub_problem(name, hub["revision"], hub["token"])
        hub["local_files_only"] = local_files_only or bool(unreachable)
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
                f"there is no folder {name!r}, no model of that name was downloaded before, and the Hub cannot be "
                f"reached: {unreachable}"
            ) from error
        raise CheckpointError(
            f"there is no folder {name!r}, and the Hub did not give a model of that name: {first_line(error)}"
        ) from error


def _hub_problem(name: str, revision: str | None, token: str | bool | None) -> str:
    """Why the Hub cannot be reached; empty when it can. Raises HfHubHTTPError or ValueError if it has no such model."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        model_info(name, revision=revision, token=token, timeout=10)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as error:  # whatever the HTTP library of this version raises
        return first_line(error)
    return ""
