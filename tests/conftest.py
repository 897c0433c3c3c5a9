"""Shared fixtures: tiny checkpoints on disk, made once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny_models

Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Tiny models gain nothing from OpenMP, whose threads wait for each other for seconds on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    """Progress bars and load reports of hundreds of tiny models hide what a failing test prints."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def packs_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where no folder is given, packs go into one that is gone afterwards."""
    folder = tmp_path_factory.mktemp("packs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_offload.packs.default_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """checkpoint(model_type, dtype=..., **config) -> folder of a sharded random checkpoint; never write into it."""
    made: dict[object, Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        key = (model_type, dtype, tuple(sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[key] = tiny_models.save(tiny_models.build(model_type, dtype, **overrides), folder)
        return made[key]

    return make
