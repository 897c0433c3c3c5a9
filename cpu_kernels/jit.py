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
