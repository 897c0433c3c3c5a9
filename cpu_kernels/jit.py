"""The one way this room compiles Python: no GIL, no bounds checks, no Python exceptions.

No fast-math either: NaN and infinity have to come out as torch gives them.
Annotations of such functions are for the reader and mypy; Numba infers its own. Addresses are
int64, so they read `int` here.
"""

from collections.abc import Callable
from typing import Any

import numba

OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def native(function: Callable[..., Any]) -> Any:
    """A function for other compiled functions to call; compiled into each of them."""
    return numba.njit(**OPTIONS)(function)


def rename(function: Callable[..., Any], key: str) -> None:
    """Give a factory's function a name of its own; `key` names all it is specialised by.

    Numba tells functions of one name apart by a counter within the process. Kernels that two
    processes put into the cache may therefore bring the same symbols, and a third process that
    loads both calls the helper of one from the other (seen: f16 rows read as bf16).
    """
    function.__qualname__ = f"{function.__qualname__}:{key}"


def specialised(key: str) -> Callable[[Callable[..., Any]], Any]:
    """`native` for a factory's function, under a name of its own."""

    def decorate(function: Callable[..., Any]) -> Any:
        rename(function, key)
        return native(function)

    return decorate
