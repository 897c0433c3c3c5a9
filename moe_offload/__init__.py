"""Run Hugging Face Mixture-of-Experts models well on the servers people already have."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout: the subpackages lie beside this folder
    __path__.append(str(_root))

__version__ = "0.1.0"

# Importing torch and transformers takes seconds, so the names below are imported when first asked for.
_WHERE = {
    "CheckpointError": "moe_offload.models.errors",
    "Engine": "moe_offload.engine",
    "MoeOffloadConfig": "moe_offload.config",
    "MoeOffloadError": "moe_offload.models.errors",
    "MoeSpec": "moe_offload.models.spec",
    "NotEnoughMemoryError": "moe_offload.models.errors",
    "OptionError": "moe_offload.models.errors",
    "Options": "moe_offload.options",
    "PackError": "moe_offload.models.errors",
    "UnsupportedModelError": "moe_offload.models.errors",
    "load": "moe_offload.loading",
}

if TYPE_CHECKING:
    from moe_offload.config import MoeOffloadConfig
    from moe_offload.engine import Engine
    from moe_offload.loading import load
    from moe_offload.models.errors import (
        CheckpointError,
        MoeOffloadError,
        NotEnoughMemoryError,
        OptionError,
        PackError,
        UnsupportedModelError,
    )
    from moe_offload.models.spec import MoeSpec
    from moe_offload.options import Options

__all__ = [
    "CheckpointError",
    "Engine",
    "MoeOffloadConfig",
    "MoeOffloadError",
    "MoeSpec",
    "NotEnoughMemoryError",
    "OptionError",
    "Options",
    "PackError",
    "UnsupportedModelError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
