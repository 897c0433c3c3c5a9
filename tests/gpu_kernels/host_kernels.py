"""Kernels on the CPU: their CUDA C++ source, compiled by g++ behind host_shim.h, on CPU tensors.

What it shows: wrong numbers; a barrier or a warp operation that not all reach; a lane that a mask names and that has
returned; a missing barrier, when some order of the threads makes it matter (several orders, always: each hides some);
shared memory read before it is written, which is NaN; arguments of another type than the kernel's; with
sanitize="address" reads and writes outside of tensors and shared arrays, with "alignment" vectors loaded from odd
addresses, with "bounds" indices outside of local arrays (test_sanitized.py runs all tests that way).

What it does not show: races within one stretch between barriers that no order brings out; how the device rounds (it
joins products and sums, its exp and division differ in the last bits); speed, bank conflicts, registers; a kernel that
waits for another block, which hangs here. Neighbours inside one larger tensor are not outside of it.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_offload.gpu_kernels.launch import Argument, KernelError, Macros
from moe_offload.gpu_kernels.sources import read_source
from tests.gpu_kernels.build_cache import cached

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run kernels on the CPU")

ORDERS = (0, 1, 2, 3)  # forward, backward, random, and one warp ahead of the others
SANITIZE = "HOST_KERNELS_SANITIZE"  # environment variable: what HostKernels checks unless told otherwise
# For tests of numbers alone: under sanitizers they would only take their time once more.
numbers_only = pytest.mark.skipif(bool(os.environ.get(SANITIZE)), reason="not under sanitizers: numbers tell")
_SHIM = Path(__file__).with_name("host_shim.h")
_FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -U_FORTIFY_SOURCE -fno-strict-aliasing -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-unused-function -Wno-unused-parameter -Wno-sign-compare -Wno-attributes "
    "-Werror=uninitialized -Werror=maybe-uninitialized -Werror=return-type"
).split()
_SANITIZE_FLAGS = ["-g1", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
_BOUNDS = re.compile(r"__launch_bounds__\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
_KERNEL = re.compile(r"__global__\s+void\s+(\w+)\s*\(")
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s*)?(\w+)\s+(\w+)\[\]\s*;")
_KINDS = {"i": "i", "u": "u", "f": "f", "b": "b"}


class HostKernel:
    """One kernel; called like one of the device's."""

    def __init__(self, library: ctypes.CDLL, name: str, order: int) -> None:
        self.name, self.order = name, order
        self._launch = getattr(library, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        signature = getattr(library, f"signature_{name}")
        signature.restype = ctypes.c_char_p
        self.signature: list[str] = signature().decode().split()
        self.bound = int(getattr(library, f"bound_{name}")())

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], *, shared_bytes: int = 0
    ) -> None:
        grid, block = _three(grid), _three(block)
        self._check_sizes(grid, block, shared_bytes)
        if len(arguments) != len(self.signature):
            raise KernelError(f"{self.name}: {len(arguments)} arguments for {len(self.signature)} parameters")
        values = [self._value(i, argument) for i, argument in enumerate(arguments)]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = ctypes.c_uint * 3
        found = self._launch(sizes(*grid), sizes(*block), ctypes.c_size_t(shared_bytes), addresses, self.order)
        if found:
            raise KernelError(f"{self.name}: {found.decode()}")

    def _check_sizes(self, grid: Sequence[int], block: Sequence[int], shared_bytes: int) -> None:
        limits = (
            *((size, 65535) for size in grid[1:]),
            (grid[0], 2**31 - 1),
            *zip(block, (1024, 1024, 64), strict=True),
        )
        if any(not 1 <= size <= limit for size, limit in limits):
            raise KernelError(f"{self.name}: a device takes no grid {tuple(grid)} of blocks {tuple(block)}")
        threads = int(np.prod(block))
        if threads > self.bound:
            raise KernelError(f"{self.name}: {threads} threads in a block, its bound is {self.bound}")
        if not 0 <= shared_bytes <= 48 << 10:
            raise KernelError(f"{self.name}: {shared_bytes} bytes of shared memory; without asking there are 48 KiB")

    def _value(self, at: int, argument: Argument) -> NDArray[Any]:
        """The bytes of a parameter, of exactly the type that the kernel has."""
        wanted = self.signature[at]
        if argument is None or isinstance(argument, torch.Tensor):
            if isinstance(argument, torch.Tensor) and argument.device.type != "cpu":
                raise KernelError(f"{self.name}: argument {at} is on {argument.device}, not on the CPU")
            given, value = "p", np.array([0 if argument is None else argument.data_ptr()], np.uintp)
        elif isinstance(argument, np.generic | np.ndarray):
            value = np.ascontiguousarray(argument).reshape(-1)
            if value.size != 1:
                raise KernelError(f"{self.name}: argument {at} has {value.size} elements; only one is passed by value")
            size = value.dtype.itemsize
            given = f"s{size}" if value.dtype.names else f"{_KINDS.get(value.dtype.kind, '?')}{size}"
        else:
            raise TypeError(f"{self.name}: argument {at} is a Python {type(argument).__name__}; give its size, such as "
                            "numpy.int32(...)")  # fmt: skip
        if given != wanted:
            raise KernelError(f"{self.name}: argument {at} is {given}, the kernel takes {wanted}")
        return value


