"""Compiled code of this room in the kernel cache.

The cache's folder is named by the kernels' sources, which do not include this room's. So everything compiled here has
the hash of this room's compiled files in its name: changed sources find no machine code of before.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from moe_offload.cpu_kernels.kernel_cache import compile_job, compiled
from moe_offload.predictor.network import DECAY
from moe_offload.predictor.trace import DISTANCES

# The files with compiled code, or with values that are compiled into it.
SOURCES = ("adaptation.py", "compiling.py", "fast_inputs.py", "fast_stages.py")


@cache
def _sources() -> str:
    digest = hashlib.sha256(repr((DISTANCES, DECAY)).encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def predicting(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """`kernel_cache.compiled` for functions of this room."""

    def decorate(function: Callable[..., Any]) -> Any:
        function.__name__ = f"{function.__name__}_{_sources()}"
        return compiled(signature)(function)

    return decorate


def stage_job(function: Callable[[int, int], None], name: str) -> Any:
    """`kernel_cache.compile_job` for a stage of this room."""
    return compile_job(function, "void(int64,int64)", f"{name}-{_sources()}")
