"""Where trained predictors are kept: beside the packs of converted weights."""

from pathlib import Path

import platformdirs


def default_folder() -> Path:
    """The folder, which need not be there yet."""
    return Path(platformdirs.user_cache_dir("moe-offload")) / "predictors"


def predictor_path(model_type: str, fingerprint: str) -> Path:
    """The predictor of the model with this `pack_key.content_key`, if one was trained."""
    return default_folder() / f"{model_type}-{fingerprint[:16]}.safetensors"
