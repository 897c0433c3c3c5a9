"""Kernels on a card: compiled by CuPy with NVRTC, launched on torch's current stream. Never run on a GPU by us.

torch owns all memory: a kernel gets addresses, CuPy allocates nothing. CuPy keeps what it compiled on disk, by the
whole text and the compiler's version.
"""

import ctypes
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_offload.gpu_kernels.launch import Argument, KernelError, Macros
from moe_offload.gpu_kernels.sources import read_source

TURING = (7, 5)  # CUDA 13 compiles for no card before it
_OLDEST = (6, 0)  # Pascal
_LOG_LINES = 12  # of what the compiler says; more follows from the first

PtxSource = Callable[[str, Macros], bytes]


def import_cupy(capability: tuple[int, int] | None = None) -> Any:
    """CuPy, with a compiler that knows cards of this capability where one is installed.

    With the wheels of NVRTC 12 and 13 both installed, or 13 in the system, CuPy for CUDA 12 takes 13, which has dropped
    cards before Turing; of a library that is already loaded it takes no other. Has no effect once CuPy has compiled.
    """
    if capability is not None and capability < TURING and "cupy" not in sys.modules:
        with suppress(metadata.PackageNotFoundError, OSError):
            wheel = metadata.distribution("nvidia-cuda-nvrtc-cu12")
            library = wheel.locate_file("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("cupy")


class CupyKernel:
    """One kernel of one card."""

    def __init__(self, owner: "CupyKernels", name: str, raw: Any) -> None:
        self.name, self._owner, self._raw = name, owner, raw

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], *, shared_bytes: int = 0
    ) -> None:
        grid, block = tuple(grid), tuple(block)
        if min(*grid, *block, 1) < 1:  # CuPy would make 1 of it, silently
            raise KernelError(f"{self.name}: no grid {grid} of blocks {block} can be launched")
        values = tuple(self._value(at, argument) for at, argument in enumerate(arguments))
        index = self._owner.device_index
        with torch.cuda.device(index), self._owner.stream(torch.cuda.current_stream(index)):
            self._raw(grid, block, values, shared_mem=shared_bytes)

    def _value(self, at: int, argument: Argument) -> Any:
        """What CuPy is to be given: it takes numbers of NumPy, and arrays of one element, with exactly their bytes."""
        if isinstance(argument, torch.Tensor):
            return np.uintp(argument.data_ptr())
        if argument is None:
            return np.uintp(0)
        if isinstance(argument, np.generic) or (isinstance(argument, np.ndarray) and argument.size == 1):
            return argument
        if isinstance(argument, np.ndarray):
            raise KernelError(f"{self.name}: argument {at} has {argument.size} elements; only one is passed by value")
        raise TypeError(f"{self.name}: argument {at} is a Python {type(argument).__name__}; give its size, such as "
                        "numpy.int32(...)")  # fmt: skip


class CupyKernels:
    """Compiles sources for one card. KernelError where that cannot be: no CuPy, no compiler that knows the card."""

    def __init__(self, device_index: int = 0) -> None:
        self.device_index = device_index
        capability = torch.cuda.get_device_capability(device_index)
        if capability < _OLDEST:
            raise KernelError(f"kernels are for compute capability 6.0 and later, this card has {_spoken(capability)}")
        try:
            self._cupy = import_cupy(capability)
            compiler = self._cupy.cuda.nvrtc.getVersion()
        except Exception as error:  # what a damaged installation says is anything
            raise KernelError(f"CuPy and its compiler cannot be used: {_first_lines(error)}") from error
        if compiler[0] >= 13 and capability < TURING:
            raise KernelError(
                f"CuPy has loaded NVRTC {_spoken(compiler)}, which cannot compile for compute capability "
                f"{_spoken(capability)}: pip uninstall -y nvidia-cuda-nvrtc && pip install 'nvidia-cuda-nvrtc-cu12<13'"
            )
        self._ptx: PtxSource | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._modules: dict[tuple[str, Macros], Any] = {}
        self._kernels: dict[tuple[str, str, Macros], CupyKernel] = {}
        self._streams: dict[int, Any] = {}

    @classmethod
    def of_ptx(cls, ptx: PtxSource, device_index: int = 0) -> "CupyKernels":
        """Kernels compiled elsewhere: `ptx(source, macros)` gives the PTX of an older card, which the driver translates
        for this one.
        """
        kernels = cls(device_index)
        kernels._ptx = ptx
        kernels._folder = tempfile.TemporaryDirectory(prefix="moe-offload-ptx-")
        return kernels

    def get(self, source: str, name: str, macros: Macros = ()) -> CupyKernel:
        """The kernel, compiled; ValueError for one that is not there, KernelError where compiling fails."""
        key = source, name, macros
        found = self._kernels.get(key)
        if found is None:
            with torch.cuda.device(self.device_index):
                found = self._kernels[key] = CupyKernel(self, name, self._find(source, name, macros))
        return found

    def stream(self, stream: torch.cuda.Stream) -> Any:
        """torch's stream for CuPy; made once for each."""
        handle = int(stream.cuda_stream)
        found = self._streams.get(handle)
        if found is None:
            found = self._streams[handle] = self._wrapped(stream, handle)
        return found

    def _find(self, source: str, name: str, macros: Macros) -> Any:
        module = self._modules.get((source, macros))
        try:
            if module is None:
                module = self._modules[source, macros] = self._module(source, macros)
            return module.get_function(name)  # compiles, at the first
        except self._cupy.cuda.driver.CUDADriverError as error:
            if "NOT_FOUND" in str(error):
                raise ValueError(f"{source} has no kernel {name!r}") from error
            raise KernelError(f"{name} of {source} cannot be loaded: {_first_lines(error)}") from error
        except (self._cupy.cuda.compiler.CompileException, self._cupy.cuda.nvrtc.NVRTCError) as error:
            raise KernelError(f"{source} cannot be compiled: {_first_lines(error)}") from error

    def _module(self, source: str, macros: Macros) -> Any:
        if self._ptx is None or self._folder is None:
            options = ("-std=c++17", *(f"-D{name}={value}" for name, value in macros))
            return self._cupy.RawModule(code=read_source(source), options=options, backend="nvrtc")
        path = Path(self._folder.name) / f"{len(self._modules)}.ptx"
        path.write_bytes(self._ptx(source, macros))
        return self._cupy.RawModule(path=str(path))

    def _wrapped(self, stream: torch.cuda.Stream, handle: int) -> Any:
        of_cupy = self._cupy.cuda
        if handle == 0:  # the default stream
            return of_cupy.Stream.null
        if hasattr(of_cupy.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
            return of_cupy.Stream.from_external(stream)
        return of_cupy.ExternalStream(handle, self.device_index)  # older than the protocol


def _spoken(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _first_lines(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "\n".join(lines[:_LOG_LINES])
