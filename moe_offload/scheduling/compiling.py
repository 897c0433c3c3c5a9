"""Compiled planning code in the kernel cache.

The cache's folder is named by the kernels' sources, which do not include this folder's. So every function compiled here
has the hash of this folder in its name: changed sources find no machine code of before.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from moe_offload.cpu_kernels.kernel_cache import compiled


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes() + b"\0")
    return digest.hexdigest()[:12]


# The files with compiled code, or with values that are compiled into it.
SOURCES = ("arrangement.py", "compiling.py", "exact.py", "layer_plan.py", "planner.py")


def planning(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """`kernel_cache.compiled` for functions of this folder."""

    def decorate(function: Callable[..., Any]) -> Any:
        function.__name__ = f"{function.__name__}_{_sources()}"
        return compiled(signature)(function)

    return decorate
