"""How CUDA C++ sources become kernels, and what a launch may be given.

Two implementations: `cupy_kernels.CupyKernels` compiles with NVRTC and launches on torch's current stream; that of the
tests compiles the same sources with g++ and runs them on the CPU. Both refuse a Python int or float: CuPy
would hand them over as 64 bits, and a kernel that takes an `int` or a `float` would read half of one, silently.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

# A tensor is the address of its first element, None a null pointer; an array of one element is passed by value: a
# struct, when its dtype is one.
Argument = torch.Tensor | np.generic | NDArray[Any] | None
Macros = tuple[tuple[str, int], ...]


class KernelError(RuntimeError):
    """Kernels cannot be compiled or started here; the message says why."""


class Kernel(Protocol):
    """A compiled kernel."""

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], *, shared_bytes: int = 0
    ) -> None:
        """Start it on the current stream and return. The caller keeps the tensors alive until it has run."""


class Kernels(Protocol):
    """Compiles sources for one device."""

    def get(self, source: str, name: str, macros: Macros = ()) -> Kernel:
        """Kernel `name` of the file `source` of this folder, with `macros` defined; compiled once.

        Raises ValueError for a kernel that is not there, KernelError where compiling fails.
        """