class HostKernels:
    """Compiles sources for the CPU.

    order: 0 forward, 1 backward, more: a seed. arch 600 takes the branches without dp4a. sanitize: "address",
    "alignment", "bounds", or some with commas between; "address" needs its library preloaded (`preloaded_sanitizer`).
    """

    def __init__(self, order: int = 0, arch: int = 610, sanitize: str | None = None) -> None:
        self.order, self.arch = order, arch
        self.sanitize = os.environ.get(SANITIZE, "") if sanitize is None else sanitize
        self._text: str | None = None

    @classmethod
    def of_text(cls, text: str, order: int = 0, arch: int = 610, sanitize: str | None = None) -> "HostKernels":
        """Kernels of this text, whichever source they are asked of."""
        kernels = cls(order, arch, sanitize)
        kernels._text = text
        return kernels

    def get(self, source: str, name: str, macros: Macros = ()) -> HostKernel:
        text = read_source(source) if self._text is None else self._text
        library = _library(text, macros, self.arch, self.sanitize)
        if not hasattr(library, f"launch_{name}"):
            raise ValueError(f"{source} has no kernel {name!r}")
        return HostKernel(library, name, self.order)


def preloaded_sanitizer() -> dict[str, str]:
    """The environment of a process that may load kernels checked for addresses."""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # What Python keeps to its end is no leak of ours. Tensors and arrays come from malloc: each has its own red zones.
    options = "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:malloc_context_size=5"
    return {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": options}


@cache
def _library(text: str, macros: Macros, arch: int, sanitize: str) -> ctypes.CDLL:
    if "address" in sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise KernelError("sanitize='address' needs a process started with preloaded_sanitizer()")
    defines = [f"-D__CUDA_ARCH__={arch}", *(f"-D{name}={value}" for name, value in macros)]
    checks = [f"-fsanitize={sanitize}", *_SANITIZE_FLAGS] if sanitize else []
    if "address" in sanitize:
        checks.append("-fsanitize-sections=cushared")
    key = text, _SHIM.read_text(), __file__, Path(__file__).read_text(), defines, checks
    return ctypes.CDLL(str(cached(".so", key, lambda path: _compile(text, defines, checks, path))))


def _compile(text: str, defines: Sequence[str], checks: Sequence[str], path: Path) -> None:
    if shutil.which("g++") is None:
        raise KernelError("no g++ here: mark tests that run kernels on the CPU with needs_compiler")
    text = text.replace("#pragma once\n", "\n")  # headers stand in the text; g++ would warn of each
    exports = "".join(f"SHIM_EXPORT({name}, ({bound}))\n" for name, bound in _kernels(text, defines))
    # What has no size here becomes a pointer to memory of the size that the launch asks for.
    text = _DYNAMIC.sub(r"\1* \2 = (\1*)shim::dynamic_shared.get();", text)
    source = path.with_suffix(".cpp")
    source.write_text(
        f'#include "{_SHIM}"\nnamespace {{\n#line 1 "kernel.cu"\n{text}\n}}  // namespace\n#line 1 "exports"\n{exports}'
    )
    try:
        _gcc([*_FLAGS, *defines, *checks, "-o", str(path), str(source)])
    finally:
        source.unlink()


def _kernels(text: str, defines: Sequence[str]) -> list[tuple[str, str]]:
    """Names of the kernels that these macros leave in the text, and the threads that a block may have."""
    seen = _gcc(["-E", "-P", "-x", "c++", "-DCUDA_HOST_SHIM=1", *defines, "-"], text)
    bounds = []
    for part in seen.split("__global__")[1:]:
        head = part.split("{")[0]
        found, name = _BOUNDS.search(head), _KERNEL.search("__global__" + _BOUNDS.sub(" ", head))
        if name is None:
            raise KernelError(f"this is no kernel: __global__{head[:80]}")
        bounds.append((name[1], found[1].split(",")[0] if found else "1024"))
    return bounds


def _gcc(arguments: Sequence[str], text: str | None = None) -> str:
    # without a preloaded sanitizer, which would look at all that the compiler does, and make it thrice as slow
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(["g++", *arguments], input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise KernelError(f"g++ refuses this source:\n{done.stderr}")
    if "warning:" in done.stderr:
        print(done.stderr, file=sys.stderr)  # noqa: T201 - shown by pytest with the test that fails
    return done.stdout


def _three(sizes: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(sizes) <= 3:
        raise KernelError(f"a size has one to three numbers, not {len(sizes)}")
    return (*(int(size) for size in sizes), 1, 1)[:3]
