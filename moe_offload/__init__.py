"""Run Hugging Face Mixture-of-Experts models well on the servers people already have."""

from pathlib import Path

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout: the subpackages lie beside this folder
    __path__.append(str(_root))

__version__ = "0.1.0"
